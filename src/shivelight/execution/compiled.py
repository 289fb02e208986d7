"""Blocks as compiled graphs: which there are, how many, and how long they took.

Blocks of one kind share a graph. Each number of tokens has one of its own (static shapes), or all share one of any length;
everything around the blocks, which decides and keeps state, stays Python. torch compiles by code object and gives up after a few
forms of one; each of ours is therefore a code object of its own, so that their number is ours to bound. torch's guards stay in
force: another batch size, dtype or length of the text is compiled anew, never run by a graph that does not fit.
"""

import statistics
import time
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from shivelight.errors import ShivelightError

Lengths = Literal["auto", "static", "dynamic"]
# Up to so many numbers of tokens in a schedule, each has a graph of its own without asking the clock.
_FEW = 4
# How much slower a graph of any length may be than one of a single length, to save the others.
_TOLERATED = 1.02
_ROUNDS = 9
_LEFT = "as it is"


class Regions:
    """Runs pieces of a forward pass as they are; see `CompiledRegions`."""

    def form(self, block: nn.Module) -> tuple[Hashable, ...]:
        """The part of a key that blocks share which are built alike."""
        return ()

    def new_to(self, key: Hashable) -> bool:
        """Whether blocks should run beforehand, for the first time under this key, what later prompts may ask of them."""
        return False

    def run(self, key: tuple[Hashable, ...], function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives."""
        return function(*args)

    def run_tokens(
        self,
        key: tuple[Hashable, ...],
        indices: Tensor,
        counts: Callable[[], int],
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """What a function gives that runs on the tokens `indices` [B, k], which are among its arguments; `counts` says how many
        values k takes in this generation."""
        return function(*args)


class CompiledRegions(Regions):
    """Runs pieces of a forward pass as compiled graphs, wherever no gradients are recorded.

    Args:
        lengths: "static" compiles a graph for each number of tokens, "dynamic" one for all; "auto" measures both at the first
            block that leaves tokens out, unless there are only few numbers.
        options: of `torch.compile`.

    Attributes:
        chosen: what is done about lengths; "auto" until it was measured.
        measured_ms: medians of one block, by kind of length, where "auto" measured.
        graphs: how many were compiled so far.
        seconds: spent on it, first runs included.
        left: blocks that run as they are.
    """

    def __init__(self, lengths: Lengths, options: dict[str, Any]) -> None:
        if lengths not in get_args(Lengths):
            raise ShivelightError(f"lengths is {lengths!r}; one of {', '.join(map(repr, get_args(Lengths)))}.")
        self.chosen: Lengths = lengths
        self.measured_ms: dict[str, float] = {}
        self.options = {"fullgraph": True, **options}
        self.graphs = 0
        self.seconds = 0.0
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self.left: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._seen: set[Hashable] = set()
        self._forms: dict[Hashable, int] = {}
        self._form_of: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, ...]] = weakref.WeakKeyDictionary()

    def form(self, block: nn.Module) -> tuple[Hashable, ...]:
        """See `Regions.form`."""
        if block in self.left:
            return (_LEFT,)
        found = self._form_of.get(block)
        if found is None:
            # Blocks that differ would be forms of one code object, and torch gives up after a few.
            layers = tuple((name, type(layer)) for name, layer in block.named_modules())
            shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
            number = self._forms.setdefault((layers, shapes), len(self._forms))
            found = self._form_of[block] = (type(block).__name__, number)
        return found

    def new_to(self, key: Hashable) -> bool:
        """See `Regions.new_to`."""
        if torch.is_grad_enabled() or key in self._seen:
            return False
        self._seen.add(key)
        return True

    def run(self, key: tuple[Hashable, ...], function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives, by the graph of this key."""
        if self._stays(key):
            return function(*args)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = torch.compile(_own_code(function, key), **self.options)
        before, start = counters["stats"]["unique_graphs"], time.perf_counter()
        try:
            result = compiled(*args)
        except torch._dynamo.exc.Unsupported as error:
            raise ShivelightError(
                f"A block cannot be compiled as one graph ({str(error).splitlines()[0]}). Offloading, hooks and attention of "
                "your own may stand in the way; use shivelight.compile(model, fullgraph=False), which runs those parts as they "
                "are."
            ) from error
        if made := counters["stats"]["unique_graphs"] - before:
            self.graphs += made
            self.seconds += time.perf_counter() - start
        return result

    def run_tokens(
        self,
        key: tuple[Hashable, ...],
        indices: Tensor,
        counts: Callable[[], int],
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """See `Regions.run_tokens`."""
        if self._stays(key):
            return function(*args)
        ways: dict[str, tuple[Hashable, ...]] = {"static": (*key, indices.shape[1]), "dynamic": (*key, "any")}
        if self.chosen == "auto" and counts() > _FEW:
            self._measure(ways, indices, function, args)
        way = "static" if self.chosen == "auto" else self.chosen
        if way == "dynamic":
            torch._dynamo.maybe_mark_dynamic(indices, 1)
        return self.run(ways[way], function, *args)

    def _stays(self, key: tuple[Hashable, ...]) -> bool:
        return torch.is_grad_enabled() or key[0] is _LEFT

    def _measure(
        self, ways: dict[str, tuple[Hashable, ...]], indices: Tensor, function: Callable[..., Any], args: tuple
    ) -> None:
        """Settle `chosen` by the clock. Running a block again changes nothing: what it writes, it writes again."""
        taken: dict[str, list[float]] = {way: [] for way in ways}
        unmarked = indices
        for _ in range(_ROUNDS):
            for way, key in ways.items():
                indices = unmarked.clone()  # marks belong to the tensor
                if way == "dynamic":
                    torch._dynamo.maybe_mark_dynamic(indices, 1)
                given = [indices if value is unmarked else value for value in args]
                _wait(indices.device)
                start = time.perf_counter()
                self.run(key, function, *given)
                _wait(indices.device)
                taken[way].append(time.perf_counter() - start)
        self.measured_ms = {
            way: 1000 * statistics.median(times[2:]) for way, times in taken.items()
        }  # after compilation
        slower = self.measured_ms["dynamic"] > _TOLERATED * self.measured_ms["static"]
        self.chosen = "static" if slower else "dynamic"

    def __str__(self) -> str:
        how = "one graph for any number" if self.chosen == "dynamic" else "a graph for each number"
        ms = ", ".join(f"{way} {value:.2f} ms" for way, value in self.measured_ms.items())
        return f"{self.graphs} graphs in {self.seconds:.1f} s; {how} of tokens" + (
            f" (measured on a block: {ms})" if ms else ""
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _own_code(function: Callable[..., Any], key: tuple[Hashable, ...]) -> Callable[..., Any]:
    """The same function with a code object of its own, under a name that profiles show."""
    assert isinstance(function, types.FunctionType)
    name = "_".join([function.__name__, *map(str, key)])
    code = function.__code__.replace(co_name=name, co_qualname=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
