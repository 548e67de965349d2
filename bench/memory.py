"""Peak memory on any device: the allocator's on a GPU, live tensor storages on a CPU."""
from collections.abc import Callable

import torch

from craft_nb.trainer import PeakMemory


def peak_memory(run: Callable[[], object], model) -> int:
    "Peak bytes while `run()` runs, weights and buffers of `model` included."
    if (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    with PeakMemory(*model.parameters(), *model.buffers()) as memory: run()
    return memory.peak + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def extra_copies(run_plain, run_craft, model) -> float:
    """Peak memory of `run_craft` over that of `run_plain`, in gradient copies of `model`.
    Both are called warm, with gradients dropped before."""
    peaks = []
    for run in (run_plain, run_craft):
        for measured in (False, True):
            model.zero_grad(set_to_none=True)
            with PeakMemory(*model.parameters(), *model.buffers()) as memory: run()
            if measured: peaks.append(memory.peak)
    model.zero_grad(set_to_none=True)
    return (peaks[1] - peaks[0]) / sum(p.nbytes for p in model.parameters() if p.requires_grad)
