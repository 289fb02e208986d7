"""What a block runs as one piece: gather, the block's own forward, write-back. Eager and compiled alike, since nothing in here
looks at values or changes which hooks a layer has.

Inner layers may be lent something for the time of a run: keys and values of tokens that rest, the angles of those that run. The
forward hooks that do it (`Tap`) stay where they are from one run to the next, so that a compiled graph that was traced with them
fits every later run. Shapes: B samples, N image tokens, k kept tokens, D width.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.execution.call import BlockCall
from shivelight.execution.tokens import write_back
from shivelight.execution.width import OwnForward, call_narrow


class Loan(Protocol):
    """What an inner layer's output is replaced by for the time of one run; `used` says whether the layer ran."""

    used: bool

    def __call__(self, output: Tensor) -> Tensor:
        """The layer's output, completed or changed."""


class Tap:
    """A forward hook that does what it is lent, and nothing while it is lent nothing."""

    def __init__(self) -> None:
        self.loan: Loan | None = None

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """In the place of the layer's output."""
        return output if self.loan is None else self.loan(output)


# Of each layer that ever had one: (its tap, the handle of its hook). Compiled graphs know a hook by the handle's number, so that a
# layer which is tapped again, by whatever adapter, gets the same one back.
_PLACED: weakref.WeakKeyDictionary[nn.Module, tuple[Tap, Any]] = weakref.WeakKeyDictionary()


class Taps:
    """The taps on the layers of one block, put on when they are first needed, and moved where a layer was exchanged for another
    (a LoRA)."""

    def __init__(self) -> None:
        self._layers: dict[str, nn.Module] = {}

    def on(self, layers: Mapping[str, nn.Module]) -> dict[str, Tap]:
        """Those of these layers, by name."""
        for name, layer in layers.items():
            before = self._layers.get(name)
            if before is not layer:
                if before is not None:
                    _take_off(before)
                self._layers[name] = layer
                _put_on(layer)
        return {name: _PLACED[layer][0] for name, layer in layers.items()}

    def remove(self) -> None:
        """Take all of them off."""
        for layer in self._layers.values():
            _take_off(layer)
        self._layers.clear()


def _put_on(layer: nn.Module) -> None:
    if layer in _PLACED:
        tap, handle = _PLACED[layer]
        layer._forward_hooks[handle.id] = tap
    else:
        tap = Tap()
        _PLACED[layer] = tap, layer.register_forward_hook(tap)


def _take_off(layer: nn.Module) -> None:
    layer._forward_hooks.pop(_PLACED[layer][1].id, None)


def run_whole(
    forward: Callable[..., Any],
    arguments: dict[str, Any],
    narrow: tuple[OwnForward, dict[str, Tensor]] | None,
    taps: Mapping[str, Tap],
    loans: Mapping[str, Loan],
) -> Any:
    """What a block returns for these arguments.

    Args:
        forward: the block's own.
        arguments: by name.
        narrow: the block's forward with the parameters to replace (`NarrowMlps.replacements`); None for its own.
        taps: of the layers that are lent something, by name.
        loans: what they are lent.
    """
    for name, tap in taps.items():
        tap.loan = loans[name]
    try:
        if narrow is None:
            return forward(**arguments)
        return call_narrow(*narrow, **arguments)
    finally:
        for tap in taps.values():
            tap.loan = None


def run_some(
    kind: BlockSpec,
    forward: Callable[..., Any],
    arguments: dict[str, Any],
    text_tokens: int,
    indices: Tensor,
    attends_all: bool,
    completes: bool,
    unturned: dict[str, Any],
    narrow: tuple[OwnForward, dict[str, Tensor]] | None,
    taps: Mapping[str, Tap],
    loans: Mapping[str, Loan],
) -> tuple[Tensor, Tensor | None]:
    """(image, text) of a block that runs on some tokens.

    Args:
        kind: of the block.
        forward, narrow, taps, loans: see `run_whole`.
        arguments: of all tokens, by name.
        text_tokens: M, where the kind's streams are joined.
        indices: [B, k], the tokens that run.
        attends_all: whether they attend to all N (keys and values lent).
        completes: whether the image is given back whole, [B, N, D], the other tokens as they were; else [B, k, D].
        unturned: arguments to replace, from `rotary.turning`.
    """
    call = BlockCall(kind, (), arguments, text_tokens)
    gathered = call.on_tokens(call.image, indices, attends_all) | unturned
    image, text = call.split(run_whole(forward, gathered, narrow, taps, loans))
    return write_back(call.image, indices, image) if completes else image, text
