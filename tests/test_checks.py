"""The repository's own checks find the faults they are for."""
import importlib, importlib.util, json, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def load(name, base):
    spec = importlib.util.spec_from_file_location(name, base/f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(kind, source, **kw):
    return dict(cell_type=kind, id=f'{abs(hash(source)):x}'[:8], metadata={}, source=source) | \
        (dict(execution_count=None, outputs=[]) if kind == 'code' else {}) | kw


def notebook(path, *cells):
    meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(json.dumps(dict(cells=list(cells), metadata=meta, nbformat=4, nbformat_minor=5)))


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    "A small project of two modules, exported and in sync, and its checks."
    tmp_path = tmp_path_factory.mktemp('sound')
    shutil.copytree(root/'tools', tmp_path/'tools')
    for f in 'settings.ini', 'pyproject.toml': shutil.copy(root/f, tmp_path)
    for d in 'nbs', 'craft_nb': (tmp_path/d).mkdir()
    (tmp_path/'craft_nb/__init__.py').write_text('__version__ = "0.1.0"\n')
    (tmp_path/'_quarto.yml').write_text('project:\n  type: website\n')
    (tmp_path/'nbs/_quarto.yml').symlink_to('../_quarto.yml')
    for n, name, code in (0, 'one', 'x = 1'), (1, 'two', 'from craft_nb.one import x\ny = x + 1'):
        notebook(tmp_path/f'nbs/{n:02}_{name}.ipynb', cell('code', f'#| default_exp {name}'),
                 cell('markdown', f'# {name}\n\n> A module.'), cell('code', f'#| export\n{code}'))
    notebook(tmp_path/'nbs/index.ipynb', cell('markdown', '# small\n\n> A project.'), cell('code', '1 + 1'))
    run(tmp_path, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    run(tmp_path, 'tools/readme.py')
    return tmp_path


@pytest.fixture
def repo(sound, tmp_path): return Path(shutil.copytree(sound, tmp_path/'repo', symlinks=True))


def run(repo, *args):
    done = subprocess.run([sys.executable, *args], cwd=repo, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_sound(repo):
    checks = load('checks', repo)
    assert {c.__name__: c() for c in checks.checks} == {c.__name__: [] for c in checks.checks}


@pytest.mark.parametrize('extra, fault', [
    (cell('code', '1', outputs=[dict(output_type='error', ename='E', evalue='', traceback=[])]), 'saved an error'),
    (cell('code', '2', execution_count=3), 'not clean'),
    (cell('code', '3', outputs=[dict(output_type='display_data', metadata={},
                                     data={'application/vnd.jupyter.widget-view+json': {}})]), 'saved a widget'),
    (cell('code', '# note\n#| export\nz = 1'), 'makes nbdev drop it'),
    (cell('code', '4', outputs=[dict(output_type='stream', name='stdout', text=f'{Path.home()}/x')]),
     'its output names'),
])
def test_clean(repo, extra, fault):
    notebook(repo/'nbs/02_three.ipynb', cell('markdown', '# three\n\n> A page.'), extra)
    assert any(fault in f for f in load('checks', repo).clean())


def test_title_cell_with_text(repo):
    notebook(repo/'nbs/02_three.ipynb', cell('markdown', '# three\n\n> A page.\n\nLost text.'))
    assert 'nbdev drops' in load('checks', repo).clean()[0]


def test_edited_by_hand(repo):
    edit(repo/'craft_nb/one.py', 'x = 1', 'x = 2')
    assert 'one.py is not what its notebook exports' in load('checks', repo).in_sync()[0]


def test_module_without_notebook(repo):
    (repo/'craft_nb/left.py').write_text('')
    assert 'left.py is exported by no notebook' in load('checks', repo).in_sync()[0]


def test_stale_readme(repo):
    edit(repo/'nbs/index.ipynb', '1 + 1', '1 + 2')
    assert 'README.md' in load('checks', repo).readme()[0]


@pytest.mark.parametrize('code', ['from craft_nb.two import y', 'def f():\n    from . import two',
                                  'def f():\n    import craft_nb.two', 'from .one import x', 'from craft_nb import y'])
def test_import_upwards(repo, code):
    (repo/'craft_nb/one.py').write_text(code + '\n')
    assert 'craft_nb/one.py' in load('checks', repo).order()[0]


def test_names_and_imports(repo):
    (repo/'craft_nb/two.py').write_text('def f(): return missing\n')
    (repo/'craft_nb/one.py').write_text('raise RuntimeError("no")\n')
    checks = load('checks', repo)
    assert 'missing' in checks.names()[0] and checks.importable() == ['import craft_nb.one: RuntimeError: no']


def test_heavy_package(repo):
    (repo/'craft_nb/__init__.py').write_text('import matplotlib\n')
    assert 'matplotlib' in load('checks', repo).light()[0]


def test_readme_pictures(repo):
    png = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
    shown = cell('code', '#| hide_input\nplot()',
                 outputs=[dict(output_type='display_data', metadata={}, data={'image/png': png})])
    notebook(repo/'nbs/index.ipynb', cell('markdown', '# small\n\n> A project.'), shown,
             cell('code', '#| hide\nsecret()'))
    run(repo, 'tools/readme.py')
    text = (repo/'README.md').read_text()
    assert ('![](README_files/figure-1.png)' in text and 'secret' not in text
            and (repo/'README_files/figure-1.png').exists())
    (repo/'README_files/old.png').write_text('')
    assert 'old.png' in load('checks', repo).readme()[0]


@pytest.mark.parametrize('out', [
    dict(output_type='display_data', data={'application/vnd.jupyter.widget-view+json': dict(model_id='a'),
                                           'text/plain': "VBox(children=(HTML(value='x'),))"}),
    dict(output_type='display_data',
         data={'text/plain': ["VBox(children=(HTML(value='<b>x</b>'),), layout=Layout(width='9px'))"]}),
    dict(output_type='execute_result', data={'text/plain': "IntProgress(value=3, max=9)"}, execution_count=None),
    dict(output_type='display_data', data={'application/vnd.jupyter.widget-state+json': {}})])
def test_a_page_has_no_saved_widget(repo, out):
    "nbdev_clean leaves widgets in a notebook; a site that is built then does not show `VBox(children=…`."
    kept = dict(output_type='display_data', metadata={}, data={'text/plain': "Report(findings=[], value_of=2)"})
    picture = dict(output_type='display_data', metadata={}, data={'image/png': 'iVBORw0=', **out['data']})
    shown = cell('code', 'show()', outputs=[dict(metadata={}) | out, kept, picture])
    notebook(repo/'nbs/index.ipynb', cell('markdown', '# small\n\n> A project.'), shown)
    nb = json.loads((repo/'nbs/index.ipynb').read_text())
    nb['metadata']['widgets'] = {'application/vnd.jupyter.widget-state+json': dict(state={}, version_major=2)}
    (repo/'nbs/index.ipynb').write_text(json.dumps(nb))
    assert (any('saved a widget' in f for f in load('checks', repo).clean())
            and any('widget state' in f for f in load('checks', repo).clean()))
    run(repo, '-c',
        "import sys; sys.path.insert(0, 'tools'); import docs; from pathlib import Path; docs.process(Path('_proc'))")
    page = json.loads((repo/'_proc/index.ipynb').read_text())
    said = json.dumps(page)
    assert ('children=' not in said and 'IntProgress' not in said and 'widget' not in said and 'findings=[]' in said
            and 'iVBORw0=' in said)
    run(repo, 'tools/prepare.py')
    assert (not any('widget' in f for f in load('checks', repo).clean())
            and 'iVBORw0=' in (repo/'nbs/index.ipynb').read_text())


DOORS = dict(  # what was a module's own before it had rooms: the old path still works
    anchors="AnchorWriter AnchorCacheDataset verify_cache", policies="ADAPTERS adapter_for base_policy eval_mode "
    "RowDraws PI0FastAdapter TokenAdapter door_features pack_image mixed_precision",
    trainer="Callback Control AnchorPass Method AnchorMethod Constraint Retention AnchorRows HeldOut certificate_line "
    "CraftTrainer calibrate_budget estimate_memory Memory Run one_step RECORD FIRST_MEASURED PeakMemory "
    "added_gradients set_aside route_forward take_grad resident stop_on_signals", monitor="RecordLog Tail read_records "
    "Curve History num draw status figure png plot_records Controls Dashboard CraftMonitor from_jsonl",
    report="read_run read_runs split_tasks kept parse_gate GATES Report report_main facts read_evals verdict "
    "PAGE_CSS SCRIPT")


@pytest.mark.parametrize("door", DOORS)
def test_an_old_import_path_works_and_can_be_set(door, monkeypatch):
    module = importlib.import_module(f"craft_nb.{door}")
    assert not [n for n in DOORS[door].split() if not hasattr(module, n)]
    for name in DOORS[door].split():
        rooms = [r for r in module.rooms if name in vars(r)]
        assert all(vars(r)[name] is getattr(module, name) for r in rooms), name
        monkeypatch.setattr(module, name, mark := object())
        assert getattr(module, name) is mark and all(vars(r)[name] is mark for r in rooms), name


def test_long_lines_are_broken_where_a_reader_would(sound, monkeypatch):
    monkeypatch.syspath_prepend(sound/'tools')
    reflow = load('reflow', root).reflow
    long = """def f(a):
    if a: raise ValueError(f"a: expected a number above zero and below one, found {a:.3f}; give one with --a=NUMBER, or leave it out")
    return {k: v for k, v in zip(a.names_of_the_first_row, a.values_of_the_first_row, strict=True) if k not in a.ignored}
"""
    assert reflow(long) == """def f(a):
    if a:
        raise ValueError(f"a: expected a number above zero and below one, found {a:.3f}; give one with --a=NUMBER, "
                         "or leave it out")
    return {k: v for k, v in zip(a.names_of_the_first_row, a.values_of_the_first_row, strict=True)
            if k not in a.ignored}
"""
    assert reflow(reflow(long)) == reflow(long) and reflow(kept := 'f(a,\n  b)\n') == kept
    field = f"class A:\n    a: int = 1  # {'help ' * 30}\n"
    assert reflow(field) == field and reflow(f"%%js\n{'x ' * 90}") == f"%%js\n{'x ' * 90}"
