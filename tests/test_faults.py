"""What can go wrong while training: numbers that are not finite, signals, disks, memory, workers.
A clear end, and nothing lost that was saved."""
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

import kill_training as K
import ranks as R
from craft_nb import Callback
from fuzz_configs import tiny_run
from craft_nb.config import CraftConfig


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return *K.prepare(folder, work), folder


@pytest.fixture(scope="module")
def whole(place):
    "An unbroken run of 8 steps with a checkpoint at every second."
    work, cache, folder = place
    assert K.wait(K.child(K.first_line(work, cache, folder / "whole"), folder / "log")) == 0, (folder / "log").read_text()[-3000:]
    return K.result(folder / "whole")


def resumed(out, place, *more):
    log = Path(f"{out}.resume.log")
    assert K.wait(K.child(K.resume_line(out, *more), log)) == 0, log.read_text()[-3000:]
    return K.result(out)


# not finite

@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["task loss", "retention loss", "gradient"])
def test_what_is_not_finite_is_skipped_and_counted(where, value, stream):
    from craft_nb.trainer import one_step
    trainer = tiny_run(CraftConfig(retention_freq=2, projection_scope="layer" if stream else "global"))
    w = trainer.policy.w.weight
    for step in range(6):
        before, lam, hook = w.detach().clone(), trainer.retention.duals["shared"].lam, None
        fault = step == 2 or (step == 3 and where != "retention loss")  # with retention, and without
        if fault and where == "task loss":
            trainer.batches = itertools.chain([spoilt(next(trainer.batches), "y", value)], trainer.batches)
        if fault and where == "retention loss":
            trainer.retention.line = itertools.chain(
                [spoilt(next(trainer.retention.line), "teacher_hidden", value)], trainer.retention.line)
        if fault and where == "gradient": hook = w.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), value))
        record = one_step(trainer)
        if hook: hook.remove()
        assert bool(record["skipped"]) == fault and torch.equal(w, before) == fault
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        if fault: assert trainer.retention.duals["shared"].lam == lam
    assert trainer.nonfinite == 1 + (where != "retention loss") and torch.isfinite(w).all()
    assert trainer.retention.duals["shared"].lam not in (1.0, math.nan)


def spoilt(batch, key, value): return batch | {key: batch[key].index_fill(0, torch.tensor([0]), value)}


def test_too_many_in_a_row_end_with_a_checkpoint():
    trainer, saved = tiny_run(CraftConfig(max_nonfinite_steps=3)), []
    trainer.steps, trainer.checkpoint = 50, lambda t: saved.append(t.step)
    good = itertools.islice(trainer.batches, 5)
    trainer.batches = itertools.chain(good, (spoilt(b, "x", math.nan) for b in trainer.batches))
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite .*task_loss.* at step 8"): trainer.fit()
    assert saved == [8]


# signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_behind_the_step_with_a_checkpoint(place, whole, number):
    work, cache, folder = place
    out = folder / number.name
    pid = K.child(K.first_line(work, cache, out, save_freq=100), log := Path(f"{out}.log"))
    while not K.ended(pid) and not ((out / "metrics.jsonl").exists() and len(K.rows(out)) >= 2): time.sleep(0.005)
    os.kill(pid, number)
    assert K.wait(pid) == 128 + number, log.read_text()[-3000:]
    done = K.rows(out)[-1]["step"]
    assert f"Trained to step {done}/8 ({number.name})" in log.read_text()
    assert os.readlink(out / "checkpoints/last") == f"00000{done}"
    again = resumed(out, place)
    assert not [k for k in K.difference(again, whole) if k != "rows"] and again["rows"] == whole["rows"]


# disks

class Late(Callback):
    "Calls `what` behind step `step`."
    order = 90
    def __init__(self, step, what): self.step, self.what = step, what
    def after_step(self, trainer, record):
        if trainer.step == self.step: self.what()


def test_a_full_disk_loses_nothing_that_was_saved(place, whole):
    work, cache, folder = place
    out = folder / "full"
    full = Late(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)))  # the weights are larger
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(K.first_line(work, cache, out), "one", [full]), codes=(70,))
    log = Path(f"{out}.log.0").read_text()
    assert "the checkpoint 000004 could not be written" in log and "the last whole checkpoint is" in log
    assert "Make room, then resume" in log
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000002", "last"]
    assert os.readlink(out / "checkpoints/last") == "000002"
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "error"
    assert not K.difference(resumed(out, place), whole)


def test_an_output_folder_that_cannot_be_written_is_refused():
    from craft_nb.lerobot import require_writable
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / "file").touch()
        with pytest.raises(PermissionError, match="file is a file. Give another --output_dir"):
            require_writable(tmp / "file" / "run")
        require_writable(tmp / "new" / "run")
        (tmp / "kept").mkdir()
        tmp.chmod(0o755), (tmp / "kept").chmod(0o555)
        if (pid := os.fork()) == 0:
            try:
                if os.getuid() == 0: os.setuid(65534)
                require_writable(tmp / "kept" / "run")
            except PermissionError as e: os._exit(0 if "is read-only" in str(e) else 2)
            os._exit(1)
        assert K.wait(pid) == 0

# memory and workers

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_in_the_anchor_pass_says_what_to_lower(error, backward):
    trainer = tiny_run(CraftConfig(anchor_batch_size=6))
    own = trainer.retention.adapter.features
    def features(*args):
        if not backward: raise error
        f = own(*args)
        f.hidden[-1].register_hook(lambda g: (_ for _ in ()).throw(error))
        return f
    trainer.retention.adapter.features = features
    with pytest.raises(RuntimeError, match=r"out of memory in the pass over 6 anchors at once: lower "
                                           r"--craft.anchor_batch_size \(now 6\), or set --craft.anchor_micro_batch"):
        trainer.fit()


def test_other_errors_are_not_renamed():
    trainer = tiny_run(CraftConfig())
    trainer.retention.adapter.features = lambda *a: (_ for _ in ()).throw(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="^shapes differ$"): trainer.fit()


def test_a_callback_that_fails_on_the_error_does_not_hide_it():
    class Fails(Callback):
        def after_step(self, trainer, record): raise ValueError("first")
        def on_error(self, trainer, error): raise OSError("second")
    trainer = tiny_run(CraftConfig())
    trainer.callbacks = [Fails()]
    with pytest.raises(ValueError, match="first") as e: trainer.fit()
    assert e.value.__notes__ == ["Fails: second"]


def test_a_dead_worker_ends_clearly(place, whole):
    work, cache, folder = place
    out = folder / "worker"
    flags = [f for f in K.first_line(work, cache, out) if not f.startswith("--num_workers")] + ["--num_workers=1"]
    kill = Late(3, lambda: [os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()])
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(flags, "one", [kill]), codes=(70,))
    assert "DataLoader worker" in Path(f"{out}.log.0").read_text() and os.readlink(out / "checkpoints/last") == "000002"
    assert not K.difference(resumed(out, place), whole)
