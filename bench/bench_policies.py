"""What holding a policy costs a step: pi0_fast, pi0, pi05, SmolVLA, ACT and Diffusion at small size, in each view, with
a cache, all weights trained; and its answer with LoRA, by a cache and by the teacher inside (the same network with its
adapters off).

    python bench/bench_policies.py                     every policy
    python bench/bench_policies.py --only smolvla --rounds 9
    python bench/bench_policies.py --ratios            the answer alone: rows smolvla, smolvla_lora, smolvla_lora_inside,
                                                       and the same of pi0; other rows of the file stay

A retention step on every step (K = 1), anchors half the batch, two draws an anchor. Everything that is compared runs in
one process, in turns, after a warm-up; figures are medians of ratios that were taken side by side. Writes
outputs/bench/policies.json: {policy: {view: {"step_ratio", "bytes", "first_loss"}}}, `bytes` of an anchor in the cache,
images among them. With LoRA `step_ratio` is of steps whose anchors have been shown before, `step_ratio_new` of steps
that show each for the first time: what a frozen tower and a teacher inside say of an anchor is kept. The views "… lora
cached" and "… lora inside" have ratios to a plain LoRA step, and "extra_memory": bytes above that step's peak of live
tensors, beside "forward", what one forward pass of the anchors makes. With
--ratios there is "half_batch" besides: a bare forward and backward pass over half a batch, over one over the whole
batch: 1 + half_batch, where all of a step is such a pass, is the floor of step_ratio.
"""
import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from craft_nb.anchors import AnchorCacheDataset
from craft_nb.builder import Answered, anchor_batch_targets, build_anchor_cache, draw_seeds
from craft_nb.config import CraftConfig
from craft_nb.losses import make_views
from craft_nb.passes import route_forward
from craft_nb.policies import adapter_for
from craft_nb.trainer import AnchorRows, CraftTrainer, Retention, one_step
from craft_nb.training import keep_looks
from craft_nb.zoo import KINDS, zoo_checkpoint, zoo_data
from memory import peak_memory

ALL = "pi0_fast", *KINDS
# the others have their own
TARGETS = dict(act=".*model.decoder.*linear1", diffusion=".*cond_encoder.1", pi0_fast=".*(q_proj|v_proj)")


def forever(x):
    while True: yield x


def ratios(rounds: int, plain, **runs) -> dict[str, float]:
    "Median of each run's time over plain's, which is taken just before and behind it."
    def clock(run):
        start = time.process_time()
        run()
        return time.process_time() - start
    for run in (plain, *runs.values()): run(); run()
    out = {k: [] for k in runs}
    for _ in range(rounds):
        for k, run in runs.items():
            before, took, behind = clock(plain), clock(run), clock(plain)
            out[k].append(2 * took / (before + behind))
    return {k: statistics.median(x) for k, x in out.items()}


def trainer_of(policy, batch, anchors, views, **craft):
    cfg = CraftConfig(retention_freq=1, views=",".join(views), **craft)
    opt = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)
    ret = (Retention(policy, anchors, make_views(views), adapter_for(policy), cfg, 10**6)
           if anchors is not None else None)
    return CraftTrainer(policy, forever(batch), opt, steps=10**6, grad_clip_norm=1.0, retention=ret)


def stepper(trainer):
    def run():
        for _ in range(2): one_step(trainer)
    return run


def bytes_an_anchor(policy, pre, data, view: str, folder: Path) -> float:
    n = 16
    columns = {k: data.hf_dataset.data[k].to_pylist() for k in ("episode_index", "task_index")}
    build_anchor_cache(policy, pre, data, folder, **columns, num_anchors=n, views=[view], progress=False,
                       allow_undecodable=True)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / len(AnchorCacheDataset(folder))


def with_adapters(work, kind, folder):
    wanted = dict(method_type="LORA", r=8) | ({"target_modules": TARGETS[kind]} if kind in TARGETS else {})
    policy = work.policy(folder).wrap_with_peft(peft_cli_overrides=wanted).train()
    route_forward(policy)
    return policy


TABLES = []  # what frozen towers said, kept as long as the process


def looked_at(policy, rows):
    "`rows` as a run's loader hands them out: with their numbers, where what a frozen tower says of them is kept."
    n = len(next(iter(rows.values())))
    loader = SimpleNamespace(dataset=AnchorRows(SimpleNamespace(store=None), list(range(n))), mark="")
    TABLES.append(keep_looks(CraftConfig(), loader, policy, adapter_for(policy)))
    return rows | ({loader.mark: torch.arange(n)} if loader.mark else {})


def anew(policy, rows):
    "`rows` without end, each time as if they had never been shown."
    shown, table = looked_at(policy, rows), TABLES[-1]
    while True:
        if table: table.said.clear()
        yield shown


def line_of(policy, rows):
    "A loader that hands out `rows` without end."
    shown, n = looked_at(policy, rows), len(next(iter(rows.values())))
    return SimpleNamespace(dataset=AnchorRows(SimpleNamespace(store=None), list(range(n))), mark="", seed=0, step=1,
                           batch_size=n, rank=0, world_size=1, rows=lambda step: list(range(n)),
                           forever=lambda: forever(shown))


def lora(work, kind, folder, batch, rows, view, rounds) -> dict:
    "Both ways to have the teacher's answer, beside plain LoRA; `rows`: a batch of anchors with stored answers."
    def answered(p, line, most=0): return Answered(line, p, make_views([view]), adapter_for(p), most=most)
    made = dict(plain=lambda p: None, cached=lambda p: forever(looked_at(p, rows)), cached_new=lambda p: anew(p, rows),
                inside=lambda p: answered(p, line_of(p, rows), 2 * 10**9).forever(),
                inside_new=lambda p: map(answered(p, None).answer, anew(p, rows)))
    def fresh(name):
        policy = with_adapters(work, kind, folder)
        return policy, trainer_of(policy, batch, made[name](policy), [view])
    first = {n: one_step(fresh(n)[1])["retention_loss"] for n in ("cached", "inside")}
    ready = {n: fresh(n) for n in made}
    runs = {n: stepper(t) for n, (_, t) in ready.items()}
    found = ratios(rounds, runs.pop("plain"), **runs)
    peaks = {n: peak_memory(lambda: one_step(t), p) for n, (p, t) in ready.items()}
    policy = ready["inside"][0]
    ask = Answered(None, policy, make_views([view]), adapter_for(policy)).answer
    forward = peak_memory(lambda: ask(rows), policy) - sum(t.nbytes for t in [*policy.parameters(), *policy.buffers()])
    return {f"{view} lora {n}": dict(step_ratio=round(found[n], 3), step_ratio_new=round(found[f"{n}_new"], 3),
                                     first_loss=first[n], extra_memory=peaks[n] - peaks["plain"], forward=forward)
            for n in ("cached", "inside")}


def measure(work, kind: str, batch_size: int, rounds: int, tmp: Path) -> dict:
    folder = work.policy_path if kind == "pi0_fast" else zoo_checkpoint(work, kind, steps=4)
    (pre, _), policy = work.processors(folder), work.policy(folder).train()
    data = zoo_data(work, policy.config)
    rows = torch.randint(len(data), (batch_size,), generator=torch.Generator().manual_seed(0)).tolist()
    def frames(n): return pre(torch.utils.data.default_collate([data[i] for i in rows[:n]]))
    batch, source = frames(batch_size), frames(batch_size // 2)
    own = "action_logits" if kind == "pi0_fast" else "answer"
    names = [own, *(["pooled", "tokens"] if "hidden" in adapter_for(policy).gives else [])]
    seeds, runs, out = draw_seeds(0, range(batch_size // 2)), {}, {}
    for view in names:
        anchors = anchor_batch_targets(policy, source, make_views([view]), seeds=seeds)
        t = trainer_of(policy, batch, forever(anchors), [view])
        out[view] = dict(bytes=round(bytes_an_anchor(policy, pre, data, view, tmp / f"{kind}-{view}")),
                         first_loss=one_step(t)["retention_loss"])
        policy = work.policy(folder).train()
        runs[view] = stepper(trainer_of(policy, batch, forever(anchors), [view]))
        t = None
    plain = stepper(trainer_of(work.policy(folder).train(), batch, None, []))
    for view, x in ratios(rounds, plain, **runs).items(): out[view] = dict(step_ratio=round(x, 3)) | out[view]
    anchors = anchor_batch_targets(work.policy(folder).train(), source, make_views([own]), seeds=seeds)
    for view, x in lora(work, kind, folder, batch, anchors, own, rounds).items():
        out[view] = x | dict(bytes=out[own]["bytes"] if view.endswith("cached") else 0)
    return out


def bare(policy, batch):
    def run():
        policy.zero_grad()
        policy(batch)[0].backward()
    return run


def measure_ratios(work, kind: str, batch_size: int, rounds: int, tmp: Path) -> dict:
    "Rows of `kind`, all weights trained, and with LoRA by a cache and by the teacher inside: {row: {\"answer\": {…}}}."
    folder, view = zoo_checkpoint(work, kind, steps=4), "answer"
    (pre, _), policy = work.processors(folder), work.policy(folder).train()
    data = zoo_data(work, policy.config)
    rows = torch.randint(len(data), (batch_size,), generator=torch.Generator().manual_seed(0)).tolist()
    whole, half = (pre(torch.utils.data.default_collate([data[i] for i in rows[:n]]))
                   for n in (batch_size, batch_size // 2))
    anchors = anchor_batch_targets(policy, half, make_views([view]), seeds=draw_seeds(0, range(batch_size // 2)))
    size = round(bytes_an_anchor(policy, pre, data, view, tmp / f"{kind}-ratios"))
    first = one_step(trainer_of(work.policy(folder).train(), whole, forever(anchors), [view]))["retention_loss"]
    def floor(p): return ratios(rounds, bare(p, whole), half=bare(p, half))["half"]
    def fresh(): return work.policy(folder).train()
    runs = [stepper(trainer_of(fresh(), whole, *how)) for how in ((None, []), (forever(anchors), [view]))]
    held = ratios(rounds, runs[0], held=runs[1])["held"]
    out = {kind: {view: dict(step_ratio=round(held, 3), bytes=size, first_loss=first,
                             half_batch=round(floor(fresh()), 3))}}
    below = round(floor(with_adapters(work, kind, folder)), 3)
    for name, x in lora(work, kind, folder, whole, anchors, view, rounds).items():
        inside = name.endswith("inside")
        out[f"{kind}_lora" + "_inside" * inside] = {view: x | dict(bytes=0 if inside else size, half_batch=below)}
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--only", choices=ALL)
    ap.add_argument("--ratios", action="store_true",
                    help="step ratios of the answer, of smolvla and pi0, with what half a batch takes")
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--batch_size", type=int, default=32)
    ap.add_argument("--out", type=Path, default=Path("outputs/bench/policies.json"))
    args = ap.parse_args()
    if args.ratios and args.only == "pi0_fast": ap.error("--ratios: pi0_fast has no view answer")
    logging.disable(logging.WARNING)
    from craft_nb.small import tiny_workload
    result = json.loads(args.out.read_text()) if (args.only or args.ratios) and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        work = tiny_workload(Path(tmp) / "work", episodes=2)
        for kind in [args.only] if args.only else ("smolvla", "pi0") if args.ratios else ALL:
            if args.ratios: found = measure_ratios(work, kind, args.batch_size, args.rounds, Path(tmp))
            else: found = {kind: measure(work, kind, args.batch_size, args.rounds, Path(tmp))}
            for row, views in found.items(): result[row] = result.get(row, {}) | views if args.ratios else views
            print("\n".join(f"{row} {json.dumps(views)}" for row, views in found.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
