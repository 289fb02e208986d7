"""How much memory a run takes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory_mb(run: Callable[[], object], device: torch.device | str) -> float | None:
    """The most CUDA memory in use during `run`, weights included, in 10^6 bytes; None on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


def working_memory_mb(run: Callable[[], object], device: torch.device | str) -> float:
    """What a run needs beyond what is there before it, in units of 1e6 bytes."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device) / 1e6
        peak = peak_memory_mb(run, device)
        assert peak is not None
        return peak - before
    with LiveTensors() as live:
        run()
    return live.most / 1e6


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, while they live; what a kernel takes for itself is not among them.

    Attributes:
        most: bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operator as it is."""
        made = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._see(tensor.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self._now -= size
