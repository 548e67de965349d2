"""Does a policy still know what it sees, after it was fine-tuned on actions?

    python bench/mcq_shapes.py               outputs/bench/mcq.json
    python bench/mcq_shapes.py --size tiny   the same code in seconds; learns nothing

A small pi0_fast learns to answer questions about a cube, ball or cone on a table ("which colour is the cube ?", "which
shape is red ?") and to reach for it. It is then fine-tuned on drawing back from it, by craft-train: plainly; with
anchors of pictures and questions (craft-build-cache --mcq), whose target is the teacher's own next-token distribution;
with anchors of old actions; and with both in one cache (--append). craft-eval --mcq --compare asks each on pictures
that nobody was trained on. Scenes are drawn here; there is no simulator.
"""
import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled")

import numpy as np
import torch
from PIL import Image, ImageDraw

from craft_nb import cli
from craft_nb.evaluate import table_markdown
from craft_nb.mcq import PolicyScorer, read_questions
from craft_nb.small import Workload, new_policy, save_checkpoint_folder, save_tokenizers, write_dataset

COLOURS = dict(red=(210, 50, 40), green=(50, 170, 70), blue=(50, 80, 210), yellow=(235, 205, 50), white=(240, 240, 240))
SHAPES = ("cube", "ball", "cone")
TASKS = dict(old="reach the thing", new="leave the thing")
SIZES = dict(full=dict(scenes=1000, anchors=300, asked=150, episodes=40, teach=400, steps=60, batch=32, old=400),
             tiny=dict(scenes=8, anchors=10, asked=4, episodes=3, teach=2, steps=2, batch=4, old=18))
SMALLER = dict(width=96, depth=3, mlp_dim=256, head_dim=24, vision_width=96, vision_mlp_dim=256)  # .6 M parameters
ARMS = ("plain", "questions", "actions", "both")


def darker(colour, by): return tuple(int(x * by) for x in colour)


@dataclass
class Scene:
    "A table with a thing on it, in one of 4 × 4 cells."
    colours: dict[str, str]  # of the shape
    places: dict[str, tuple[float, float]]  # middles, in 0 … 1
    light: float

    @classmethod
    def drawn(cls, rng):
        shape, cell = SHAPES[rng.integers(3)], rng.integers(16)
        return cls({shape: str(rng.choice([*COLOURS]))}, {shape: ((cell % 4 + .5) / 4, (cell // 4 + .5) / 4)},
                   rng.uniform(.7, 1.1))

    def picture(self, hand=None) -> np.ndarray:  # (64, 64, 3) uint8
        im = Image.new("RGB", (128, 128), darker((120, 95, 75), self.light))
        d = ImageDraw.Draw(im)
        for y in range(0, 128, 16): d.line([(0, y), (128, y)], fill=darker((105, 82, 64), self.light))  # boards
        for shape, (u, v) in self.places.items():
            x, y, c = u * 128, v * 128, darker(COLOURS[self.colours[shape]], min(1.0, self.light))
            d.ellipse([x - 12, y + 5, x + 14, y + 14], fill=darker((70, 55, 45), self.light))  # shadow
            if shape == "cube":
                d.rectangle([x - 10, y - 6, x + 8, y + 12], fill=c)
                d.polygon([(x - 10, y - 6), (x - 4, y - 12), (x + 13, y - 12), (x + 8, y - 6)], fill=darker(c, 1.06))
                d.polygon([(x + 8, y - 6), (x + 13, y - 12), (x + 13, y + 6), (x + 8, y + 12)], fill=darker(c, .6))
            elif shape == "ball":
                d.ellipse([x - 11, y - 11, x + 11, y + 11], fill=c)
                d.ellipse([x - 6, y - 8, x, y - 2], fill=darker(c, 1.06))
            else: d.polygon([(x, y - 13), (x - 11, y + 11), (x + 11, y + 11)], fill=c)
        if hand is not None:
            x, y = 128 * hand
            d.line([(x - 7, y), (x + 7, y)], fill=(15, 15, 15), width=3)
            d.line([(x, y - 7), (x, y + 7)], fill=(15, 15, 15), width=3)
        return np.asarray(im.resize((64, 64), Image.Resampling.BOX))

    def questions(self) -> list[dict]:
        of = {c: s for s, c in self.colours.items()}
        return ([dict(question=f"which colour is the {s} ?", choices=[*COLOURS], answer_index=[*COLOURS].index(c))
                 for s, c in self.colours.items()] + [dict(question=f"which shape is {c} ?", choices=[*SHAPES],
                                                           answer_index=SHAPES.index(s)) for c, s in of.items()])


def write_questions(folder: Path, name: str, n: int, each: int, rng) -> Path:
    "A JSONL file of `each` questions about each of `n` scenes, and their pictures."
    (folder / name).mkdir(parents=True)
    lines = []
    for i in range(n):
        scene = Scene.drawn(rng)
        Image.fromarray(scene.picture(rng.uniform(.05, .95, 2) if i % 2 else None)).save(folder / name / f"{i:04d}.png")
        asked = scene.questions()
        lines += [dict(image_path=f"{name}/{i:04d}.png") | asked[k] for k in rng.permutation(len(asked))[:each]]
    (file := folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def episodes(n: int, rng):
    "A hand that goes straight to the thing, or away from it, `n` times for each task."
    for task in TASKS:
        for _ in range(n):
            scene, hand, rows = Scene.drawn(rng), rng.uniform(.05, .95, 2), []
            thing, = scene.places.values()
            for _ in range(14):
                move = np.clip((np.array(thing) - hand) * 5, -1, 1) * (1 if task == "old" else -1)
                rows.append((scene.picture(hand), hand.astype(np.float32), move.astype(np.float32)))
                hand = np.clip(hand + .08 * move, .02, .98)
            image, state, action = map(np.stack, zip(*rows))
            yield dict(task=task, image=image, state=state, action=action)


class Shapes(Workload):
    @property
    def texts(self): return TASKS
    def of(self, task: str, part: str) -> list[int]:  # the last tenth is held out
        mine = self.episodes(task)
        return mine[: -max(1, len(mine) // 10)] if part == "train" else mine[-max(1, len(mine) // 10):]


def prepare(folder: Path, s: dict, seed: int) -> Shapes:
    "Pictures, questions, demonstrations, tokenizers."
    rng = np.random.default_rng(seed)
    for name, each in (("scenes", 2), ("anchors", 2), ("asked", 2)): write_questions(folder, name, s[name], each, rng)
    work = Shapes(folder, "local/shapes")
    write_dataset(episodes(s["episodes"], rng), work.root, work.repo_id, fps=10, texts=TASKS)
    words = [*TASKS.values(), *COLOURS, *SHAPES, "which colour is the thing ?", "which shape is it ?"]
    save_tokenizers(work.dataset(), work.tokenizers, sentences=words)
    return work


def question_rows(scorer: PolicyScorer, questions) -> dict:
    "`scorer.anchors` of the right answers, which are one token long here, in one batch."
    from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
    said = scorer.tokenizer([q.question for q in questions], return_tensors="pt", padding="max_length",
                            max_length=scorer.limit, padding_side="right")
    seen = {f: torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1).float() / 255
            for f in {q.image for q in questions}}
    inputs = scorer.adapter.inputs(scorer.policy, {scorer.camera: torch.stack([seen[q.image] for q in questions]),
                                                   OBS_LANGUAGE_TOKENS: said["input_ids"],
                                                   OBS_LANGUAGE_ATTENTION_MASK: said["attention_mask"].bool()})
    ids = torch.tensor([[scorer.tokenizer.bos_token_id,
                         *scorer.tokenizer.encode(q.choices[q.answer], add_special_tokens=False)] for q in questions])
    return inputs | dict(action_ids=ids.int(), action_mask=torch.ones_like(ids).bool(),
                         predict_mask=torch.ones_like(ids[:, 1:]).bool())


def teach(work: Shapes, s: dict, seed: int, say=print) -> None:
    "A policy that answers the questions and does the old task: both losses in every step."
    policy, pre, post = new_policy(work, seed, **SMALLER)
    scorer, data = PolicyScorer(policy), work.dataset(work.of("old", "train"))
    rows = question_rows(scorer, read_questions(work.folder / "scenes.jsonl"))
    actions = pre(torch.utils.data.default_collate([data[i] for i in range(len(data))]))
    opt, g = torch.optim.AdamW(policy.parameters(), 1e-3), torch.Generator().manual_seed(seed)
    pace = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=s["teach"] + 1, pct_start=.1)
    policy.train()
    for step in range(s["teach"]):
        some, few = (torch.randint(n, (int(k * s["batch"]),), generator=g)
                     for n, k in ((len(rows["input_ids"]), 2), (len(data), .5)))
        anchors = scorer.adapter.prepare(policy, {k: x[some] for k, x in rows.items()})
        f = scorer.adapter.features(policy, anchors, [-1], True, True)
        known = torch.nn.functional.cross_entropy(f.logits.float(), anchors["action_ids"][:, 1:][f.action_mask])
        done = policy({k: x[few] if isinstance(x, torch.Tensor) else [x[i] for i in few] if isinstance(x, list) else x
                       for k, x in actions.items()})[0]
        opt.zero_grad()
        (known + done).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        opt.step(), pace.step()
        if step % 50 == 49:
            say(f"teacher, step {step + 1}: questions {known.item():.3f}, actions {done.item():.3f} nats a token",
                flush=True)
    save_checkpoint_folder(policy.eval(), pre, post, work.policy_path)


def caches(work: Shapes, s: dict) -> dict[str, Path]:
    "What the arms are held to: by craft-build-cache."
    where = {a: work.folder / "caches" / a for a in ARMS[1:]}
    teacher, view = f"--policy.path={work.policy_path}", "--views=action_logits"
    frames = [f"--dataset.repo_id={work.repo_id}", f"--dataset.root={work.root}",
              f"--dataset.episodes={work.of('old', 'train')}", f"--num_anchors={s['old']}", "--allow_undecodable=true"]
    cli.build_cache([teacher, view, f"--mcq={work.folder / 'anchors.jsonl'}", f"--out_dir={where['questions']}"])
    cli.build_cache([teacher, view, *frames, f"--out_dir={where['actions']}"])
    cli.build_cache([teacher, view, f"--mcq={work.folder / 'anchors.jsonl'}", f"--append={where['actions']}",
                     f"--out_dir={where['both']}"])
    return where


def tune(work: Shapes, s: dict, arm: str, cache: Path | None, seed: int, share: float) -> Path:  # the checkpoint
    "The new task, by craft-train."
    out = work.folder / "runs" / f"{arm}-{seed}"
    craft = ["--craft.enabled=false"] if cache is None else [f"--craft.anchor_cache_dir={cache}",
                                                             "--craft.method=share", f"--craft.share={share}",
                                                             "--craft.retention_freq=1"]
    cli.train([f"--policy.path={work.policy_path}", "--policy.push_to_hub=false", f"--dataset.repo_id={work.repo_id}",
               f"--dataset.root={work.root}", f"--dataset.episodes={work.of('new', 'train')}",
               f"--output_dir={out}", f"--steps={s['steps']}", f"--batch_size={s['batch']}", f"--seed={seed}",
               "--num_workers=0", "--log_freq=0", "--env_eval_freq=0", f"--save_freq={s['steps']}",
               "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=10",
               f"--policy.scheduler_decay_steps={s['steps']}", "--wandb.enable=false", "--craft.check=false", *craft])
    return out / "checkpoints" / "last" / "pretrained_model"


def judge(work: Shapes, name: str, path: Path) -> dict:
    """Questions that nobody was trained on, beside the teacher's answers; the loss on held-out demonstrations. By
    craft-eval."""
    out, held = work.folder / "eval" / name, work.of("old", "held") + work.of("new", "held")
    cli.evaluate([f"--policy.path={path}", f"--mcq={work.folder / 'asked.jsonl'}", f"--compare={work.policy_path}",
                  f"--dataset.repo_id={work.repo_id}", f"--dataset.root={work.root}",
                  f"--dataset.episodes={held}", "--action_frames=0", f"--out_dir={out}"])
    found = json.loads((out / "eval.json").read_text())
    return dict(mcq=found["mcq"], task_loss={k: found["task_loss"]["tasks"][t]["loss"] for k, t in TASKS.items()})


def table(rows: list[dict]) -> str:
    def line(r):
        m, x = r["mcq"], r["mcq"]["mcnemar"]
        paired = "–" if r["arm"] == "teacher" else f"{x['only_first']} : {x['only_second']}, p = {x['p']:.2g}"
        return [r["arm"], "–" if r["arm"] == "teacher" else str(r["seed"]),
                f"{m['accuracy']:.0%} ({m['low']:.0%} to {m['high']:.0%})", f"{m['margin']:.2f}", paired,
                f"{r['task_loss']['new']:.3f}", f"{r['task_loss']['old']:.3f}"]
    head = ["fine-tuned", "seed", f"right, of {rows[0]['mcq']['n']}", "margin, nats", "right only here : only teacher",
            "loss, new task", "loss, old task"]
    return table_markdown(head, [line(r) for r in rows])


def main(argv: list[str] | None = None) -> list[dict]:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench"))
    ap.add_argument("--size", choices=SIZES, default="full")
    ap.add_argument("--seeds", default="0", help="of fine-tuning; one teacher (%(default)s)")
    ap.add_argument("--share", type=float, default=.3, help="of the anchors' gradient (%(default)s)")
    ap.add_argument("--arms", default=",".join(ARMS))
    args, start = ap.parse_args(argv), time.process_time()
    torch.set_num_threads(1)
    s, folder, rows = SIZES[args.size], (args.out / "mcq_shapes").absolute(), []
    shutil.rmtree(folder, ignore_errors=True)
    work = prepare(folder, s, 0)
    teach(work, s, 0)
    where = caches(work, s)
    rows.append(dict(arm="teacher", seed=None) | judge(work, "teacher", work.policy_path))
    for seed in map(int, args.seeds.split(",")):
        for arm in args.arms.split(","):
            path = tune(work, s, arm, where.get(arm), seed, args.share)
            rows.append(dict(arm=arm, seed=seed) | judge(work, f"{arm}-{seed}", path))
    found = dict(sizes=s, share=args.share, cpu_seconds=time.process_time() - start, rows=rows)
    (args.out / "mcq.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(rows)}\n\n{found['cpu_seconds'] / 60:.1f} minutes of processor time; {args.out / 'mcq.json'}")
    return rows


if __name__ == "__main__": main()
