"""What the constrained optimiser costs:
surgery against memory traffic, extra gradient copies, and whole steps beside plain LeRobot training.

    python bench/bench_optimiser.py                    the small policy on this machine's CPU
    python bench/bench_optimiser.py --size pi0_fast    LeRobot's pi0_fast, 2.9 B parameters with random weights, on a GPU
    python bench/bench_optimiser.py --size pi0_fast_300m    its 300 M language variant, where memory asks for it

Everything that is compared runs in one process, in turns, after a warm-up; figures are medians.
Writes outputs/bench/optimiser.json.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from memory import extra_copies, peak_memory
from torch import nn

from craft_nb.surgery import StreamingSurgery, Surgery, retention_grads
from craft_nb.trainer import FIRST_MEASURED, added_gradients

VIEWS = ("pooled", "tokens", "action_tokens", "action_logits")


def in_turns(device, rounds: int, **runs) -> dict[str, float]:
    "Median seconds of each callable; one call of each a round, so that a busy machine is busy for all."
    def clock(run):
        if device == "cuda": torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - start
    for run in runs.values(): run()
    took = [{k: clock(run) for k, run in runs.items()} for _ in range(rounds)]
    return {k: statistics.median(t[k] for t in took) for k in runs}


def block_shapes(millions: float, d: int = 1024) -> list[tuple]:
    block = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d), (d,), (d,)]
    return block * max(1, round(millions * 1e6 / sum(torch.Size(s).numel() for s in block)))


def surgery_speed(millions: float, device: str, rounds: int) -> dict:
    """Surgery with projection, merge and clipping, each of which rewrites g,
    against moving five gradient-sized arrays (a copy, and an addition into a third)."""
    from torchjd.aggregation import DualProj
    shapes = block_shapes(millions)
    params = [nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
    g, r = ([torch.randn(s, device=device) for s in shapes] for _ in range(2))
    a, b, c = (torch.randn(sum(p.numel() for p in params), device=device) for _ in range(3))
    surgery = Surgery([(f"layers.{i // 8}.{i}", p) for i, p in enumerate(params)], conflict_threshold=1.0)
    pull, aggregate = 0.5, DualProj(pref_vector=torch.tensor([1.0, 0.0], device=device))

    def traffic(): b.copy_(a); torch.add(a, b, out=c)
    def ours(): assert surgery.merge_(g, r, pull, True, max_norm=1.0).clipped
    def direct():  # lists cloned, projected, merged, assigned, clipped
        task, retain = [x.clone() for x in g], [x.clone() for x in r]
        dot = sum((x * y).sum() for x, y in zip(task, retain))
        norms = sum((x * x).sum() for x in task).sqrt() * sum((y * y).sum() for y in retain).sqrt()
        if (dot / norms).item() < 1.0:
            scale = dot / sum((y * y).sum() for y in retain)
            task = [x - scale * y for x, y in zip(task, retain)]
        for p, x in zip(params, [x + pull * y for x, y in zip(task, retain)]): p.grad = x
        nn.utils.clip_grad_norm_(params, 1.0)
    def torchjd():
        matrix = torch.stack([torch.cat([x.flatten() for x in t]) for t in (g, r)])
        merged = aggregate(matrix).add_(matrix[1], alpha=pull)
        for p, x in zip(params, merged.split([p.numel() for p in params])): p.grad = x.view_as(p)
        nn.utils.clip_grad_norm_(params, 1.0)

    s = in_turns(device, rounds, traffic=traffic, surgery=ours, direct=direct, torchjd=torchjd)
    return dict(parameters=a.numel(), threads=torch.get_num_threads(), seconds=s,
                surgery_over_traffic=s["surgery"] / s["traffic"],
                direct_over_surgery=s["direct"] / s["surgery"], torchjd_over_surgery=s["torchjd"] / s["surgery"])


class Residual(nn.Module):
    "A deep residual net whose parameters outweigh its activations."
    def __init__(self, d=512, depth=30):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.GELU()) for _ in range(depth))
    def forward(self, x):
        for layer in self.layers: x = x + layer(x)
        return x


def gradient_copies(device: str) -> dict:
    "Peak memory of a step's gradients over that of plain training, in gradient copies."
    model, x = Residual().to(device), torch.randn(4, 512, device=device)
    params, streaming, surgery = list(model.parameters()), StreamingSurgery(model), Surgery(model.named_parameters())
    def task(): return model(x).square().mean()
    def anchors(): return (model(x[:2]) - 1).square().mean()
    def plain(): task().backward()
    def whole():
        r = retention_grads(anchors(), params)
        plain()
        surgery.merge_([p.grad for p in params], r, 1.0, True, 0.1)
    def layer():
        with streaming.record(): loss = anchors()
        with streaming.merge_(loss, 1.0, True, 0.1): task().backward()
    def default():  # the recommended step, where it measures norms: the steps between do not even look at g
        plain()
        with added_gradients(params, 0.3): anchors().backward()
    return {"global": extra_copies(plain, whole, model), "layer": extra_copies(plain, layer, model),
            "default": extra_copies(plain, default, model)}


def build_policy(size: str, folder: Path, device: str):
    "→ policy, preprocessor, workload, with the workload's tokenizers and random weights."
    from craft_nb.small import new_policy, tiny_workload
    work = tiny_workload(folder)
    if size == "small": return *new_policy(work)[:2], work
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    cfg = PI0FastConfig(text_tokenizer_name=str(work.tokenizers / "text"),
                        action_tokenizer_name=str(work.tokenizers / "action"), push_to_hub=False, device=device,
                        paligemma_variant="gemma_300m" if size.endswith("300m") else "gemma_2b", dtype="bfloat16",
                        chunk_size=10, n_action_steps=10, max_action_tokens=64, gradient_checkpointing=True)
    policy = make_policy(cfg, ds_meta=work.meta)
    return policy, make_pre_post_processors(policy.config, dataset_stats=work.meta.stats)[0], work


def workload(size: str, folder: Path, device: str, batch_size: int):
    "A policy in training mode, a task batch and the frames of an anchor batch half as large."
    policy, pre, work = build_policy(size, folder, device)
    data = work.dataset()
    rows = torch.randint(len(data), (batch_size,), generator=torch.Generator().manual_seed(0)).tolist()
    collate = torch.utils.data.default_collate
    return (policy.train(), pre(collate([data[i] for i in rows])),
            pre(collate([data[i] for i in rows[: batch_size // 2]])))


def forever(x):
    while True: yield x


def training_memory(size: str, device: str, batch_size: int, folder: Path, steps: int = 3, accumulate: int = 1,
                    **craft) -> dict:
    """Peak memory of whole training steps with AdamW in GiB, what `estimate_memory` said before the first, and seconds
    a step. `cut`: plain steps on a batch without padding, as a retention step's task batch is."""
    from craft_nb.builder import anchor_batch_targets
    from craft_nb.config import CraftConfig
    from craft_nb.losses import make_views
    from craft_nb.passes import cut_padding
    from craft_nb.policies import adapter_for
    from craft_nb.trainer import CraftTrainer, Retention, estimate_memory, one_step
    policy, padded, frames = workload(size, folder, device, batch_size)
    short, out = cut_padding(policy, adapter_for(policy), padded), {}
    for name, how in dict(plain=None, cut=None, pooled=dict(views="pooled"), action_logits=dict(views="action_logits"),
                          streamed=dict(views="action_logits", projection_scope="layer")).items():
        retention, batch = None, short if name == "cut" else padded
        if name == "streamed" and (craft or accumulate > 1): continue  # takes one batch of each kind
        if how:
            anchors = anchor_batch_targets(policy, frames, make_views([how["views"]]), actions="dataset")
            cfg = CraftConfig(retention_freq=1, **how, **craft)
            retention = Retention(policy, forever(anchors), make_views([cfg.views]), adapter_for(policy), cfg, steps,
                                  stream=name == "streamed")
        trainer = CraftTrainer(policy, forever(batch), torch.optim.AdamW(policy.parameters(), lr=1e-6), steps=steps,
                               grad_clip_norm=1.0, retention=retention, accumulate=accumulate)
        expected, seconds = estimate_memory(trainer)["peak"], []
        def run():
            for _ in range(steps):
                start = time.perf_counter()
                one_step(trainer)
                if device == "cuda": torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        peak = peak_memory(run, policy)
        policy.zero_grad(set_to_none=True)
        out[name] = dict(peak_gib=peak / 2**30, expected_gib=expected / 2**30, expected_over_peak=expected / peak,
                         step_seconds=min(seconds))
        trainer = retention = None  # their memory must not count for the next
    return out


def step_ratios(size: str, device: str, rounds: int, batch_size: int, folder: Path, views=VIEWS) -> dict:
    """Five optimizer steps with CRaFT over five plain ones of the same policy and batch; anchor batch half the task
    batch.
    `default`: the recommended method, `share`, which measures norms on every tenth step. Plain steps keep the padding
    that LeRobot gives a batch, as plain training does; `cut`: plain steps without it, as CRaFT's task pass is."""
    from craft_nb.builder import anchor_batch_targets
    from craft_nb.config import CraftConfig
    from craft_nb.losses import make_views
    from craft_nb.methods import MethodParts, make_method
    from craft_nb.passes import cut_padding
    from craft_nb.policies import adapter_for
    from craft_nb.trainer import CraftTrainer, Retention, one_step
    policy, batch, anchor_source = workload(size, folder, device, batch_size)
    opt = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    short = cut_padding(policy, adapter_for(policy), batch)
    def plain(batch=batch):
        for _ in range(5):
            policy.forward(batch)[0].backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            opt.step(); opt.zero_grad()
    def craft(view, K):
        anchors = anchor_batch_targets(policy, anchor_source, make_views([view]), actions="dataset")
        cfg = CraftConfig(retention_freq=K, views=view)
        trainer = CraftTrainer(policy, forever(batch), opt, steps=10**6, grad_clip_norm=1.0,
                               retention=Retention(policy, forever(anchors), make_views([view]), adapter_for(policy),
                                                   cfg, 10**6))
        def run():
            for _ in range(5): one_step(trainer)
        return run

    def default(view):
        anchors = anchor_batch_targets(policy, anchor_source, make_views([view]), actions="dataset")
        cfg = CraftConfig(method="share", retention_freq=1, views=view)
        method = make_method(MethodParts(policy, cfg, 10**6, forever(anchors), make_views([view]), adapter_for(policy)))
        trainer = CraftTrainer(policy, forever(batch), opt, steps=10**6, grad_clip_norm=1.0, retention=method)
        for _ in range(FIRST_MEASURED): one_step(trainer)
        def run():
            for _ in range(cfg.measure_every): one_step(trainer)
        return run, cfg.measure_every / 5

    out = {"K1": {}, "K5": {}, "default": {}, "cut": {}}
    for view in views:
        ours, longer = default(view)
        s = in_turns(device, rounds, plain=plain, cut=lambda: plain(short), K1=craft(view, 1), K5=craft(view, 5),
                     default=ours)
        s["default"] /= longer
        for K in out: out[K][view] = s[K] / s["plain"]
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--size", default="small", choices=["small", "pi0_fast", "pi0_fast_300m"])
    ap.add_argument("--millions", type=float,
                    help="parameters of the surgery benchmark (default: 75 on a CPU, 1000 on a GPU)")
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--batch_size", type=int, help="of the task (default: 32, for pi0_fast 8)")
    ap.add_argument("--only", choices=["surgery", "memory", "training", "step"],
                    help="one part; the others keep what the file says of them")
    ap.add_argument("--out", type=Path, default=Path("outputs/bench/optimiser.json"))
    args = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size != "small" and device == "cpu":
        raise SystemExit(f"--size {args.size} needs a GPU, and none was found; --size small runs on the CPU")
    result = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    result |= dict(device=torch.cuda.get_device_name() if device == "cuda"
                   else f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads",
                   size=args.size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "surgery"):
        result |= surgery_speed(args.millions or (1000 if device == "cuda" else 75), device, args.rounds)
    if args.only in (None, "memory"): result["extra_copies"] = gradient_copies(device)
    batch_size = args.batch_size or (32 if args.size == "small" else 8)
    if args.only in (None, "training"):
        result["training"] = training_memory(args.size, device, batch_size, args.out.parent / "workload")
    if args.only in (None, "step"):
        result["step_ratio"] = step_ratios(args.size, device, args.rounds, batch_size, args.out.parent / "workload")
        result["step_ratio_default"] = result["step_ratio"].pop("default")
        result["step_ratio_cut"] = statistics.mean(result["step_ratio"].pop("cut").values())
    args.out.write_text(json.dumps(result, indent=1) + "\n")

    goals = [("surgery_over_traffic", "≤ 1.5"), ("direct_over_surgery", "≥ 5"), ("torchjd_over_surgery", "")]
    lines = [(k, result[k], goal) for k, goal in goals if k in result]
    lines += [(f"extra_copies.{k}", v, {"global": "≤ 1.05", "layer": "≤ 0.10", "default": "≤ 0.05"}[k])
              for k, v in result.get("extra_copies", {}).items()]
    runs = result.get("training", {})
    for k, v in runs.items():
        slower = v["step_seconds"] / runs["plain"]["step_seconds"]
        lines.append((f"training.{k}.expected_over_peak", v["expected_over_peak"],
                      f".9 to 1.1   peak {v['peak_gib']:.3g} GiB, step {slower:.2f} x plain"))
    limits = {"K1": ("≤ 1.45", "≤ 1.60"), "K5": ("≤ 1.10", "≤ 1.15")}
    lines += [(f"step_ratio.{K}.{v}", x, limits[K][v.startswith("action")])
              for K, row in result.get("step_ratio", {}).items() for v, x in row.items()]
    lines += [(f"step_ratio_default.{v}", x, "≤ 1.40" if v.startswith("action") else "≤ 1.30")
              for v, x in result.get("step_ratio_default", {}).items()]
    if "step_ratio_cut" in result: lines.append(("plain step without padding", result["step_ratio_cut"], ""))
    print(result["device"])
    for name, value, goal in lines: print(f"  {name:42} {value:6.2f}   {goal}")
    print("written to", args.out)


if __name__ == "__main__": main()
