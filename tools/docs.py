"""Build the site into _docs: notebooks -> _proc (nbdev's processors), then Quarto when it is installed, else
smalldocs."""
import ast, inspect, json, re, shutil, subprocess, sys
from pathlib import Path
from checks import without_widgets
from execnb.nbio import read_nb, write_nb
from nbdev.processors import FilterDefaults, exec_show_docs

root = Path(__file__).resolve().parent.parent
math = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
doclink = re.compile(r'<a href="https://[\w.-]+/craft_nb/(\w+)\.html#[^"]*"[^>]*><code[^>]*>([^<]*)</code></a>')
in_code = re.compile(r'\[(`[^`\]]+`)\]\(https://[\w.-]+/craft_nb/\w+\.html#[^)]*\)')
remote = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="https?://[^"]*"[^>]*>(?:</script>)?')


def mathml(page):
    "Formulas as MathML, which browsers draw by themselves, in place of a script from a network."
    from html import unescape
    from latex2mathml.converter import convert
    def one(m): return convert(unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    return math.sub(one, page)


def shelves():
    "{module: (its page, its names)} of the notebooks that export."
    out = {}
    for p in (root/'nbs').glob('[0-9]*.ipynb'):
        cells = [''.join(c['source']) for c in json.loads(p.read_text())['cells']]
        name = next((m[1] for c in cells if (m := re.match(r'#\|\s*default_exp\s+(\S+)', c))), None)
        if name:
            body = ast.parse((root/f'craft_nb/{name}.py').read_text()).body
            out[name] = f'{p.stem}.html', {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return out


def inside(path, page, modules, ids):
    "Links that nbdev made from names lead to this site's own pages; a plain word that is also a name has none."
    own = next((m for m, (p, _) in modules.items() if p == path.name and path.parent == root/'_docs'), None)
    def one(m):
        name = m[2].rstrip('()').split('.')[0]
        if not re.search('[A-Z_]', name) or m[1] not in modules: return f'<code>{m[2]}</code>'
        to = modules[own if own and name in modules[own][1] else m[1]][0]
        mark = next((f'#{x}' for x in (m[2].rstrip('()').lower(), name.lower()) if x in ids[to]), '')
        return f'<a href="{"../"*len(path.relative_to(root/"_docs").parts[1:])}{to}{mark}"><code>{m[2]}</code></a>'
    return in_code.sub(r'\1', doclink.sub(one, page))


def offline(page):
    "Drop what a page would fetch from elsewhere (scripts, styles), and the inline script that waits for it."
    page = remote.sub(lambda m: '' if 'rel="canonical"' not in m[0] else m[0], page)
    return re.sub(r'<script\b[^>]*>[^<]*renderMathInElement[^<]*</script>', '', page)


def show(sym, **kw):
    """nbdev's `show_doc`, with the source to unfold in place of a link to a repository; a class whose inherited
    annotations cannot be resolved here gets its name and docstring."""
    from IPython.display import Markdown
    from nbdev.showdoc import show_doc
    try: said = re.sub(r'\[source\]\(.*\)\{.*\}\n\n', '', show_doc(sym, **kw)._repr_markdown_())
    except NameError: said = f"### {sym.__name__}\n\n{sym.__doc__ or ''}"
    try: code = inspect.getsource(sym).rstrip()
    except (TypeError, OSError): return Markdown(said)
    return Markdown(f'{said}\n\n<details class="source"><summary>source</summary>\n\n'
                    f'````python\n{code}\n````\n\n</details>')


class ShowDocs(exec_show_docs):
    "Run `show_doc` cells only, among the names of the exported module: all other cells have their outputs saved."
    def begin(self):
        super().begin()
        self.k.user_ns['show_doc'] = show
        for c in self.nb.cells:
            for name in (c.directives_ or {}).get('default_exp', []): self.k.run_cell(f'from craft_nb.{name} import *')

    def __call__(self, cell):
        if not self.nb.has_docs_ or cell.cell_type != 'code' or not re.search(r'(?m)^show_doc', cell.source or ''):
            return
        self.k.cell(cell)
        if self.k.exc: raise RuntimeError(f'{self.nb.path_}: {cell.source}') from self.k.exc

    def end(self): pass


class Pages(FilterDefaults):
    def base_procs(self): return [ShowDocs if p is exec_show_docs else p for p in super().base_procs()]


def process(proc):
    "Notebooks as pages, and what goes with them, from nbs to `proc`, in one process."
    for src in sorted((root/'nbs').rglob('*')):
        inside = src.relative_to(root/'nbs')
        if not src.is_file() or any(x[0] in '._' for x in inside.parts if x != '_quarto.yml'): continue
        dst = proc/inside
        dst.parent.mkdir(parents=True, exist_ok=True)
        if src.suffix != '.ipynb': shutil.copy(src, dst)
        else:
            if n := without_widgets(nb := read_nb(src)):
                print(f'{inside}: {n} saved widgets are left out of its page; '
                      'tools/prepare.py takes them out of the notebook')
            Pages()(nb)
            write_nb(nb, dst)


def main():
    quiet, proc = '--quiet' in sys.argv, root/'_proc'
    shutil.rmtree(proc, ignore_errors=True)
    process(proc)
    smalldocs = [Path(sys.executable).parent/'smalldocs', 'render', '.']
    tool = ['quarto', 'render', '--no-cache'] if shutil.which('quarto') else smalldocs
    subprocess.run(tool + ['--quiet']*quiet, cwd=proc, check=True)
    shutil.rmtree(root/'_docs', ignore_errors=True)
    shutil.move(proc/'_docs', root/'_docs')
    pages = sorted((root/'_docs').rglob('*.html'))
    texts, modules = {p: p.read_text() for p in pages}, shelves()
    ids = {p.name: set(re.findall(r'\bid="([^"]+)"', t)) for p, t in texts.items() if p.parent == root/'_docs'}
    for p, t in texts.items(): p.write_text(offline(mathml(inside(p, t, modules, ids))))
    for p in (root/'_docs').rglob('*.css'):
        p.write_text(re.sub(r'@import url\(["\']?https?:[^)]*\);', '', p.read_text()))
    want = {p.relative_to(root/'nbs').with_suffix('.html') for p in (root/'nbs').rglob('*.ipynb')
            if not any(x[0] in '._' for x in p.relative_to(root/'nbs').parts)}
    lost = sorted(str(w) for w in want if not (root/'_docs'/w).exists())
    if lost: raise SystemExit(f'the site lacks {", ".join(lost)}')
    named = (root/'nbs/sidebar.yml').read_text()
    if away := sorted(p.name for d in ('guides', 'tutorials') for p in (root/'nbs'/d).glob('[!._]*.*')
                      if f'{d}/{p.name}' not in named):
        raise SystemExit(f'nbs/sidebar.yml does not name {", ".join(away)}')
    print(f'site: {len(pages)} pages in _docs, open _docs/index.html')


if __name__ == '__main__': main()
