"""Does the demo's table hold for other training seeds, and for more episodes?

    make demo                                        the workload, the teacher and the arms of the demo's own seed, once
    python bench/seeds.py [--folder outputs/demo]    every arm with two seeds more; every checkpoint on 40 episodes a task

All arms start from the same teacher; a training seed changes the order of the batches and of the anchors.
Prints the successes seed by seed, then the table over all seeds, whose 95 % intervals count episodes as independent:
they do not hold the differences between seeds, which the first lines show. Writes seeds.json beside the demo.
Trained checkpoints stay and are used again; --again trains all anew.
"""
import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import craft_nb.demo as demo
from craft_nb.evaluate import pooled_rate, success_markdown


def train_job(run_args, arm: str, seed: int, out: Path) -> None:
    demo.register()
    import torch
    from craft_nb.lerobot import train
    torch.set_num_threads(1)
    config = demo.train_config(demo.Run(*run_args), arm)
    config.output_dir, config.seed = out, seed
    shutil.rmtree(out, ignore_errors=True)
    train(config, quiet=True)


def checkpoint(out: Path) -> Path: return out / "checkpoints" / "last" / "pretrained_model"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--folder", type=Path, default=Path("outputs/demo"))
    ap.add_argument("--seeds", default="0,1,2",
                    help="training seeds; the demo's own arms serve for the demo's own seed")
    ap.add_argument("--episodes", type=int, default=40, help="a task and checkpoint")
    ap.add_argument("--again", action="store_true", help="train all anew")
    args, start = ap.parse_args(), time.time()
    run = demo.Run(args.folder)
    for stage in ("teacher", "finetune"):
        if not run.marker(stage).exists():
            sys.exit(f"{args.folder}: expected a finished demo, found no {run.marker(stage)}; run make demo first")
    if run.settings.steps != json.loads(run.marker("finetune").read_text())["settings"]["steps"]:
        sys.exit(f"{args.folder}: expected a demo with the default settings, "
                 f"found {run.marker('finetune')} made with others")
    seeds, arms = [int(s) for s in args.seeds.split(",")], run.settings.arm_names
    out = {(a, s): run.folder / "seeds" / f"{a.replace(':', '-')}-{s}" for a in arms for s in seeds
           if s != run.settings.seed}
    jobs = [(train_job, ((str(run.folder), run.settings), a, s, o), o / "metrics.jsonl")
            for (a, s), o in out.items() if args.again or not checkpoint(o).exists()]
    for *_, lines in jobs: shutil.rmtree(lines.parent, ignore_errors=True)
    own = {(a, run.settings.seed): p for a, p in run.result("finetune").items() if run.settings.seed in seeds}
    paths = own | {k: checkpoint(o) for k, o in out.items()}
    try:
        if jobs: demo.run_jobs(run, "seeds", jobs, run.settings.steps * len(jobs))
        named = {"teacher": run.result("teacher")["path"]} | {f"{a} {s}": str(p) for (a, s), p in paths.items()}
        cells = demo.cells(demo.evaluate_paths(run, "seeds-evaluate", named, run.settings.tasks, args.episodes))
    finally: run.close()
    tasks = dict(old=run.settings.old_tasks, new=run.settings.new.split(","))
    success = {t: {"teacher": c["teacher"]} | {a: pooled_rate(c[f"{a} {s}"] for s in seeds) for a in arms}
               for t, c in cells.items()}
    for name in named:
        old, new = (sum(round(cells[t][name]["rate"] * args.episodes) for t in tasks[k]) for k in ("old", "new"))
        print(f"{name:22} old {old:3} of {args.episodes * len(tasks['old'])}   new {new:3} of "
              f"{args.episodes * len(tasks['new'])}")
    report = dict(tasks=tasks, success=success, by_seed=cells, seeds=seeds, episodes=args.episodes,
                  minutes=(time.time() - start) / 60, step_seconds={}, drift={})
    (run.folder / "seeds.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + success_markdown(report))
    print("\nwritten to", run.folder / "seeds.json")


if __name__ == "__main__": main()
