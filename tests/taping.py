"""What CUDA graphs do, on a CPU: operators are recorded with the memory they read and write, and run again on that memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shivelight.adapter import routed_of
from shivelight.execution.replay import Replays

# A device's values on the host, or the host's on the device: a graph cannot hold either.
_WAITING = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[tuple[int, Tensor]]]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.name().startswith(_WAITING):
            raise RuntimeError(f"{func} cannot be captured")
        read = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and _place(value) not in self.made and _place(value) not in self.before:
                self.before[_place(value)] = value, value.clone()
        output = func(*args, **kwargs)
        known = {_place(value) for value in read}
        given = [value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)]
        new = [(place, value) for place, value in enumerate(given) if _place(value) not in known]
        self.made |= {_place(value): value for _, value in new}
        self.calls.append((func, args, kwargs, new))
        return output


class OperatorRecorder:
    """A `Recorder` of what runs on a CPU. As in a CUDA graph, nothing is computed while it records: what was made is no number."""

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with _Operators() as tape:
            output = function()
        for value, before in tape.before.values():
            value.copy_(before)
        for value in tape.made.values():
            if value.is_floating_point():
                value.fill_(torch.nan)
            elif value.dtype is not torch.bool:
                value.zero_()

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, made in tape.calls:
                found = [value for value in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
                for place, own in made:
                    own.copy_(found[place])

        return output, replay


def taped(pipe: Any) -> Any:
    """Let passes of an attached pipeline be recorded and replayed on the CPU; its `Routed`."""
    routed = routed_of(pipe)
    routed.replays = Replays(routed, OperatorRecorder, "cpu")
    return routed
