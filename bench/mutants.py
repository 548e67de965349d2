"""Do the tests bite? Change one operator or constant of an exported cell, run what tests it, count what goes unnoticed.

    python bench/mutants.py [MODULE …] --n=60 --seed=1     → outputs/bench/mutants.json

A notebook runs once for all its mutants: before a changed cell the process forks, and the child runs the mutant and the
cells after it. What survives there meets the tests and the notebooks above it that `TESTS` names, in a copy of the
package (`--tests=false`: the notebook alone). Left alone: messages (raised and f-strings), defaults of arguments,
annotated fields, -1, and examples."""
import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # of a door: what stands above each, then the tests of all
    "05_anchors test_anchors test_anchor_faults": dict(files="04b_format 04c_writing 04d_reading",
                                                       format="04c_writing 04d_reading", writing="04d_reading",
                                                       reading="", anchors=""),
    "06_policies test_policies test_pi0_fast": dict(draws="05d_tokens 05e_answers", tokens="", answers="", policies=""),
    "08_trainer test_faults test_memory test_resume": dict(control="", passes="07d_retention", step="07d_retention",
                                                           retention="07e_heldout 07f_memory", heldout="", memory="",
                                                           trainer=""),
    "09_monitor test_monitor": dict(records="08e_figures", drawing="08e_figures", figures="", monitor=""),
    "11f_report test_craft_report": dict(runs="10m_judgement", judgement="", charts="", report="")}
TESTS = dict(features="test_pi0_fast", losses="test_pi0_fast", surgery="test_surgery", dual="test_dual",
             **{m: f"{above} {tests}" for tests, rooms in ROOMS.items() for m, above in rooms.items()})
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
         ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And}


def sites(tree: ast.AST) -> list:
    "(node, field, new value) of every change that can be made."
    if (isinstance(tree, (ast.Raise, ast.JoinedStr, ast.arguments, ast.AnnAssign)) or getattr(tree, "name", None)
        and str(tree.name).lower().startswith("example")):
        return []
    found, x = [s for child in ast.iter_child_nodes(tree) for s in sites(child)], tree
    if isinstance(x, ast.BinOp) and isinstance(x.left, ast.Constant) and isinstance(x.left.value, str): return found
    if isinstance(x, (ast.BinOp, ast.BoolOp)) and type(x.op) in OTHER: found.append((x, "op", OTHER[type(x.op)]()))
    if isinstance(x, ast.Compare) and type(x.ops[0]) in OTHER:
        found.append((x, "ops", [OTHER[type(x.ops[0])](), *x.ops[1:]]))
    if isinstance(x, ast.Constant) and type(x.value) in (int, float) and x.value != -1:
        found.append((x, "value", x.value + 1))
    return found


def mutant(source: str, k: int) -> tuple[str, str]:
    "The `k`-th mutant of a cell, and what it changes."
    node, field, new = sites(tree := ast.parse(source))[k]
    before, line = ast.unparse(node), source.splitlines()[node.lineno - 1].strip()
    setattr(node, field, new)
    return ast.unparse(tree), f"{before} → {ast.unparse(node)} in: {line}"


def flags(cell) -> set:
    return {l[2:].split()[0].strip(":") for l in cell.source.splitlines() if l.startswith("#|") and l[2:].strip()}
def exported(cell) -> bool: return cell.cell_type == "code" and any(f.startswith("export") for f in flags(cell))


def notebook(module: str):
    "Path and cells of the notebook that exports `module`."
    from execnb.nbio import read_nb
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = read_nb(path).cells
        if any(c.source.strip() == f"#| default_exp {module}" for c in cells): return path, cells
    raise SystemExit(f"no notebook exports {module}: known are {', '.join(TESTS)}")


def survives(work, limit: float) -> bool:
    "Did `work` come to its end in a fork of this process, within `limit` seconds?"
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, of forks with threads
        pid = os.fork()
    if not pid:
        os.setsid()
        for fd in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    end = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end: time.sleep(.05)
    try: os.killpg(pid, signal.SIGKILL)  # the child, and what it left behind
    except ProcessLookupError: pass
    return (done if done[0] else os.waitpid(pid, 0))[1] == 0


def in_notebook(path: Path, cells: list, picked: list[tuple[int, int]], limit: float) -> list[tuple[int, int]]:
    "Which of the mutants (cell, site) the notebook does not notice; unchanged it must pass, in a fork too."
    from execnb.shell import CaptureShell
    os.chdir(path.parent)
    shell, alive = CaptureShell(path), []
    def run(sources):
        for source in sources:
            shell.run(source)
            if shell.exc: raise shell.exc
    left = [c for c in cells if c.cell_type == "code" and not flags(c) & {"notest", "slow", "gpu", "eval"}]
    with tempfile.TemporaryDirectory() as tmp:
        names = Path(tmp) / "names"
        def whole():
            run(c.source for c in left)
            names.write_text("\n".join(sys.modules))
        if not survives(whole, limit): raise SystemExit(1)
        for name in names.read_text().split("\n"):  # imported once, not by each child
            with contextlib.suppress(Exception): importlib.import_module(name)
    with tempfile.TemporaryDirectory() as tmp:
        here, kept = Path(tmp) / "here", Path(tmp) / "kept"
        here.mkdir()
        tempfile.tempdir = str(here)  # what a cell has written is put back after each child
        while left:
            first, *rest = (c.source for c in left)
            mine = [x for x in picked if cells[x[0]] is left[0]]
            if mine: shutil.copytree(here, kept, symlinks=True)
            where = os.getcwd()
            for at, k in mine:
                if survives(lambda: run([mutant(first, k)[0], *rest]), limit): alive.append((at, k))
                print("?" if (at, k) in alive else ".", end="", file=sys.stderr, flush=True)
                shutil.rmtree(here)
                shutil.copytree(kept, here, symlinks=True)
                os.chdir(where)  # it may be one of those folders
            if mine: shutil.rmtree(kept)
            run([first])
            left.pop(0)
    return alive


def noticed_by(module: str, source: str, k: int) -> str:
    "The first notebook or test file that notices the mutant in a copy of the package, or nothing."
    text = (ROOT / "craft_nb" / f"{module}.py").read_text()
    body = "\n".join(l for l in source.splitlines() if not l.startswith("#|")).strip()
    if body not in text: raise SystemExit(f"craft_nb/{module}.py is not what its notebook exports: run nbdev_export")
    with tempfile.TemporaryDirectory() as copy:
        for part in ("craft_nb", "tests", "tools", "bench", "nbs"):
            shutil.copytree(ROOT / part, Path(copy) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT / part, copy)
        (Path(copy) / "craft_nb" / f"{module}.py").write_text(text.replace(body, mutant(source, k)[0], 1))
        for name in TESTS[module].split():
            run = ([sys.executable, "-m", "pytest", "-x", "-q", f"tests/{name}.py"] if name.startswith("test_")
                   else ["nbdev_test", "--path", f"nbs/{name}.ipynb", "--n_workers", "1"])
            test = subprocess.run(run, cwd=copy, env=os.environ | dict(PYTHONPATH=copy), capture_output=True,
                                  timeout=1800)
            if test.returncode: return name
    return ""


def of_module(module: str, picked: list[tuple[int, int]], a) -> list[dict]:
    "One row a mutant: module, what it changes, and what noticed it (nothing: it survived)."
    path, cells = notebook(module)
    alive = in_notebook(path, cells, picked, a.limit)
    by = {(at, k): noticed_by(module, cells[at].source, k) if a.tests == "true" else "" for at, k in alive}
    return [dict(module=module, change=mutant(cells[at].source, k)[1], noticed_by=by.get((at, k), "notebook"))
            for at, k in picked]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)} (all)")
    ap.add_argument("--n", type=int, default=60, help="mutants, drawn from all modules named together")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--tests", choices=("true", "false"), default="true")
    ap.add_argument("--limit", type=float, default=300,
                    help="seconds a mutant has for its notebook; past them it counts as noticed")
    ap.add_argument("--out", type=Path, default=ROOT / "outputs/bench/mutants.json")
    a = ap.parse_args()
    modules, rows = a.modules or list(TESTS), []
    if unknown := set(modules) - set(TESTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    pool = [(m, at, k) for m in modules for at, c in enumerate(notebook(m)[1]) if exported(c)
            for k in range(len(sites(ast.parse(c.source))))]
    picked = sorted(random.Random(a.seed).sample(pool, min(a.n, len(pool))))
    for m in modules:  # each in a process of its own
        if not (mine := [(at, k) for x, at, k in picked if x == m]): continue
        r, w = os.pipe()
        if not (pid := os.fork()):
            with os.fdopen(w, "w") as f: json.dump(of_module(m, mine, a), f)
            os._exit(0)
        os.close(w)
        with os.fdopen(r) as f: text = f.read()
        if os.waitpid(pid, 0)[1]: raise SystemExit(f"the notebook of {m} does not run as it is")
        rows += (got := json.loads(text))
        for x in got: print(f"{x['noticed_by'] or 'SURVIVED':18} {m:9} {x['change']}", flush=True)
    by = {m: dict(tried=len(x := [r for r in rows if r["module"] == m]), noticed=sum(bool(r["noticed_by"]) for r in x))
          for m in modules}
    result = dict(command=" ".join(["python", *sys.argv]), seed=a.seed, tests=a.tests == "true", sites=len(pool),
                  tried=len(rows), noticed=sum(bool(r["noticed_by"]) for r in rows), modules=by, rows=rows)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(f"{result['noticed']} of {len(rows)} noticed, of {len(pool)} possible; → {a.out}")


if __name__ == "__main__": main()
