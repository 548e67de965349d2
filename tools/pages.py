"""Pages that are made from the modules: nbs/api.md (twenty names), nbs/settings.md (every `--craft.*` flag) and
nbs/components.md (every notebook). `python tools/pages.py` writes them, `--check` says whether they are in step."""
import ast, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
NAMES = dict(  # what a person needs, by what they do
    Settings='config.CraftConfig', Caches='anchors.AnchorCacheDataset anchors.AnchorWriter anchors.verify_cache '
    'builder.build_anchor_cache tools.merge_caches cards.cache_card',
    Policies='policies.adapter_for policies.AnchorAdapter losses.View losses.register_view', Training='surgery.Surgery '
    'dual.Dual methods.register_method trainer.CraftTrainer trainer.Callback lerobot.make_trainer lerobot.train',
    Looking='monitor.CraftMonitor report.Report')


def source(c): return ''.join(c['source'])


def shelf():
    "{module: (notebook, its sentence, {public name: what it is})}, in the order of the notebooks."
    out = {}
    for p in sorted((root/'nbs').glob('[0-9]*.ipynb')):
        cells = json.loads(p.read_text())['cells']
        name = next((m[1] for c in cells if (m := re.match(r'#\|\s*default_exp\s+(\S+)', source(c)))), None)
        if not name: continue
        said = next((m[1] for c in cells
                     if c['cell_type'] == 'markdown' and (m := re.match(r'# .*\n+>\s*(.*)', source(c)))), '')
        known, shown = {}, []
        for n in ast.parse((root/'craft_nb'/f'{name}.py').read_text()).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                known[n.name] = ' '.join((ast.get_docstring(n) or '').split('\n\n')[0].split())
            elif isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__':
                shown = [e.value for e in n.value.elts] if isinstance(n.value, ast.List) else []
            elif isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name):
                known.setdefault(n.targets[0].id, 'A table to look into or to extend.')
        out[name] = p.name, said, {k: known.get(k, '') for k in shown}
    return out


def home(modules, door, name):
    "The module that holds what `door` hands on. Raises if there is none, so that the page cannot name what is gone."
    for m in (door, *modules):
        if (name in modules[m][2]
            and (m == door or door in ('anchors', 'lerobot', 'report', 'trainer', 'policies', 'monitor'))):
            return m
    raise SystemExit(f'tools/pages.py: no module has the public name {name!r} ({door}): mend NAMES')


def sentence(text):
    return (re.match(r'(.*?[.!?:])(\s|$)', text + ' ')[1].rstrip(':') if re.match(r'.*?[.!?:](\s|$)', text + ' ')
            else text)


def api(modules):
    rows = ['# API in one screen', '',
            'The names a person needs. Each module has at most twenty public ones; its page says the rest.', '',
            '| for | name | what it is |', '|---|---|---|']
    for part, names in NAMES.items():
        for i, (door, name) in enumerate(x.split('.') for x in names.split()):
            notebook, _, public = modules[home(modules, door, name)]
            rows.append(f'| {part if not i else ""} | [`craft_nb.{door}.{name}`]({notebook}) | '
                        f'{sentence(public[name]).replace("|", "/")} |')
    return '\n'.join(rows) + '\n'


def settings(_):
    "Fields, defaults and comments of `CraftConfig` and its data, as they stand in the source."
    text = (root/'craft_nb'/'config.py').read_text()
    lines, rows = text.splitlines(), ['# Settings', '', 'Every flag of CRaFT with its default, '
                                      'for `craft-train` and `craft-check`, and as a field of `CraftConfig`.']
    classes = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    for cls in (classes[n] for n in ('CraftConfig', 'AnchorData')):
        flag = '--craft.' if cls.name == 'CraftConfig' else '--craft.anchor_dataset.'
        rows += ['', f'## {cls.name}', '', ast.get_docstring(cls).split('\n')[0], '',
                 '| flag | default | what it does |', '|---|---|---|']
        for f in (n for n in cls.body if isinstance(n, ast.AnnAssign)):
            said = lines[f.end_lineno - 1][f.end_col_offset:].partition('#')[2].strip().replace('|', '\\|')
            default = ast.unparse(f.value)
            if default.startswith('field('):
                default, said = 'see AnchorData', said or 'frames that become anchors before training starts'
            rows.append(f'| `{flag}{f.target.id}` | `{default}` | {said} |')
    return '\n'.join(rows) + '\n'


def components(modules):
    rows = ['# Components', '', 'One notebook, one module: each explains its part, shows it and tests it. '
            'A module imports only what stands above it.', '', '| module | holds |', '|---|---|']
    return '\n'.join(
        rows + [f'| [`craft_nb.{m}`]({notebook}) | {said} |' for m, (notebook, said, _) in modules.items()]) + '\n'


def stale():
    "{page: its text} of those that there are and that are not what the modules give."
    modules, there = shelf(), [f for f in (api, settings, components) if (root/f'nbs/{f.__name__}.md').exists()]
    made = {root/f'nbs/{f.__name__}.md': f(modules) for f in there}
    return {k: v for k, v in made.items() if k.read_text() != v}


def main():
    found = stale()
    if '--check' in sys.argv and found:
        raise SystemExit(f'{", ".join(k.name for k in found)} not in step with the modules: run python tools/pages.py')
    for k, v in found.items(): k.write_text(v)


if __name__ == '__main__': main()
