"""Kill craft-train with SIGKILL: `python tests/kill_training.py 20 [seed [policy]]`; without a seed and a policy both
are drawn. Each run is killed at random moments, every other time inside a checkpoint write, and resumed by its own
command line until it gets through; weights, optimizer, λ, counters and metrics must then equal those of an unbroken
run, bit for bit."""
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

CRAFT = dict(anchor_batch_size=4, retention_freq=2, conflict_threshold=0.9, controller="pi", pi_kp=2.0,
             epsilon_start=1e-4, epsilon_end=1e-5, lambda_lr=0.5, lambda_update_every=2)


POLICIES = ("pi0_fast", "pi0", "smolvla")


def prepare(folder, work=None, seed=0, kind="pi0_fast"):  # → work, folder of a cache
    "A tiny policy and data set, and an anchor cache made by that policy."
    from craft_nb.lerobot import BuildCacheConfig, build_cache
    from craft_nb.small import tiny_workload
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.policies import PreTrainedConfig
    work, cache = work or tiny_workload(Path(folder) / "work", episodes=1), Path(folder) / "cache"
    if not cache.exists():
        policy = PreTrainedConfig.from_pretrained(path := policy_of(work, kind))
        policy.pretrained_path, policy.push_to_hub = path, False
        build_cache(BuildCacheConfig(dataset=DatasetConfig(repo_id=str(work.root)), policy=policy, out_dir=str(
            cache), num_anchors=24, views="pooled," + ("action_logits" if kind == "pi0_fast" else "answer"),
                                     batch_size=8, seed=seed, allow_undecodable=True), progress=False)
    return work, cache


def policy_of(work, kind):
    if kind == "pi0_fast": return work.policy_path
    from craft_nb.zoo import zoo_checkpoint
    return zoo_checkpoint(work, kind, steps=4)


def first_line(work, cache, out, *more, steps=8, save_freq=2, kind="pi0_fast", **craft):
    "The flags of a fresh run."
    craft = CRAFT | dict(anchor_cache_dir=cache) | craft
    own = dict(steps=steps, save_freq=save_freq, batch_size=2, num_workers=0, log_freq=0, seed=3) | {
        "policy.path": policy_of(work, kind), "dataset.repo_id": work.root, "output_dir": out}
    return [f"--{k}={v}" for k, v in (own | {f"craft.{k}": v for k, v in craft.items()}).items()] + [
        "--env_eval_freq=0", "--dataloader_multiprocessing_context=fork", *more]


def epochs(work):
    "Flags for epochs of three steps: one episode, whose last batch is incomplete."
    from lerobot.datasets import LeRobotDatasetMetadata
    frames = int(LeRobotDatasetMetadata("local/x", root=work.root).episodes["length"][0])
    return ["--dataset.episodes=[0]", f"--batch_size={frames // 3 + 1}"]


def resume_line(out, *more):
    return ["--resume", f"--config_path={out}/checkpoints/last/pretrained_model/train_config.json", *more]


def leave(run):
    "Call `run` and end the process with the exit code that Python would give, 70 for an exception."
    code = 70
    try:
        run()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        if code != e.code: print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def child(argv, log):
    "pid of a process that is `craft-train argv`, forked so that it need not import anything."
    if pid := os.fork(): return pid
    try:
        torch.set_num_threads(1)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1), os.dup2(fd, 2)
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), ["craft-train"]
        from craft_nb.cli import train
        leave(lambda: train(argv))
    finally: os._exit(70)


def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows(out):
    return [r for r in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if "event" not in r]


def result(out):
    "All that must be equal: name → bytes or values."
    last = Path(out) / "checkpoints" / "last"
    names = [p.relative_to(last) for p in last.rglob("*")
             if p.is_file() and p.suffix == ".safetensors" or p.name in ("craft_state.json", "scheduler_state.json")]
    return {str(n): (last / n).read_bytes() for n in names} | {
        "rows": [{k: v for k, v in r.items() if k != "seconds"} for r in rows(out)]}


def difference(a, b): return [k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]


def drafts(out): return Path(out).glob("checkpoints/.*.unfinished")


def ended(pid): return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_at_random(out, pid, span, rng):
    end = time.monotonic() + rng.uniform(0, 1) * span
    while time.monotonic() < end and not ended(pid): time.sleep(0.005)


def wait_for_draft(out, pid, span, rng):
    "Until a checkpoint is being written, and a moment into it; one in three of them is let through."
    old = {d.stat().st_ino for d in drafts(out)}  # left by the last kill
    while not ended(pid):
        fresh = [d for d in drafts(out) if inode(d) not in old]
        if fresh and rng.random() < 0.7: return time.sleep(rng.uniform(0, 0.03))
        old |= {inode(d) for d in fresh}
        time.sleep(0.001)


def inode(path):
    try: return path.stat().st_ino
    except FileNotFoundError: return None


def broken_run(out, argv, kills, span, rng, log):
    "Run `argv` with `kills` kills. → how many of them fell into a checkpoint write."
    writing = 0
    for k in range(10**6):
        started = (Path(out) / "checkpoints" / "last").exists()
        if not started: shutil.rmtree(out, ignore_errors=True)
        pid = child(resume_line(out) if started else argv, log)
        if k >= kills:
            code = wait(pid)
            assert code == 0, f"the resumed run ended with exit code {code}:\n{Path(log).read_text()[-3000:]}"
            return writing
        moment = wait_for_draft if k % 2 == 0 else wait_at_random
        moment(out, pid, span, rng)
        os.kill(pid, signal.SIGKILL)  # a process that ended by itself waits to be asked for its code
        if wait(pid) == -signal.SIGKILL: writing += any(drafts(out))


def kill_runs(folder, work, cache, kills, per_run=3, seed=0, progress=False, **craft):  # → runs, kills inside a write
    "`kills` kills, at most `per_run` in one run."
    folder, rng, runs, writing = Path(folder), random.Random(seed), 0, 0
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    def flags(out):
        return [*(f for f in first_line(work, cache, out, **craft) if not f.startswith("--batch_size")), *epochs(work)]
    status = wait(child(flags(folder / "whole"), folder / "log"))
    assert status == 0, (folder / "log").read_text()[-3000:]
    span, whole = time.monotonic() - start, result(folder / "whole")
    assert ([r["step"] for r in whole["rows"]] == list(range(1, 9)) and any(r["projected"] for r in whole["rows"])
            and len({r["lambda"] for r in whole["rows"]}) > 2)
    # two borders of epochs were crossed
    assert json.loads(whole["training_state/craft_state.json"])["data"]["epoch"] == 2
    while kills > 0:
        n, out = min(per_run, kills), folder / f"run{runs}"
        writing += broken_run(out, flags(out), n, span, rng, folder / "log")
        wrong = difference(result(out), whole)
        assert not wrong, f"run {runs} differs from the unbroken one: {wrong}"
        if progress: print(f"{n} kills: bit-equal", flush=True)
        shutil.rmtree(out)
        kills, runs = kills - n, runs + 1
    return runs, writing


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    args = sys.argv[1:]
    n, seed = int(args[0]) if args else 20, int(args[1]) if len(args) > 1 else random.randrange(1000)
    kind = args[2] if len(args) > 2 else random.Random(seed).choice(POLICIES)
    print(f"{kind}, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        runs, writing = kill_runs(tmp, *prepare(tmp, kind=kind), n, seed=seed, progress=True, kind=kind)
    print(f"{kind}: {n} kills over {runs} runs, {writing} of them inside a checkpoint write: "
          "every resumed run is bit-equal to the unbroken one")
