"""Build the site into _docs: notebooks -> _proc (nbdev's processors), then Quarto when it is installed, else
smalldocs."""
import re, shutil, subprocess, sys
from pathlib import Path
from checks import without_widgets
from execnb.nbio import read_nb, write_nb
from nbdev.processors import FilterDefaults, exec_show_docs

root = Path(__file__).resolve().parent.parent
math = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
remote = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="https?://[^"]*"[^>]*>(?:</script>)?')


def mathml(page):
    "Formulas as MathML, which browsers draw by themselves, in place of a script from a network."
    from html import unescape
    from latex2mathml.converter import convert
    def one(m): return convert(unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    return math.sub(one, page)


def offline(page):
    "Drop what a page would fetch from elsewhere (scripts, styles), and the inline script that waits for it."
    page = remote.sub(lambda m: '' if 'rel="canonical"' not in m[0] else m[0], page)
    return re.sub(r'<script\b[^>]*>[^<]*renderMathInElement[^<]*</script>', '', page)


def show(sym, **kw):
    "nbdev's `show_doc`; a class whose inherited annotations cannot be resolved here gets its name and docstring."
    from IPython.display import Markdown
    from nbdev.showdoc import show_doc
    try: return show_doc(sym, **kw)
    except NameError: return Markdown(f"### {sym.__name__}\n\n{sym.__doc__ or ''}")


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
    for p in pages: p.write_text(offline(mathml(p.read_text())))
    want = {p.relative_to(root/'nbs').with_suffix('.html') for p in (root/'nbs').rglob('*.ipynb')
            if not any(x[0] in '._' for x in p.relative_to(root/'nbs').parts)}
    lost = sorted(str(w) for w in want if not (root/'_docs'/w).exists())
    if lost: raise SystemExit(f'the site lacks {", ".join(lost)}')
    print(f'site: {len(pages)} pages in _docs, open _docs/index.html')


if __name__ == '__main__': main()
