"""Build the site into _docs: notebooks -> _proc (nbdev), then Quarto when it is installed, else smalldocs."""
import re, shutil, subprocess, sys
from pathlib import Path

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


def main():
    quiet = '--quiet' in sys.argv
    from nbdev.serve import proc_nbs
    shutil.rmtree(root/'_proc', ignore_errors=True)
    proc = Path(proc_nbs(n_workers=2, force=True))
    if (proc/'_quarto.yml').is_symlink(): raise SystemExit('_proc/_quarto.yml is a link; expected nbdev to copy it')
    tool = 'quarto render --no-cache' if shutil.which('quarto') else 'smalldocs render .'
    subprocess.run(tool.split() + ['--quiet']*quiet, cwd=proc, check=True)
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
