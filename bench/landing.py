"""Does a 300-step fine-tune land on its drift budget? The recommended controller beside the origin's plain ascent, on
the demo's workload.

    craft-demo record tokenizers teacher caches        the workload, once (or the whole `make demo`)
    python bench/landing.py [--folder outputs/demo]    one prefix and one action-token view, three final budgets each

A run lands if the mean L_ret of its last 50 steps lies in [0.7, 1.1]·ε_end, or λ is 0: the budget does not bind.
Writes landing.json and landing.png beside the demo, and exits with 1 if a run of the recommended controller misses.
With --controllers, --views or --budgets only some are trained; finished runs of earlier calls stay in the table and
the picture, marked as such.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import craft_nb.demo as demo

# relative squared distance; nats per action token
BUDGETS = {"tokens": (0.005, 0.01, 0.03), "action_logits": (0.02, 0.05, 0.1)}
# the origin's, with its ε of 10 to 1
ASCENT = dict(retention_freq=1, controller="ascent", projection_gate="always", epsilon_schedule="linear")
COLORS = {"landing": "#009E73", "ascent": "#D55E00"}


def arm(controller: str, view: str, eps: float) -> dict:
    if controller == "landing": return demo.held(view, eps)
    return ASCENT | dict(views=view, epsilon_start=10 * eps, epsilon_end=eps)


def train_job(run_args, name: str, how: dict, out: str) -> list[dict]:
    "The retention steps' records of one run."
    demo.register()
    import torch
    from craft_nb.lerobot import train
    torch.set_num_threads(1)
    demo.ARMS[name] = how
    config = demo.train_config(demo.Run(*run_args), name)
    config.output_dir, config.save_checkpoint = Path(out), False
    shutil.rmtree(out, ignore_errors=True)
    train(config, quiet=True)
    return retention_rows(Path(out))


def retention_rows(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "event" not in r and r.get("retention")]


def landed(rows: list[dict], eps: float) -> dict:
    last = [r["retention_loss"] for r in rows if r["step"] > rows[-1]["step"] - 50]
    ratio, lam = sum(last) / len(last) / eps, rows[-1]["lambda"]
    return dict(ratio=ratio, lam=lam, lands=0.7 <= ratio <= 1.1 or lam == 0,
                task_loss=sum(r["task_loss"] for r in rows[-50:]) / len(rows[-50:]))


def draw(curves: dict, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    views = sorted({v for _, v, _ in curves}, key=lambda v: list(BUDGETS).index(v) if v in BUDGETS else 9)
    budgets = {v: sorted({e for _, w, e in curves if w == v}) for v in views}
    fig, axes = plt.subplots(2 * len(views), max(map(len, budgets.values())), figsize=(7.2, 3.6 * len(views)), dpi=110,
                             layout="constrained", squeeze=False, sharex=True, sharey="row")
    for ax in axes.flat: ax.set(yscale="log", visible=False); ax.tick_params(labelsize=8)
    for k, view in enumerate(views):
        for eps, top, low in zip(budgets[view], *axes[2 * k : 2 * k + 2]):
            for (controller, v, e), rows in sorted(curves.items()):
                if (v, e) != (view, eps): continue
                steps, how = [r["step"] for r in rows], dict(color=COLORS[controller], lw=1)
                top.plot(steps, [r["retention_loss"] / eps for r in rows], label=controller, **how)
                top.plot(steps, [r["epsilon"] / eps for r in rows], ls="--", **how)
                low.plot(steps, [max(r["lambda"], 1e-3) for r in rows], **how)
            top.set(ylim=(0.3, 30), visible=True)
            top.set_title(f"{view}, ε = {eps:g}", fontsize=9)
            low.set(visible=True)
        axes[2 * k][0].set_ylabel("L_ret ÷ final ε (dashed: ε)", fontsize=8)
        axes[2 * k + 1][0].set_ylabel("λ", fontsize=8)
    for ax in axes[-1]: ax.set_xlabel("step", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.savefig(path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--folder", type=Path, default=Path("outputs/demo"))
    ap.add_argument("--views", default=",".join(BUDGETS), help="some of " + ", ".join(BUDGETS))
    ap.add_argument("--budgets",
                    help="ε_end of every view, with commas between; by default three that suit each view's unit")
    ap.add_argument("--controllers", default="landing,ascent")
    args = ap.parse_args()
    run = demo.Run(args.folder)
    marker = run.marker("teacher")
    if not marker.exists():
        sys.exit(f"{args.folder}: expected a demo folder with a teacher, found no {marker}; run make demo first")
    plan = [(controller, view, eps) for view in args.views.split(",")
            for eps in (map(float, args.budgets.split(",")) if args.budgets else BUDGETS[view])
            for controller in args.controllers.split(",")]
    out = {p: run.folder / "landing" / "-".join(map(str, p)) for p in plan}
    for folder in out.values(): shutil.rmtree(folder, ignore_errors=True)
    jobs = [(train_job, ((str(run.folder), run.settings), f"{p[0]}:{p[1]}", arm(*p), str(out[p])),
             out[p] / "metrics.jsonl") for p in plan]
    try: curves = dict(zip(plan, demo.run_jobs(run, "landing", jobs, run.settings.steps * len(plan)), strict=True))
    finally: run.close()
    for folder in (run.folder / "landing").iterdir():
        controller, view, eps = folder.name.split("-", 2)
        if folder not in out.values() and len(rows := retention_rows(folder)) == run.settings.steps:
            curves[controller, view, float(eps)] = rows
    plan_now, plan = set(plan), sorted(curves, key=lambda p: (p[1], p[2], p[0]))
    table = [dict(controller=c, view=v, epsilon=e, earlier=(c, v, e) not in plan_now) | landed(curves[c, v, e], e)
             for c, v, e in plan]
    for t in table:
        print("{controller:8} {view:14} ε={epsilon:<6g} L_ret/ε={ratio:5.2f}  λ={lam:8.3g}  task "
              "{task_loss:.3f}  ".format(**t)
              + ("lands" if t["lands"] else "misses") + (" (earlier)" if t["earlier"] else ""))
    (run.folder / "landing.json").write_text(json.dumps(table, indent=1) + "\n")
    draw(curves, run.folder / "landing.png")
    print("written to", run.folder / "landing.json", "and landing.png")
    sys.exit(any(not t["lands"] for t in table if t["controller"] == "landing"))


if __name__ == "__main__": main()
