"""Training with several ranks on CPU (gloo), forked so that none has to import anything."""
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from kill_training import ended, first_line, leave, wait

SGD = ["--use_policy_training_preset=false", "--optimizer.type=sgd", "--optimizer.lr=0.05", "--optimizer.momentum=0.9",
       "--optimizer.grad_clip_norm=1.0", "--scheduler.type=cosine_decay_with_warmup", "--scheduler.num_warmup_steps=2",
       "--scheduler.num_decay_steps=50", "--scheduler.peak_lr=0.05", "--scheduler.decay_lr=0.005"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_rank(rank, world, port, log, run):
    "pid of a process that is rank `rank` of `world` and calls `run(rank)`."
    if pid := os.fork(): return pid
    try:
        torch.set_num_threads(1)
        fd = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1), os.dup2(fd, 2)
        sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), ["craft-train"]
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        from accelerate.state import AcceleratorState, GradientState
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        leave(lambda: run(rank))
    finally: os._exit(70)


def on_ranks(world, log, run, codes=(0,)):
    "Call `run(rank)` in `world` processes; all must end with an exit code of `codes`."
    port = free_port()
    pids = [start_rank(r, world, port, log, run) for r in range(world)]
    while not all(map(ended, pids)):
        if any(ended(p) and os.waitid(os.P_PID, p, os.WEXITED | os.WNOWAIT).si_status not in codes for p in pids):
            time.sleep(1)
            for p in pids: os.kill(p, signal.SIGKILL)  # the others would wait for it
        time.sleep(0.02)
    found = [wait(p) for p in pids]
    assert set(found) <= set(codes), f"exit codes {found}\n" + "\n".join(
        Path(f"{log}.{r}").read_text()[-2500:] for r in range(world))
    return found


def fsdp_on_cpu(**how):
    """Accelerate takes FSDP for accelerators only, so it is told;
    all else is its own path: full shards by decoder layer, original parameters."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed import fsdp
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    how = how or dict(auto_wrap_policy="transformer_based_wrap",
                      transformer_cls_names_to_wrap=["_PiGemmaDecoderLayerBase"])
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, use_orig_params=True, cpu_ram_efficient_loading=False,
                                            **how)
    acc = Accelerator(cpu=True, step_scheduler_with_optimizer=False, fsdp_plugin=plugin)
    for state in (PartialState._shared_state, acc.state.__dict__):
        state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    acc.state.fsdp_plugin = plugin
    # what LeRobot gathers with; moving to the CPU what is there already leaves a view of memory that FSDP frees
    own = fsdp.FullStateDictConfig
    fsdp.FullStateDictConfig = lambda offload_to_cpu=False, **kw: own(offload_to_cpu=False, **kw)
    return acc


def train_rank(argv, kind, callbacks=()):
    "What each rank does: the command, with an accelerator of `kind`."
    from craft_nb.cli import parsed, today
    from craft_nb.lerobot import CraftTrainConfig, train
    return train(parsed(CraftTrainConfig, today(argv, True)), callbacks, fsdp_on_cpu() if kind == "fsdp" else None,
                 quiet=True)


def line(work, cache, out, world, **more):
    "One global batch of two frames and four anchors, whether by two ranks or by one in two micro-batches."
    share = dict(anchor_batch_size=2) if world == 2 else dict(anchor_batch_size=4, anchor_micro_batch=2,
                                                              gradient_accumulation_steps=2)
    how = dict(conflict_threshold=0.1, lambda_lr=0.02, controller="ascent", lambda_update_every=1) | share | more
    return ([f for f in first_line(work, cache, out, *SGD, **how) if not f.startswith("--batch_size")]
            + ["--batch_size=1"])
