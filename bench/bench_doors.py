"""How long the commands take to answer: `python bench/bench_doors.py [--repeat 5] [--quick]`. Pairs run in turn;
medians of processor seconds, which other work on the machine does not change.
Writes outputs/bench/doors.json."""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(sys.executable).parent
LIMITS = {"import craft_nb": ("import torch", 1.1), "craft-demo --help": ("import torch", 2.0),
          "craft-cache info": ("import torch", 2.0),
          **{f"craft-{c} --help": ("lerobot-train --help", 1.0) for c in ("train", "build-cache", "eval", "cache")}}


def commands(cache):
    return {"import torch": [sys.executable, "-c", "import torch"],
            "import craft_nb": [sys.executable, "-c", "import craft_nb"],
            "craft-demo --help": [SCRIPTS / "craft-demo", "--help"],
            "craft-cache info": [SCRIPTS / "craft-cache", "info", cache],
            "lerobot-train --help": [SCRIPTS / "lerobot-train", "--help"],
            **{f"craft-{c} --help": [SCRIPTS / f"craft-{c}", "--help"]
               for c in ("train", "build-cache", "eval", "cache")}}


def cpu_seconds(command):
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    return spent() - before


def small_cache(folder):
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from anchor_data import build
    return build(Path(folder) / "cache")


def measure(repeat=5, names=None) -> dict[str, float]:  # command → median processor seconds
    with tempfile.TemporaryDirectory() as tmp:
        line = {n: c for n, c in commands(small_cache(tmp)).items() if names is None or n in names}
        for c in line.values(): cpu_seconds(c)  # once for the page cache
        times = [{n: cpu_seconds(c) for n, c in line.items()} for _ in range(repeat)]
    return {n: statistics.median(t[n] for t in times) for n in line}


def ratios(seconds):
    return {n: seconds[n] / seconds[base] for n, (base, _) in LIMITS.items() if n in seconds and base in seconds}


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--quick", action="store_true", help="leave out what imports LeRobot")
    p.add_argument("--size", help="of a policy; nothing here has one")
    args = p.parse_args()
    seconds = measure(args.repeat,
                      [n for n in commands("") if LIMITS.get(n, (n,))[0] == "import torch"] if args.quick else None)
    found = ratios(seconds)
    for n, (base, limit) in LIMITS.items():
        if n in found: print(f"{n:20} {seconds[n]:6.2f} s   {found[n]:5.2f} × {base} (at most {limit})")
    out = Path("outputs/bench/doors.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(seconds=seconds, ratios=found), indent=1))
