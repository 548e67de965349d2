"""Code in lines of at most 120 characters. `python tools/reflow.py [FILE ...]` breaks longer ones in the code cells of
notebooks and in bench, tests and tools, and leaves all others as they are; `--check` only says where. What it cannot
break stays, and is counted: comments that are documentation, JavaScript, words without a space. No program changes:
syntax trees are compared."""
import ast, inspect, io, keyword, re, sys, textwrap, tokenize
from functools import cache
from pathlib import Path
from typing import NamedTuple
from checks import notebooks, root
from execnb.nbio import read_nb, write_nb

WIDTH, LINE, KEPT = 120, 10, 6  # what a new line costs, and one where there was one: the cheapest way to break is taken
RANK = {w: i for i, ws in enumerate(('for async if else', 'and or', '== != < > <= >= in not is', '+ - | & ^',
                                     '* / // % @', '.')) for w in ws.split()}
HEADS = {*'if elif else for while with try except finally def class async'.split()}
LITERAL = re.compile(r'([rRfFbBuU]*)("|\')(?!\2\2)(.*)\2', re.S)
OP, NAME, STRING, COMMENT = tokenize.OP, tokenize.NAME, tokenize.STRING, tokenize.COMMENT


class Token(NamedTuple):
    kind: int
    s: str
    start: tuple
    end: tuple

    def opens(self): return self.kind == OP and self.s in '([{'
    def closes(self): return self.kind == OP and self.s in ')]}'


class Atom(NamedTuple):
    s: str
    gap: str = ''
    cost: float | None = None  # of a break before it; None: there cannot be one
    kept: bool = False         # there was one
    hard: bool = False         # and it stays
    hang: bool = False         # it is the first behind a bracket
    shut: bool = False         # a bracket that closes on a line of its own
    quote: tuple = ()          # prefix and quote, where the break would cut a string


def statements(text):
    "Tokens of each logical line and the comments in and behind it; f-strings whole."
    lines, out, inside = text.split('\n'), [], []
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type == tokenize.FSTRING_START: inside.append(t.start)
        elif t.type == tokenize.FSTRING_END:
            (a, x), (b, y) = inside.pop(), t.end
            s = lines[a - 1][x:y] if a == b else '\n'.join([lines[a - 1][x:], *lines[a:b - 1], lines[b - 1][:y]])
            if not inside: out.append(Token(STRING, s, (a, x), t.end))
        elif inside or t.type in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER): continue
        elif t.type == tokenize.NEWLINE:
            yield out
            out = []
        elif out or t.type != COMMENT: out.append(Token(t.type, t.string, t.start, t.end))


def depths(toks):
    "How many brackets are open at each; those of a pair count as outside of it."
    d = 0
    for t in toks:
        d -= t.closes()
        yield d
        d += t.opens()


def closing(toks, i):
    "Where the bracket that opens at `i` closes."
    return i + 1 + next(k for k, d in enumerate(depths(toks[i + 1:])) if d < 0)


def joined(toks):
    "Neighbouring strings of one kind as one, to be cut anew."
    out = []
    for t in toks:
        a, b = (LITERAL.fullmatch(x.s) if x.kind == STRING else None for x in (out[-1] if out else t, t))
        plain = a and b and [x[3] for x in (a, b) if not x[1]]
        if (out and a and b and a[2] == b[2]
            and (a[1] == b[1] or {a[1], b[1]} == {'', 'f'} and not re.search('[{}]', plain[0]))):
            out[-1] = Token(STRING, f'{max(a[1], b[1])}{a[2]}{a[3]}{b[3]}{a[2]}', out[-1].start, t.end)
        else: out.append(t)
    return out


def words(s, cost):
    "A string as atoms of some words, none of which ends inside {…}."
    if not (m := LITERAL.fullmatch(s)): return [Atom(s)]
    prefix, quote, body = m.groups()
    at, deep, i = [0], 0, 0
    while i < len(body):
        twice = 'f' in prefix.lower() and not deep and body[i:i + 2] in ('{{', '}}')
        if 'f' in prefix.lower() and not twice: deep += (body[i] == '{') - (body[i] == '}')
        i += 1 + (twice or body[i] == '\\')
        if body[i - 1] == ' ' and not deep and body[i:i + 1] != ' ' and min(i, len(body) - i) > 12: at.append(i)
    parts = [body[a:b] for a, b in zip(at, [*at[1:], len(body)])]
    parts[0] = prefix + quote + parts[0]
    parts[-1] += quote
    return [Atom(p, '', cost - (parts[i - 1][-2:-1] in ',;:.') if i else None, quote=(prefix, quote) * bool(i))
            for i, p in enumerate(parts)]


def rows(toks):
    "Starts of tokens that begin a row of a table: a bracket of three or more items, each of which begins a line."
    begun, stack = set(), []
    for p, t in zip(toks, toks[1:]):
        new = p.end[0] < t.start[0]
        if p.opens(): stack.append([])
        if t.closes(): begun |= {*found} if len(found := stack.pop()) > 1 and None not in found else set()
        elif p.s == ',' and stack: stack[-1].append(t.start if new else None)
    return begun


def is_value(t):
    return t.kind in (tokenize.NUMBER, STRING) or t.closes() or t.kind == NAME and not keyword.iskeyword(t.s)


def items(toks):
    "Of each token, the ranks of the operators beside it between commas, and how many such items its bracket has."
    out, stack, loops = [((), 1)] * len(toks), [[[]]], [toks[0].s == 'for']
    def end(group):
        for item in group:
            ranks = {RANK[toks[i].s] for i in item
                     if i and toks[i].s in RANK and toks[i].s != '.' and (is_value(toks[i - 1]) or toks[i].s == 'not')}
            for i in item: out[i] = ranks, len(group)
    for i, t in enumerate(toks):
        if t.closes(): end(stack.pop()), loops.pop()
        if t.s == ',' and t.kind == OP: stack[-1].append([])
        elif len(stack) == 1 and (t.s == 'in' and loops[-1] or t.kind == OP and re.fullmatch(r'[^=!<>]{0,2}=', t.s)):
            end(stack.pop()), stack.append([[]])
        elif not (t.s == 'in' and loops[-1]): stack[-1][-1].append(i)
        loops[-1] = (loops[-1] or t.s == 'for') and t.s != 'in'
        if t.opens(): stack.append([[]]), loops.append(False)
    end(stack.pop())
    return out


def atoms(toks):
    """What a statement is made of, with what a break before each would cost: more in inner brackets, and between closer
    parts."""
    out, stack, table, beside = [], [], rows(toks), items(toks)
    for i, t in enumerate(toks):
        p, shut, (ranks, many) = toks[i - 1], False, beside[i]
        new = i and p.end[0] < t.start[0]
        if t.closes(): shut = stack.pop()['hung'] and new
        here = stack[-1] if stack else None
        first = i and (p.opens() or p.kind == COMMENT and toks[i - 2].opens()) and t.kind != COMMENT and not t.closes()
        cost = None
        if here and not t.closes() and t.kind != COMMENT and not here['lambda'] and not here['for']:
            if first or p.s == ',': cost = 0
            elif p.kind == t.kind == STRING: cost = 1
            elif t.s == 'not' and toks[i + 1].s != 'in' or t.s == '.' and not p.closes(): pass
            elif is_value(p) and t.kind in (OP, NAME) and t.s in RANK:
                cost = 3 + 6 * sum(r < RANK[t.s] for r in ranks) + 3 * (many > 1)
            if cost is not None: cost += here['price']
        if here:
            here['for'], here['lambda'] = ((here['for'] or t.s == 'for') and t.s != 'in',
                                           (here['lambda'] or t.s == 'lambda') and t.s != ':')
        hard = i and (t.start in table or p.kind == COMMENT or new and (t.kind == COMMENT or first) or shut)
        gap = ('' if not i else '  ' if t.kind == COMMENT else ' ' * (t.start[1] - p.end[1]) if not new else ''
               if first or t.closes() or t.s == '.' else ' ')
        parts = (words(t.s, 3 + here['price'] + 6 * bool(ranks) + 6 * (many > 1) + 10 * here['strings'])
                 if here and t.kind == STRING else [Atom(t.s)])
        out += [parts[0]._replace(gap=gap, cost=0 if hard else cost, kept=new, hard=hard, hang=first, shut=shut),
                *parts[1:]]
        if t.opens():
            inside, after = toks[i + 1:closing(toks, i)], toks[i + 1] if toks[i + 1].kind != COMMENT else toks[i + 2]
            index, call = t.s == '[' and i and is_value(p) and not gap, t.s == '(' and i and is_value(p)
            price = (here['price'] + 6 if here else 6 * (many > 1)) + 6 * bool(ranks) + 6 * index
            strings = not call and sum(x.kind == STRING and not d for x, d in zip(inside, depths(inside))) > 1
            stack.append({'for': False, 'lambda': False, 'price': price, 'strings': strings,
                          'hung': after.start[0] > t.end[0]})
    return out


def layout(pieces, indent, more):
    "(cost, lines) of the cheapest way to break; what hangs stands `more` farther in."
    @cache
    def best(i, columns):  # the line that begins with piece i; columns: where lines in the open brackets begin
        start, stack, ways = columns[-1], list(columns), {}
        x = start + len(''.join(pieces[i].quote)) - len(pieces[i].gap)
        for j in range(i, len(pieces) + 1):
            a = pieces[j] if j < len(pieces) else None
            if j > i and (not a or a.cost is not None):
                width = x + len(a.quote[1] if a and a.quote else '')
                over, deep = max(0, width - WIDTH), stack[-1] > WIDTH - 50
                if over and a and ways: break
                own = 0 if not a or a.hard else a.cost + (KEPT if a.kept else LINE)
                if own and a.hang: own += 0 if a.kept else 7 if deep else 10
                elif own: own += 5 * deep
                to = ([*stack[:-1], start + more] if a and a.hang else [*stack[:-1], stack[-1] - more] if a and a.shut
                      else stack)
                ways[own if a else -1] = (own + 9 * (over > 0) * 9 + 5 * over
                                          + (3 * max(0, WIDTH - width) / WIDTH if own else 0), j, tuple(to))
                if a and a.hard: break
            if a:
                x += len(a.gap) + len(a.s)
                if a.s in ('(', '[', '{'): stack.append(x)
                if a.s in (')', ']', '}'): stack.pop()
        found = 9e9, ()
        for own, j, to in sorted(ways.values())[:6]:  # of breaks that cost the same, the last: lines are full
            below, rest = best(j, to) if j < len(pieces) else (0, ())
            if own + below < found[0]: found = own + below, ((i, j, start), *rest)
        return found

    cost, spans = best(0, (indent,))
    lines = []
    for i, j, start in spans:
        s = ''.join(a.gap * (k > 0) + a.s for k, a in enumerate(pieces[i:j]))
        if pieces[i].quote: s = ''.join(pieces[i].quote) + s
        if j < len(pieces) and pieces[j].quote: s += pieces[j].quote[1]
        if ((pieces[i].quote or j < len(pieces) and pieces[j].quote)
            and (m := re.fullmatch(r'f("[^"{}]*"|\'[^\'{}]*\')([],;: )}]*)', s))):
            s = m[1] + m[2]
        lines.append(' ' * start + s)
    return cost, lines


def wrapped(toks):
    "The tokens with their value in brackets, where that is another way to break: (tokens, …) of each way."
    yield toks
    outer = [i for i, d in enumerate(depths(toks)) if not d]
    def at(*what): return [i for i in outer if toks[i].s in what]
    end, head = len(toks) - (toks[-1].s == ':'), toks[0].s
    spans, first = [], min(at('lambda'), default=end)
    if head in ('return', 'if', 'elif', 'while', 'with'): spans = [(1, end)]
    elif head == 'assert': spans = [(1, c), (c + 1, end)] if (c := max(at(','), default=0)) else [(1, end)]
    elif head == 'for': spans = [(at('in')[0] + 1, end)]
    elif head == 'from': spans = [(at('import')[0] + 1, end)]
    elif (head not in HEADS
          and (eq := [i for i in outer if i < first and re.fullmatch(r'(\*\*|//|<<|>>|[-+*/%@&|^])?=', toks[i].s)])):
        spans = [(eq[-1] + 1, end)]
    if not spans and head not in HEADS and not keyword.iskeyword(head): spans = [(0, end)]
    for a, b in spans:
        if a >= b or toks[a].opens() and closing(toks, a) == b - 1: continue
        s, e = toks[a].start, toks[b - 1].end
        yield [*toks[:a], Token(OP, '(', s, s), *toks[a:b], Token(OP, ')', e, e), *toks[b:]]


def shifted(lines, first, toks, indent):
    "The part of a statement that `toks` are, at `indent`."
    (a, x), (b, y) = toks[0].start, toks[-1].end
    part = [l for l in lines[a - first:b - first + 1]]
    part[-1] = part[-1][:y]
    return [' ' * indent + part[0][x:],
            *(' ' * max(0, len(l) - len(l.lstrip()) + indent - x) + l.lstrip() for l in part[1:])]


def fill(text, indent):
    "Words in lines, none broken inside of `…`."
    text = re.sub('`[^`]*`', lambda m: m[0].replace(' ', '\0'), text)
    found = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
                          break_on_hyphens=False)
    return [x.replace('\0', ' ') for x in found]


def docstring(lines):
    "A docstring in lines that fit; of a paragraph only what follows a line that does not."
    pad, s = ' ' * (len(lines[0]) - len(lines[0].lstrip())), lines[0].strip()
    m = re.fullmatch(r'([rR]?)("""|"|\')((?s:.*))\2', '\n'.join([s, *lines[1:]]))
    if not m or len(m[2]) == 1 and ('"' in m[3] or '\\' in m[3]): return lines
    out, todo = [], f'{pad}{m[1]}"""{m[3]}"""'.split('\n')
    while todo:
        line = todo.pop(0)
        here = re.match(r' *', line)[0]
        if len(line) > WIDTH and not re.search(r'\S  +\S|^ *[|`$>]', line):
            line, *over = fill(line.strip(), here)
            over = ' '.join(x.strip() for x in over)
            if over and todo and re.match(here + r'[^\s|`$>*-]', todo[0]) and todo[0].strip() != '"""':
                todo[0] = f'{here}{over} {todo[0].strip()}'
            elif over: todo.insert(0, here + over)
        out.append(line)
    return out


def too_wide(lines): return sum(max(0, len(l) - WIDTH) for l in lines)


def comment(s, pad): return fill(s[1:].strip(), pad + '# ')


def mended(toks, lines, doc):
    "The lines of a statement, with one thing done about those that are too long."
    first, indent, head = toks[0].start[0], toks[0].start[1], next(t.s for t in toks if t.s != 'async')
    if len(toks) == 1 and doc: return docstring(lines)
    if any('\n' in t.s for t in toks): return lines
    code = toks[:-1] if toks[-1].kind == COMMENT else toks
    outer = [i for i, d in enumerate(depths(code)) if not d]
    colon = next((i for i in outer if code[i].s == ':'), None) if head in HEADS else None
    body = colon is not None and colon + 1 < len(code)
    field = len(code) > 2 and code[1].s == ':' and code[0].kind == NAME and head not in HEADS
    tells = head in ('def', 'class') and not body or field or head in ('else', 'elif', 'except', 'finally')
    bare = lines[:]  # without the comments that are too wide
    for t in (t for t in toks if t.kind == COMMENT and len(lines[t.start[0] - first]) > WIDTH):
        k = t.start[0] - first
        bare[k] = lines[k][:t.start[1]].rstrip()
        if not bare[k]: return [*lines[:k], *comment(t.s, lines[k][:t.start[1]]), *lines[k + 1:]]
        if lines[k] != (tight := f'{bare[k]}  {t.s}'): return [*lines[:k], tight, *lines[k + 1:]]
        at = 0 if t is toks[-1] else k
        if not tells:
            return [*lines[:at], *comment(t.s, re.match(' *', lines[at])[0]), *lines[at:k], bare[k], *lines[k + 1:]]
    if not too_wide(bare) or field and len(code) < len(toks): return lines
    ends = [i for i in outer if code[i].s == ';' and i + 1 < len(code)]
    if body or ends:
        cuts = ([0, *[colon + 1] * body, *(i + 1 for i in ends), len(toks)] if body
                else [0, *(i + 1 for i in ends), len(toks)])
        parts = [toks[a:b - (b - 1 in ends)] for a, b in zip(cuts, cuts[1:])]
        return [l for i, part in enumerate(parts) for l in shifted(lines, first, part, indent + 4 * (body and i > 0))]
    more = 8 if head in HEADS and not (head == 'def' and lines[-1].strip().startswith(')')) else 4
    ways = [layout(atoms(way), indent, more) for way in wrapped(joined(code))]
    new = min(ways, key=lambda w: w[0] + 2 * (w is not ways[0]))[1]
    if len(code) < len(toks): new[-1] += f'  {toks[-1].s}'
    return new if too_wide(new) < too_wide(lines) else lines


def once(text):
    lines, tree = text.split('\n'), ast.parse(text)
    docs = {n.body[0].lineno for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)}
    for toks in reversed([*statements(text)]):
        a, b = toks[0].start[0] - 1, toks[-1].end[0]
        if max(map(len, lines[a:b])) > WIDTH: lines[a:b] = mended(toks, lines[a:b], a + 1 in docs)
    return '\n'.join(lines)


def same(text):
    "A syntax tree as text, docstrings but for white space."
    tree = ast.parse(text)
    for n in ast.walk(tree):
        if isinstance(n, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(n):
            n.body[0].value.value = ' '.join(inspect.cleandoc(n.body[0].value.value).split())
    return ast.dump(tree)


def reflow(text):
    "The text with its lines broken; as it is where that cannot be done."
    if max(map(len, text.split('\n'))) <= WIDTH: return text
    try: want = same(text)
    except SyntaxError: return text
    old, new = '', text
    while new != old: old, new = new, once(new)
    if same(new) != want: raise SystemExit(f'tools/reflow.py would change the program, so it needs mending:\n{text}')
    return new


def texts(path):
    "(cells or None, their texts) of a file."
    if path.suffix != '.ipynb': return None, [path.read_text()]
    nb = read_nb(path)
    return nb, [c.source for c in nb.cells if c.cell_type == 'code']


def files(): return [*notebooks(), *(p for d in ('bench', 'tests', 'tools') for p in sorted((root/d).glob('*.py')))]


def stale():
    "Files that `main` would change."
    return [p for p in files() if any(reflow(x) != x for x in texts(p)[1])]


def main():
    if '--check' in sys.argv:
        if found := stale():
            raise SystemExit('\n'.join(f'{p.relative_to(root)}: python tools/reflow.py' for p in found))
        return
    left = 0
    for p in [Path(a).resolve() for a in sys.argv[1:]] or files():
        nb, old = texts(p)
        new = [reflow(x) for x in old]
        left += sum(len(l) > WIDTH for x in new for l in x.split('\n'))
        if new == old: continue
        print(f'{p.name}: {sum(a != b for a, b in zip(old, new))} changed')
        if not nb: p.write_text(new[0])
        else:
            for c, x in zip((c for c in nb.cells if c.cell_type == 'code'), new): c.source = x
            write_nb(nb, p)
    print(f'{left} lines above {WIDTH} characters are left')


if __name__ == '__main__': main()
