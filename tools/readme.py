"""README.md from nbs/index.ipynb: Markdown cells as they are, code in fences, text outputs below, pictures beside."""
import base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
hidden = re.compile(r'(?m)^#\|\s*(hide|default_exp|export|exporti|echo: *false)\b')


def join(x): return x if isinstance(x, str) else ''.join(x)


def fence(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'


def convert(nb, pictures='README_files'):
    "Markdown of a notebook, and the PNG files it points to as {path: bytes}."
    parts, files = ['<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->'], {}
    for cell in nb['cells']:
        src = join(cell['source']).strip()
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\((?=(images|guides|tutorials)/|\w+\.(ipynb|md)\))', r'](nbs/', src))
        if cell['cell_type'] != 'code' or re.search(r'(?m)^#\|\s*hide\b', src): continue
        if not hidden.search(src): parts.append(fence(re.sub(r'(?m)^#\|.*\n?', '', src), 'python'))
        for out in cell['outputs']:
            data = out.get('data', {})
            if 'text' in out: parts.append(fence(join(out['text'])))
            elif 'image/png' in data:
                name = f'{pictures}/figure-{len(files) + 1}.png'
                files[name] = base64.b64decode(join(data['image/png']))
                parts.append(f'![]({name})')
            elif 'text/markdown' in data: parts.append(join(data['text/markdown']).strip())
            elif 'text/plain' in data: parts.append(fence(join(data['text/plain'])))
    return '\n\n'.join(p for p in parts if p) + '\n', files


def main():
    text, files = convert(json.loads((root/'nbs/index.ipynb').read_text()))
    want = {'README.md': text.encode(), **files}
    have = {p.relative_to(root).as_posix() for p in (root/'README_files').glob('*')}
    stale = [k for k, v in want.items() if not (root/k).exists() or (root/k).read_bytes() != v]
    stale += sorted(have - set(want))
    if '--check' in sys.argv:
        if stale: sys.exit(f'not what nbs/index.ipynb gives: {", ".join(stale)}. Run: make readme')
        return
    for k in have - set(want): (root/k).unlink()
    for k, v in want.items():
        (root/k).parent.mkdir(exist_ok=True)
        (root/k).write_bytes(v)


if __name__ == '__main__': main()
