"""Two ranks, DDP and FSDP, against one with the same global batch; faults on one rank only; one rank that is told to
stop."""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kill_training as K
import ranks as R

STEPS = 50


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return *K.prepare(folder, work), folder


def trained(place, kind, world):
    work, cache, folder = place
    out = folder / kind
    def run(rank):
        trainer = R.train_rank(R.line(work, cache, out, world, steps=STEPS, save_freq=STEPS), kind)
        assert trainer.accelerator.num_processes == world
    R.on_ranks(world, f"{out}.log", run)
    from safetensors.torch import load_file
    return load_file(out / "checkpoints/last/pretrained_model/model.safetensors"), K.rows(out)


@pytest.fixture(scope="module")
def one_rank(place): return trained(place, "one", 1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one(place, one_rank, kind):
    weights, rows = trained(place, kind, 2)
    expected, single = one_rank
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert [r["retention"] for r in rows] == [True, False] * (STEPS // 2)
    assert [r["conflict"] for r in rows] == [r["conflict"] for r in single]
    assert 3 <= sum(r["projected"] for r in rows) <= STEPS // 2 - 3
    assert max(abs(a["lambda"] - b["lambda"]) for a, b in zip(rows, single, strict=True)) <= 1e-6
    assert (weights.keys() == expected.keys()
            and max((weights[k] - v).abs().max().item() for k, v in expected.items()) <= 1e-5)
    for key in ("task_loss", "retention_loss", "grad_norm", "dot"):
        assert all(math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5)
                   for a, b in zip(rows, single, strict=True) if a[key] is not None), key
    from safetensors.torch import load_file
    start = load_file(place[0].policy_path / "model.safetensors")
    assert max((v - start[k]).abs().max().item() for k, v in expected.items()) > 1e-2  # and they did train


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_resume(place, kind):
    "Stopped in the middle and taken up again by two new processes: the same end, bit for bit."
    work, cache, folder = place
    whole, again = folder / f"{kind}-whole", folder / f"{kind}-again"
    R.on_ranks(2, f"{whole}.log", lambda rank: R.train_rank(R.line(work, cache, whole, 2, steps=4, save_freq=2), kind))
    resume = ["--resume", f"--config_path={whole}/checkpoints/000002/pretrained_model/train_config.json",
              f"--output_dir={again}"]
    R.on_ranks(2, f"{again}.log", lambda rank: R.train_rank(resume, kind))
    a, b = K.result(whole), K.result(again)
    assert a.pop("rows")[2:] == b.pop("rows") and not K.difference(a, b)


def linear_rank(kind, folder, steps=8, **config):
    "A trainer on a linear policy, on this rank."
    from accelerate import Accelerator
    from craft_nb.config import CraftConfig
    from craft_nb.lerobot import sum_over_shards
    from craft_nb.losses import make_views
    from craft_nb.trainer import CraftTrainer, Retention, route_forward
    from linear_run import Linear, LinearAdapter
    acc = R.fsdp_on_cpu(auto_wrap_policy="no_wrap") if kind == "fsdp" else Accelerator(cpu=True)
    torch.manual_seed(0)
    policy = Linear(5, 0, 0)
    old, new, g = policy.w.weight.detach().clone(), torch.randn(5, 5), torch.Generator().manual_seed(acc.process_index)
    draws = lambda make: (make(torch.randn(6, 5, generator=g)) for _ in itertools.count())
    policy = acc.prepare(route_forward(policy))
    optimizer = acc.prepare(torch.optim.SGD(policy.parameters(), 0.05))
    cfg = CraftConfig(**dict(retention_freq=2, epsilon_start=0.01, epsilon_end=0.01, lambda_lr=0.1,
                             conflict_threshold=0.5) | config)
    ret = Retention(policy, draws(lambda x: {"input_ids": x, "teacher_hidden": (x @ old.T)[:, None, None]}),
                    make_views(["pooled"], layers=[-1], pooling=["vision_token_mean"], distance="mse"), LinearAdapter(),
                    cfg, steps, all_reduce=sum_over_shards(policy) if kind == "fsdp" else None)
    return CraftTrainer(policy, draws(lambda x: {"x": x, "y": x @ new.T}), optimizer, steps=steps, retention=ret,
                        accelerator=acc, cache_type="hidden")


def sum_or_apart(kind, folder, rank):
    "g + λr summed in `.grad`, against g and r kept apart and never projected."
    from craft_nb.trainer import one_step
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    def end(**config):
        trainer = linear_rank(kind, folder, steps=16, retention_freq=1, **config)
        rows = [one_step(trainer) for _ in range(16)]
        with FSDP.summon_full_params(trainer.policy) if kind == "fsdp" else torch.no_grad():
            return rows, torch.cat([p.detach().flatten().clone() for p in trainer.policy.parameters()])
    (summed, w), (apart, v) = (end(projection_gate="never", measure_every=3),
                               end(projection_gate="always", conflict_threshold=-1.0))
    # the first ten are all measured
    assert [r["step"] for r in summed if r["grad_norm_retain"] is None] == [11, 12, 14, 15]
    for a, b in zip(summed, apart, strict=True):
        for key in ("task_loss", "retention_loss", "lambda", "grad_norm"):
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), (key, a, b)
    torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_sum_on_two_ranks_is_what_it_is_apart(tmp_path, kind):
    R.on_ranks(2, tmp_path / "log", lambda rank: sum_or_apart(kind, tmp_path, rank))


@pytest.mark.parametrize("method", ["l2sp", "mir"])
def test_a_method_that_holds_whole_weights_refuses_shards(method):
    from types import SimpleNamespace
    from craft_nb.methods import find_method
    trainer = SimpleNamespace(accelerator=SimpleNamespace(distributed_type="DistributedType.FSDP"), params=[])
    cls = find_method(method)
    with pytest.raises(ValueError, match=f"method: {method} keeps whole weights"): cls.attach(cls.__new__(cls), trainer)


def spoil(trainer, what, value):
    "Make one number of the next step `value`, on this rank only."
    def first(batch, key): return batch | {key: batch[key].index_fill(0, torch.tensor([0]), value)}
    if what == "task loss": trainer.batches = itertools.chain([first(next(trainer.batches), "y")], trainer.batches)
    if what == "retention loss":
        trainer.retention.line = itertools.chain([first(next(trainer.retention.line), "teacher_hidden")],
                                                 trainer.retention.line)
    if what == "gradient":  # after the ranks have averaged theirs
        own, trainer.take_grads = (trainer.take_grads,
                                   lambda: spoiled(own(), value, lambda: vars(trainer).pop("take_grads", None)))


def spoiled(grads, value, once):
    once()
    for g in grads:
        if g is not None and g.numel(): g.view(-1)[0] = value
    return grads


# at which step; retention steps are the even ones
FAULTS = [("task loss", 1), ("task loss", 4), ("retention loss", 2), ("gradient", 4)]


def faulty_rank(kind, folder, rank, value, victim):
    from craft_nb.trainer import one_step
    trainer, seen = linear_rank(kind, folder), []
    trainer.policy.train()
    for step in range(8):
        lam = trainer.retention.duals["shared"].lam
        faults = [w for w, at in FAULTS if at == step]
        if rank == victim:
            for w in faults: spoil(trainer, w, value)
        record = one_step(trainer)
        assert bool(record["skipped"]) == bool(faults), (step, record)
        if faults: assert trainer.retention.duals["shared"].lam == lam, step
        seen.append(record["skipped"])
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    with FSDP.summon_full_params(trainer.policy) if kind == "fsdp" else torch.no_grad():
        weights = [p.detach().flatten().tolist() for p in trainer.policy.parameters()]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(dict(
        weights=weights, lam=trainer.retention.duals["shared"].lam, count=trainer.nonfinite, seen=seen)))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("value,victim", [(math.nan, 1), (math.inf, 0)])
def test_a_fault_on_one_rank_is_skipped_by_both(tmp_path, kind, value, victim):
    R.on_ranks(2, tmp_path / "log", lambda rank: faulty_rank(kind, tmp_path, rank, value, victim))
    a, b = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert (a["weights"] == b["weights"] and a["lam"] == b["lam"]
            and a["count"] == b["count"] == len({s for _, s in FAULTS}))
    assert all(math.isfinite(x) for p in a["weights"] for x in p) and math.isfinite(a["lam"]) and a["lam"] != 1.0


def test_one_rank_told_to_stop_stops_both_behind_the_same_step(tmp_path):
    def run(rank):
        trainer = linear_rank("ddp", tmp_path, steps=10**6)
        class Signal(__import__("craft_nb").Callback):
            def after_step(self, trainer, record):
                if rank == 1 and trainer.step == 5: os.kill(os.getpid(), signal.SIGTERM)
        trainer.callbacks, saved = [Signal()], []
        trainer.checkpoint = lambda t: saved.append(t.step)
        trainer.fit()
        assert (saved == [6]
                and trainer.ended == ("SIGTERM" if rank == 1 else "stopped on another rank")), (saved, trainer.ended)
    R.on_ranks(2, tmp_path / "log", run)


@pytest.mark.slow
# on CPUs `accelerate launch --cpu` goes through MPI; --multi_gpu starts processes as torchrun does, whatever their
# device
@pytest.mark.parametrize("launcher", [
    ["torch.distributed.run", "--nproc_per_node=2"],
    ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
     "--dynamo_backend=no"]], ids=["torchrun", "accelerate"])
def test_launchers(place, launcher):
    work, cache, folder = place
    out = folder / launcher[0]
    port = ["--master_port" if "torch" in launcher[0] else "--main_process_port", str(R.free_port())]
    script = Path(sys.executable).with_name("craft-train")
    run = subprocess.run([sys.executable, "-m", *launcher, *port, str(script),
                          *R.line(work, cache, out, 2, steps=4, save_freq=2)], capture_output=True, text=True,
                         timeout=540, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    state = json.loads((out / "checkpoints/last/training_state/training_step.json").read_text())
    assert (state["num_processes"] == 2 and [r["step"] for r in K.rows(out)] == [1, 2, 3, 4]
            and run.stdout.count("Trained to step 4/4") == 1)
