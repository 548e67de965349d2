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
    assert (K.wait(K.child(K.first_line(work, cache, folder / "whole"), folder / "log"))
            == 0), (folder / "log").read_text()[-3000:]
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
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite .*task_loss.* at step 8"):
        trainer.fit()
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


# file systems without links

@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"),
                                   PermissionError(1, "Operation not permitted"), NotImplementedError()])
def test_without_symbolic_links(place, whole, monkeypatch, error):
    """A pointer file stands for the link: for the next checkpoint, the summary, resume, and every command that is given
    a path through it."""
    from craft_nb import cli
    work, cache, folder = place
    out = folder / f"nolink-{type(error).__name__}"
    def no(*args, **kw): raise error
    for name in ("symlink", "link"): monkeypatch.setattr(os, name, no)
    monkeypatch.setattr(Path, "symlink_to", no)
    log = Path(f"{out}.log")
    assert (K.wait(K.child([f for f in K.first_line(work, cache, out, "--steps=4") if f != "--steps=8"], log))
            == 0), log.read_text()[-3000:]
    last = out / "checkpoints/last"
    assert last.is_file() and not last.is_symlink() and last.read_text() == "000004\n"
    assert f"checkpoint in {(out / 'checkpoints/000004').resolve()}" in log.read_text()
    policy = f"{last}/pretrained_model"
    R.on_ranks(1, log,
               lambda rank: cli.evaluate([f"--policy.path={policy}", f"--anchors={cache}", f"--out_dir={out}-eval"]))
    R.on_ranks(1, log, lambda rank: cli.build_cache([f"--policy.path={policy}", f"--dataset.repo_id={work.root}",
                                                     f"--out_dir={out}-cache", "--num_anchors=4"]))
    other = ["--steps=4", f"--config_path={policy}/train_config.json", "--resume=true"]
    assert K.wait(K.child(other, log)) == 0, log.read_text()[-3000:]  # finished: left as it is
    assert last.read_text() == "000004\n"
    assert K.wait(K.child(K.resume_line(out, "--steps=8"), log)) == 0, log.read_text()[-3000:]
    assert last.read_text() == "000008\n" and [r["step"] for r in K.rows(out)] == list(range(1, 9))


def test_a_copy_in_the_place_of_the_link_is_kept(place, whole):
    "cp -rL, zip and some mounts turn `last` into a folder."
    work, cache, folder = place
    last = folder / "copied/checkpoints/last"
    shutil.copytree(folder / "whole/checkpoints/000006", last)
    shutil.copy(folder / "whole/metrics.jsonl", folder / "copied")
    log = folder / "copied.log"
    assert (K.wait(K.child(K.resume_line(folder / "copied", f"--output_dir={folder / 'copied'}"), log))
            == 0), log.read_text()[-3000:]
    assert os.readlink(last) == "000008" and (folder / "copied/checkpoints/last.1/training_state").is_dir()
    assert not K.difference(K.result(folder / "copied"), whole)


# two at once

def test_a_second_run_is_refused_while_the_first_writes(place, whole):
    work, cache, folder = place
    out = folder / "twice"
    first = K.child(K.first_line(work, cache, out, steps=10**6, save_freq=2), Path(f"{out}.log"))
    while not K.ended(first) and not ((out / "checkpoints/last").exists()): time.sleep(0.01)
    held = json.loads((out / ".craft.lock").read_text())
    assert held["pid"] == first and held["command"] == "craft-train"
    for argv in (K.first_line(work, cache, out), K.resume_line(out), K.resume_line(out, "--steps=4")):
        log = Path(f"{out}.second.log")
        assert K.wait(K.child(argv, log)) == 1
        said = log.read_text()
        assert (f"process {first} on " in said
                and "writes here; wait for it, stop it, or give another --output_dir" in said)
        assert not K.ended(first)
        log.unlink()
    other = f"{out}-other"  # another folder of its own may go on from what is there
    assert K.wait(K.child(K.resume_line(out, f"--output_dir={other}", "--steps=4"), log)) in (0, 1)
    os.kill(first, signal.SIGKILL)
    K.wait(first)
    assert (out / ".craft.lock").exists()
    log = Path(f"{out}.third.log")
    done = int(os.readlink(out / "checkpoints/last"))
    assert K.wait(K.child(K.resume_line(out, f"--steps={done + 1}"), log)) == 0, log.read_text()[-3000:]  # taken over
    assert not (out / ".craft.lock").exists() and K.rows(out)[-1]["step"] == done + 1


def test_the_lock_of_a_run_in_python(place):
    from craft_nb.cli import parsed, today
    from craft_nb.lerobot import CraftTrainConfig, finish, make_trainer
    from craft_nb.machine import holder
    work, cache, folder = place
    out = folder / "python/run"
    def config(*more):
        return parsed(CraftTrainConfig,
                      today([*[f for f in K.first_line(work, cache, out) if f not in ("--steps=8", "--save_freq=2")],
                             "--steps=1", "--save_checkpoint=false", *more], True))
    def python(rank):
        first = make_trainer(config(), quiet=True)
        second = make_trainer(config(), quiet=True)  # the cell is run again
        with pytest.raises(FileExistsError, match="another trainer was made for this folder since"): first.fit()
        class Asks(Callback):
            def after_step(self, trainer, record):
                with pytest.raises(FileExistsError, match="this very process .* writes here"):
                    make_trainer(config(), quiet=True)
        second.callbacks.insert(0, Asks())
        second.fit()
        assert holder(out) == "" and not (out / ".craft.lock").exists()
        finish(second)
        with pytest.raises(FileExistsError, match="already exists"): make_trainer(config(), quiet=True)
        shutil.rmtree(out.parent)
        with pytest.raises(ValueError, match="has no view"): make_trainer(config("--craft.views=tokens"), quiet=True)
        import craft_nb.training as ours
        ours.make_order = lambda *args: 1 / 0  # behind the lock
        with pytest.raises(ZeroDivisionError): make_trainer(config(), quiet=True)
        assert not out.parent.exists()
    R.on_ranks(1, folder / "python.log", python)


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


LOST = "was killed by SIGKILL, most often because the machine ran out of memory. Lower "


def workers(flags, n): return [f for f in flags if not f.startswith("--num_workers")] + [f"--num_workers={n}"]


def kill_workers(number=signal.SIGKILL): return [os.kill(p.pid, number) for p in multiprocessing.active_children()]


def test_a_dead_worker_ends_clearly(place, whole):
    work, cache, folder = place
    out = folder / "worker"
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(workers(K.first_line(work, cache, out), 1), "one",
                                                          [Late(3, kill_workers)]), codes=(70,))
    said = Path(f"{out}.log.0").read_text().splitlines()[-1]
    assert ("a data worker (process " in said
            and LOST + "--num_workers (now 1), --batch_size (now 2) or --prefetch_factor" in said)
    assert os.readlink(out / "checkpoints/last") == "000002" and not (out / ".craft.lock").exists()
    rows = [json.loads(r) for r in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "error" and LOST in rows[-1]["error"]
    assert not K.difference(resumed(out, place), whole)


def test_a_worker_that_dies_while_a_checkpoint_is_written(place, whole, monkeypatch):
    "The checkpoint is whole; only then the run ends, with the true reason."
    from lerobot.common import train_utils
    work, cache, folder = place
    out = folder / "writing"
    own = train_utils.save_training_state
    def save(*args, **kw):
        kill_workers()
        end = time.monotonic() + 0.5
        while time.monotonic() < end: sum(range(100))  # the signal arrives
        return own(*args, **kw)
    monkeypatch.setattr(train_utils, "save_training_state", save)
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(workers(K.first_line(work, cache, out), 2), "one"),
               codes=(70,))
    assert LOST in Path(f"{out}.log.0").read_text().splitlines()[-1]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000002", "last"]
    monkeypatch.undo()
    assert not K.difference(resumed(out, place), whole)


@pytest.mark.parametrize("error",
                         [ConnectionResetError(104, "Connection reset by peer"), BrokenPipeError(32, "Broken pipe"),
                          EOFError(), RuntimeError("DataLoader timed out after 9 seconds")])
def test_whichever_way_a_lost_worker_shows(place, monkeypatch, error):
    "PyTorch's handler is silenced, and its queue gives the error instead."
    from torch.utils.data import dataloader
    work, cache, folder = place
    out = folder / f"way-{type(error).__name__}"
    monkeypatch.setattr(dataloader._utils.signal_handling, "_set_SIGCHLD_handler", lambda: None)
    own = dataloader._MultiProcessingDataLoaderIter._try_get_data
    def get(self, *args, **kw):
        if any(map(ended, self._workers)): raise error
        return own(self, timeout=0.1)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter, "_try_get_data", get)
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(workers(K.first_line(work, cache, out), 2), "one",
                                                          [Late(3, kill_workers)]), codes=(70,))
    said = Path(f"{out}.log.0").read_text().splitlines()[-1]
    assert "a data worker (process " in said and LOST + "--num_workers (now 2)" in said


def ended(process):
    return (not os.path.exists(f"/proc/{process.pid}")
            or Path(f"/proc/{process.pid}/stat").read_text().split(")")[1].split()[0] == "Z")


def test_workers_that_are_spawned(place):
    "LeRobot's default, where all that a worker needs is sent to it; the other tests fork."
    from craft_nb import cli
    work, cache, folder = place
    flags = workers(K.first_line(work, cache, folder / "spawned", steps=2, anchor_num_workers=1, check="false"), 1)
    cli.train([f for f in flags if "multiprocessing_context" not in f])
    assert (folder / "spawned/checkpoints/000002").is_dir()


def test_a_dead_anchor_worker_is_not_taken_for_a_data_worker(place):
    work, cache, folder = place
    out = folder / "anchor-worker"
    before = []
    class Kill(Late):
        def before_fit(self, trainer):
            next(trainer.retention.line)  # its worker starts
            before.extend(multiprocessing.active_children())
    kill = Kill(3, lambda: [os.kill(p.pid, signal.SIGKILL) for p in before])
    R.on_ranks(1, f"{out}.log", lambda rank: R.train_rank(
        workers(K.first_line(work, cache, out, anchor_num_workers=1), 1), "one", [kill]), codes=(70,))
    said = Path(f"{out}.log.0").read_text().splitlines()[-1]
    assert ("an anchor worker (process " in said
            and LOST + "anchor_num_workers (now 1; 0 decodes in the training process)" in said)


def test_a_helper_that_is_still_dying_is_waited_for():
    "Its connection is closed before it is gone; another that ended well must not stand for it."
    from craft_nb.machine import HelperLost, watched
    fork = multiprocessing.get_context("fork")
    def dies():
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(HelperLost, match="a helper.*was killed by SIGKILL.*Lower it"):
        with watched("a helper", "it") as started:
            well, ill = fork.Process(target=time.sleep, args=(0.1,)), fork.Process(target=dies)
            for p in (well, ill): p.start()
            started()
            while well.exitcode is None: time.sleep(0.01)
            raise ConnectionResetError(104, "Connection reset by peer")


def test_a_dead_worker_of_a_build_ends_clearly(place, monkeypatch):
    from craft_nb import builder, cli
    work, cache, folder = place
    own, log = builder.teacher_targets, folder / "build.log"
    calls = []
    def targets(*args):
        if len(calls) == 3: kill_workers()
        calls.append(1)
        return own(*args)
    monkeypatch.setattr(builder, "teacher_targets", targets)
    flags = [f"--policy.path={work.policy_path}", f"--dataset.repo_id={work.root}", f"--out_dir={folder / 'build'}",
             "--num_anchors=24", "--batch_size=2", "--shard_size=4", "--num_workers=2"]
    R.on_ranks(1, log, lambda rank: cli.build_cache(flags), codes=(1,))
    said = Path(f"{log}.0").read_text()
    assert "a data worker (process " in said and LOST + "--num_workers (now 2) or --batch_size (now 2)" in said
    monkeypatch.undo()
    R.on_ranks(1, log, lambda rank: cli.build_cache(flags))
    assert (folder / "build/anchors.json").exists() and not (folder / "build/.craft.lock").exists()


def test_a_dead_simulator_ends_clearly(work, monkeypatch):
    from contextlib import nullcontext
    from craft_nb.machine import HelperLost
    from lerobot.envs import factory
    from lerobot.scripts import lerobot_eval
    import craft_nb.checkpoints as ours
    class Envs: batch_size, use_async_envs = 2, True
    class Config: max_parallel_tasks = 1
    def evaluate(**kw):
        kill_workers()
        raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(factory, "make_env_pre_post_processors", lambda **kw: (None, None))
    monkeypatch.setattr(factory, "make_env", lambda *args, **kw: start_sleeper())
    monkeypatch.setattr("lerobot.envs.utils.close_envs", lambda made: None)
    monkeypatch.setattr(lerobot_eval, "eval_policy_all", evaluate)
    Envs.n_episodes = 2
    class Policy: config = None
    with pytest.raises(HelperLost, match="a simulator .*SIGKILL.*--eval.batch_size"):
        ours.rollouts(Policy, None, None, Config, Envs, 0, nullcontext)


def start_sleeper():
    p = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    p.start()
    return p
