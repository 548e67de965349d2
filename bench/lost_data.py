"""What keeps when the teacher's own data are gone?

    make demo                                             the data set and the teacher
    python bench/lost_data.py [--demo outputs/demo]       outputs/bench/lost_data.json; losses only, about three minutes of one core a run

The recommended share, on as many anchors from three places: frames of the old data (what a person would keep by if it
were there), frames of the *new* data under the old instructions (`--prompts_file`), and a folder of pictures of those
same frames under the old instructions (`--image_dir`; the joints are then told as the mean that the checkpoint knows).
Plain fine-tuning beside them. Every run is judged on anchors of old episodes that no cache holds, and on episodes of
the new task.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from craft_nb import demo
from craft_nb.evaluate import table_markdown
from craft_nb.study import Job, cache_jobs, run_job, splits

ARMS = {"none: plain": "", "old data": "old", "new data, old instructions": "new",
        "pictures of the new data, old instructions": "pictures"}


def instructions(run) -> list[str]: return [demo.workload(run).texts[t] for t in run.settings.old_tasks]


def save_pictures(run, folder: Path) -> None:
    "Every frame of the new task's trained episodes, as PNG."
    from torchvision.transforms.functional import to_pil_image
    data, folder = demo.workload(run).dataset(splits(run)["new"]), folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    camera, = data.meta.camera_keys
    for i in range(len(data)): to_pil_image(data[i][camera]).save(folder / f"{i:05d}.png")


def build(run, out: Path, where: str, number: int) -> None:
    "`out/<where>/caches/action_logits-<number>`, and beside it the two caches that runs are judged on."
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig
    from craft_nb.lerobot import BuildCacheConfig, build_cache
    args, job = (str(run.folder), run.settings), Job(f"share:action_logits@{number}", "share=0.3", 0)
    home = out / (where or "plain")
    jobs = cache_jobs(args, home, [job] if where == "old" else [], run.settings.held_out)
    for f, a, _ in jobs: f(*a)
    if where in ("", "old") or (home / "caches" / job.cache / "anchors.json").exists(): return
    (prompts := home / "old.txt").write_text("\n".join(instructions(run)) + "\n")
    work, path = demo.workload(run), run.result("teacher")["path"]
    policy = PreTrainedConfig.from_pretrained(path)
    policy.pretrained_path = Path(path)
    source = dict(image_dir=str(home / "pictures")) if where == "pictures" else {}
    if source: save_pictures(run, home)
    data = DatasetConfig("" if source else work.repo_id, root=None if source else str(work.root),
                         episodes=None if source else splits(run)["new"])
    build_cache(BuildCacheConfig(data, policy, out_dir=str(home / "caches" / job.cache), num_anchors=str(number),
                                 views="action_logits", prompts_file=str(prompts),
                                 batch_size=32, allow_undecodable=True, **source), progress=False)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--demo", type=Path, default=Path("outputs/demo"))
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    ap.add_argument("--seeds", default="0,1")
    ap.add_argument("--anchors", type=int, default=2400, help="of each kind (%(default)s)")
    ap.add_argument("--size", choices=demo.SIZES, default="full")
    args, rows = ap.parse_args(), []
    demo.register()
    torch.set_num_threads(1)
    run, out = demo.Run(args.demo, demo.SIZES[args.size]), (args.out / "lost_data").absolute()
    run.result("teacher")
    for seed in map(int, args.seeds.split(",")):
        for arm, where in ARMS.items():
            start, home = time.process_time(), out / (where or "plain")
            build(run, out, where, args.anchors)
            job = Job(f"share:action_logits@{args.anchors}", "share=0.3", seed) if where else Job("sft", "lr=1", seed)
            run_job((str(run.folder), run.settings), str(home), job)
            rows.append(dict(anchors=arm, seed=seed)
                        | json.loads((home / "jobs" / f"{job.key}.json").read_text())["result"])
            print(f"{arm}, seed {seed}: task loss {rows[-1]['task_loss_seen']:.3f}, held-out drift "
                  f"{rows[-1]['drift']:.3f} ({time.process_time() - start:.0f} s of processor time)", flush=True)
    def mean(arm, name): return statistics.mean(r[name] for r in rows if r["anchors"] == arm)
    names = ("task_loss_seen", "task_loss", "drift", "third", "train_drift")
    table = table_markdown(["anchors of", "task loss", "unseen episodes", "held-out drift", "third set",
                            "drift in training"],
                           [[a, *("–" if w == "" and n == "train_drift" else f"{mean(a, n):.3f}" for n in names)]
                            for a, w in ARMS.items()])
    ((args.out / "lost_data.json")
     .write_text(json.dumps(dict(anchors=args.anchors, seeds=args.seeds, rows=rows), indent=1) + "\n"))
    print(table)


if __name__ == "__main__": main()
