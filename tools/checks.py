"""What CI proves before it runs anything: see `checks` at the end. Each check returns a list of faults."""
import ast, json, re, shutil, subprocess, sys, tempfile
from copy import deepcopy
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pkg, nbs = root/'craft_nb', root/'nbs'
heavy = 'lerobot', 'transformers', 'matplotlib', 'ipywidgets'


def notebooks(base=nbs):
    return sorted(p for p in base.rglob('*.ipynb') if not any(x[0] in '._' for x in p.relative_to(base).parts))


def source(cell): return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


def exported():
    "{module: number of its notebook, as '05' or '11a'}, from `#| default_exp` and the file name."
    found = {}
    for p in notebooks():
        text = '\n'.join(source(c) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code')
        for name in re.findall(r'(?m)^#\|\s*default_exp\s+(\S+)', text):
            number = re.match(r'(\d\d[a-z]?)_', p.name)
            if not number:
                raise SystemExit(f'{p.name} exports {name}: its name must start with a number, such as 05 or 11a')
            found[name] = number[1]
    return found


def of_widgets(out):
    "What of an output is a widget, or the words that stand for one where there is no front end: keys of its data."
    data = out.get('data', {})
    text = ''.join(data.get('text/plain', ''))
    views = [k for k in data if 'widget' in k]
    return (views
            + ['text/plain'] * bool(views or re.match(r'[A-Z]\w+\((\w+=.*)?\b(children|layout|value|outputs)=', text)))


def without_widgets(nb):
    "Take saved widgets out of a notebook; a picture beside one stays. → how many there were."
    count = bool(nb['metadata'].pop('widgets', None))
    for c in nb['cells']:
        for out in c.get('outputs') or []:
            for k in (gone := of_widgets(out)): out['data'].pop(k, None)
            count += bool(gone)
        if 'outputs' in c: c['outputs'] = [o for o in c['outputs'] if 'data' not in o or o['data']]
    return count


def odd(cell, here):
    "What nbdev_clean leaves in a cell and a reader should not meet."
    src, outs = source(cell), cell.get('outputs', [])
    if re.search(r'(?m)\A\s*#(?!\|).*\n(?s:.*)^#\|\s*export', src):
        yield 'a comment above `#| export` makes nbdev drop it'
    title = re.match(r'# .*\n+>.*((?s:.*))', src) if cell['cell_type'] == 'markdown' else None
    if title and re.sub(r'(?m)^- .*', '', title[1]).strip(): yield 'nbdev drops what follows the title and its sentence'
    if any(o['output_type'] == 'error' for o in outs): yield 'saved an error'
    if any(of_widgets(o) for o in outs): yield 'saved a widget'
    yield from (f'its output names {h}' for h in here if h in json.dumps(outs))


def clean():
    "Notebooks are as nbdev_clean leaves them: no counts, errors, widget state, or addresses of this machine."
    from nbdev.clean import clean_nb
    faults, here = [], (str(root), str(Path.home()), '/tmp/ipykernel')
    for p in notebooks():
        nb = json.loads(p.read_text())
        want = deepcopy(nb)
        clean_nb(want)
        if want != nb: faults.append(f'{p.name}: not clean, run: nbdev_clean --fname nbs/{p.relative_to(nbs)}')
        if 'widgets' in nb['metadata']: faults.append(f'{p.name}: holds widget state')
        ids = [c.get('id') for c in nb['cells']]
        if len(set(ids)) < len(ids) or None in ids: faults.append(f'{p.name}: cells without their own id')
        for i, c in enumerate(nb['cells']):
            faults += [f'{p.name} cell {i}: {fault}' for fault in odd(c, here)]
    return faults


def in_sync():
    "craft_nb/*.py are what the notebooks export, and nothing else."
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        shutil.copytree(nbs, d/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
        for f in 'settings.ini', 'pyproject.toml', 'README.md', '_quarto.yml':
            if (root/f).exists(): shutil.copy(root/f, d/f)
        (d/'craft_nb').mkdir()
        shutil.copy(pkg/'__init__.py', d/'craft_nb')
        run = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=d,
                             capture_output=True, text=True)
        if run.returncode: return [f'nbdev_export failed: {run.stderr[-2000:]}']
        want = {p.relative_to(d/'craft_nb'): p.read_bytes() for p in (d/'craft_nb').rglob('*.py')}
        have = {p.relative_to(pkg): p.read_bytes() for p in pkg.rglob('*.py')}
        def fault(p):
            return 'is exported by no notebook' if p not in want else 'is not what its notebook exports: nbdev_export'
        return [f'craft_nb/{p} {fault(p)}' for p in sorted({*want, *have}) if want.get(p) != have.get(p)]


def readme():
    "README.md is what nbs/index.ipynb gives."
    run = subprocess.run([sys.executable, root/'tools/readme.py', '--check'], capture_output=True, text=True)
    return [run.stderr.strip()] if run.returncode else []


def pages():
    "The pages of names, settings and components are what the modules give."
    run = subprocess.run([sys.executable, root/'tools/pages.py', '--check'], capture_output=True, text=True)
    return [run.stderr.strip()] if run.returncode else []


def width():
    "Lines have at most 120 characters where tools/reflow.py can break them."
    run = subprocess.run([sys.executable, root/'tools/reflow.py', '--check'], capture_output=True, text=True)
    return run.stderr.strip().splitlines() if run.returncode else []


def imported(tree):
    "Modules of this package that a syntax tree imports anywhere, also inside functions; '' is the package itself."
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            base = (n.module or '') if n.level else n.module
            if not n.level and base.split('.')[0] != 'craft_nb': continue
            base = base if n.level else base.removeprefix('craft_nb').lstrip('.')
            yield from ((n.lineno, base.split('.')[0]) if base else (n.lineno, a.name) for a in n.names)
        if isinstance(n, ast.Import):
            ours = [a.name.split('.') for a in n.names if a.name.split('.')[0] == 'craft_nb']
            yield from ((n.lineno, x[1] if x[1:] else '') for x in ours)


def order():
    "A module imports only modules of lower-numbered notebooks, inside functions too: so there is no circle."
    number, faults = exported(), []
    for p in sorted(pkg.glob('*.py')):
        if p.stem not in number: continue
        for line, name in imported(ast.parse(p.read_text())):
            if name == '__version__': continue
            where = f'craft_nb/{p.name}:{line} (notebook {number[p.stem]}) imports {name or "craft_nb"}'
            if name not in number: faults.append(f'{where}, which no notebook exports')
            elif number[name] >= number[p.stem]: faults.append(f'{where} ({number[name]})')
    return faults


MOST = 20  # names a reader takes in at once


def public():
    """`__all__` of a module holds what a user calls, at most twenty names; what is for other modules only is
    `#| exporti`."""
    faults = []
    for p in sorted(pkg.glob('*.py')):
        for n in ast.parse(p.read_text()).body:
            if (isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__'
                and isinstance(n.value, ast.List) and len(n.value.elts) > MOST):
                faults.append(f'craft_nb/{p.name} has {len(n.value.elts)} public names: '
                              'mark cells that no user calls with #| exporti')
    return faults


ROOM = 500  # lines that say something


def rooms():
    "A module has at most 500 lines that are not empty: a room that one walks through."
    return [f'craft_nb/{p.name} has {n} lines: part it where its sections part' for p in sorted(pkg.glob('*.py'))
            if p.stem != '_modidx' and (n := sum(map(bool, map(str.strip, p.read_text().splitlines())))) > ROOM]


def names():
    "No undefined names, no name defined twice, no syntax errors."
    folders = [f for f in ('craft_nb', 'tests', 'tools', 'bench') if (root/f).exists()]
    ruff = 'ruff check -q --isolated --select F811,F821,F822,E9 --exclude _modidx.py --output-format concise'
    run = subprocess.run([sys.executable, '-m', *ruff.split(), *folders], cwd=root, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip().splitlines() if run.returncode else []


def python(code):
    run = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    return [f'{code.split(";")[0]}: {run.stderr.strip().splitlines()[-1]}'] if run.returncode else []


HEAVY = ('torch', 'transformers', 'accelerate', 'lerobot.policies.factory', 'lerobot.datasets',
         'lerobot.scripts.lerobot_train', 'matplotlib.pyplot', 'ipywidgets')
IMPORTS = """
import os
for m in {heavy}: __import__(m)
for m in {modules}:  # each in a process of its own, that finds other people's packages loaded and nothing of this one
    if not os.fork():
        try: __import__(f'craft_nb.{{m}}')
        except BaseException as e: os.write(1, f'fault import craft_nb.{{m}}: {{type(e).__name__}}: {{e}}\\n'.encode())
        os._exit(0)
    if os.wait()[1]: os.write(1, f'fault import craft_nb.{{m}}: the process died\\n'.encode())
"""

def importable():
    "Every module can be imported on its own."
    text = ''.join(p.read_text() for p in (root/'craft_nb').glob('*.py'))
    code = IMPORTS.format(heavy=[h for h in HEAVY if h.split('.')[0] in text], modules=list(exported()))
    run = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    return ([x.removeprefix('fault ') for x in run.stdout.splitlines() if x.startswith('fault ')]
            or (run.stderr.splitlines()[-1:] if run.returncode else []))


def light():
    "`import craft_nb` takes no lerobot, transformers, matplotlib or ipywidgets with it."
    return python(f'import craft_nb, sys; t = [m for m in {heavy} if m in sys.modules]; assert not t, '
                  f'f"it takes {{t}}"')


checks = clean, in_sync, readme, pages, width, rooms, order, public, names, importable, light


def main():
    only, bad = sys.argv[1:], 0
    for check in checks:
        if only and check.__name__ not in only: continue
        faults = check()
        print(f'{"fail" if faults else "ok":4} {check.__name__}: {" ".join(check.__doc__.split())}')
        for f in faults: print(f'     {f}')
        bad += bool(faults)
    sys.exit(1 if bad else 0)


if __name__ == '__main__': main()
