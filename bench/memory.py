"""Peak memory of live tensor storages: what an allocator would have had to hold, on any device."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Inside the `with`: `live` and `peak` bytes of the storages that operations made,
    beside those that `known` tensors hold already."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.refs, self.live, self.peak = {}, 0, 0
        self.skip = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self._hold(t.untyped_storage())
        return out

    def _hold(self, storage):
        size, key = storage.nbytes(), storage._cdata
        if not size or key in self.refs or storage.data_ptr() in self.skip: return
        def freed(_):
            self.live -= size
            del self.refs[key]
        self.refs[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


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
