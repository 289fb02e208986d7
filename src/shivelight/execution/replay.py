"""Whole passes of the backbone, recorded once and replayed without Python: CUDA graphs of a denoising step.

Where blocks are small, launching their kernels takes longer than running them. What a pass does at each step is known before the
first one (static budgets), so every step can have a graph of its own: with its own numbers of tokens, its own blocks at rest.
A pass reads what the one before left behind (residuals, keys and values) where that one's graph writes it: graphs of one generation
are recorded in order, and replayed in order.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shivelight.errors import ShivelightError
from shivelight.execution.folding import FoldedWeights
from shivelight.execution.gates import Spending
from shivelight.execution.pricing import Load
from shivelight.execution.routed import NAME, Routed

# Generations that are kept: each has the memory of its own passes.
_MOST = 4
# Settings of a LoRA that are numbers in Python, and so part of what is recorded.
_SETTINGS = ("scaling", "active_adapters", "disable_adapters", "merged")


class Recorder(Protocol):
    """Records what a function does on a device, and nothing is computed until it is replayed."""

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """(what the function gave, what computes it anew, from the same memory into the same memory).

        Raises:
            RuntimeError: the function did what cannot be recorded, such as waiting for the device.
        """


class CudaRecorder:
    """Records CUDA graphs that share their memory, as they run one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function()
        self._pool = graph.pool()
        return output, graph.replay


@dataclass
class _Pass:
    """One recorded pass.

    Attributes:
        inputs: tensors that it reads; to be written into before it is replayed.
        output: leaves of what the backbone returns.
        form: of the output.
        replay: runs it.
        spending: what it adds to the generation's.
    """

    inputs: list[Tensor]
    output: list[Any]
    form: pytree.TreeSpec
    replay: Callable[[], None]
    spending: Spending

    def __call__(self, inputs: list[Tensor]) -> Any:
        """What the backbone returns for these inputs; copies, since the next pass may write over them."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return pytree.tree_unflatten(
            [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.output], self.form
        )


@dataclass
class _Tape:
    """One kind of generation: what it goes by, and its passes in order, none before they are recorded.

    Attributes:
        parts: what the passes read and go by besides their inputs, as of the first one.
        record: records them.
        passes: by their (step, call, branch and form of the inputs).
        load: what they hold; None where nothing is routed.
        asked: of the planner, and its answer, which stands before the first of them.
        last: step of the last one.
    """

    parts: list[Any]
    record: Recorder
    passes: dict[Hashable, _Pass] = field(default_factory=dict)
    load: Load | None = None
    asked: Any = None
    last: int = -1


class Replays:
    """Stands between a backbone's callers and its forward: of each kind of generation, runs the first as it is, records the second
    and replays the rest.

    A recording holds for the same shapes of inputs, steps, budget, plan, places of the weights (what they are may change) and LoRA
    settings; anything else is run and recorded anew. Generations whose blocks ask the samples (`decide` other than "static"),
    random selection, training and bare passes run as they are.

    Args:
        routed: state of the backbone.
        recorder: makes what records a generation.
        device_type: of what it can record; passes elsewhere run as they are.
    """

    def __init__(
        self, routed: Routed, recorder: Callable[[], Recorder] = CudaRecorder, device_type: str = "cuda"
    ) -> None:
        self._routed, self._recorder, self._device_type = routed, recorder, device_type
        self._tapes: OrderedDict[Hashable, _Tape] = OrderedDict()  # by kind of generation
        self._tape: _Tape | None = None
        self._recording = False
        self._generation: int | None = None

    def __str__(self) -> str:
        recorded = [tape for tape in self._tapes.values() if tape.passes]
        return f"{sum(len(tape.passes) for tape in recorded)} passes recorded, {len(recorded)} kinds of generations"

    def __call__(self, backbone: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the backbone's forward returns for these arguments."""
        context = self._routed.context
        leaves, structure = pytree.tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        form = structure, tuple(_form(leaf) for leaf in leaves)
        if context.generation != self._generation:
            self._generation = context.generation
            self._begin(backbone, form, inputs)
        tape = self._tape
        if tape is None or context.steps is None:
            return forward(*args, **kwargs)
        key = context.step, context.call, context.branch, form
        found = tape.passes.get(key)
        if found is None:
            if not self._recording:
                self._drop(tape)
                raise ShivelightError(
                    f"Pass {context.call + 1} of step {context.step + 1} is not like that of the generation that was recorded, "
                    "and what it would go on from was only replayed. Run the generation again, which records it anew, or "
                    "compile with cuda_graphs=False."
                )
            found = tape.passes[key] = self._record(tape, forward, leaves, structure)
            tape.last = context.step
        self._routed.spending.include(found.spending)
        return found(inputs)

    def _begin(self, backbone: nn.Module, form: Hashable, inputs: Sequence[Tensor]) -> None:
        """A generation begins: it runs as it is (there is no tape then), is recorded, or replayed."""
        self._tape, self._recording = None, False
        if not self._possible(inputs):
            return
        kind, parts = self._kind(form), _parts(backbone, self._routed.folded)
        tape = self._tapes.pop(kind, None)
        if tape is not None and self._finished(tape) and self._resume(tape, backbone):
            self._tape = tape
        elif tape is not None and not tape.passes and _same(tape.parts, parts):
            self._tape, self._recording = tape, True
        else:  # first run, changed since, or stopped before its end: what runs for the first time may wait for the device
            tape = _Tape(parts, self._recorder())
        self._tapes[kind] = tape
        while len(self._tapes) > _MOST:
            self._tapes.popitem(last=False)

    def _possible(self, inputs: Sequence[Tensor]) -> bool:
        routed = self._routed
        watched = (routed.session, routed.gate_session, routed.fitting, routed.observer, routed.forced)
        random = routed.config.tokens is not None and routed.config.tokens.scores == "random"
        return (
            all(each is None for each in watched)
            and not (routed.enabled and (routed.samples_decide or random))
            and routed.context.steps is not None
            and not torch.is_grad_enabled()
            and all(value.device.type == self._device_type for value in inputs)
        )

    def _kind(self, form: Hashable) -> Hashable:
        """Which generation this is, as far as it is known before its first pass."""
        routed, device = self._routed, self._device_type
        casting = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        asked = (routed.config, routed.budget) if routed.enabled else None
        return form, routed.context.steps, asked, casting, torch.is_inference_mode_enabled()

    def _finished(self, tape: _Tape) -> bool:
        steps = self._routed.context.steps
        return steps is not None and tape.last == len(steps) - 1

    def _resume(self, tape: _Tape, backbone: nn.Module) -> bool:
        """Bring the state to where the recorded generation began; whether the recording still holds. Weights with deltas or without
        are read where they lie, whichever are in place."""
        routed = self._routed
        if tape.load is not None:
            routed.note(tape.load)
            if routed.asked != tape.asked:
                return False
        return _same(tape.parts, _parts(backbone, routed.folded))

    def _record(self, tape: _Tape, forward: Callable[..., Any], leaves: list[Any], structure: pytree.TreeSpec) -> _Pass:
        routed = self._routed
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, structure)

        def run() -> Any:
            # What listens to the embedders goes by the times, an input like the others: a graph reads it where it was recorded.
            routed.note_time(routed.spec.arguments(args, kwargs).get(routed.spec.timestep_argument))
            return forward(*args, **kwargs)

        before, routed.spending = routed.spending, Spending()
        try:
            output, replay = tape.record(run)
        except RuntimeError as error:
            self._drop(tape)
            raise ShivelightError(
                f"Step {routed.context.step + 1} cannot be recorded as one graph ({str(error).splitlines()[0]}). Something waits "
                "for the device (offloading, a cache that looks at the data, an attention processor of your own?); compile with "
                "cuda_graphs=False."
            ) from error
        finally:
            spent, routed.spending = routed.spending, before
        if not tape.passes and routed.enabled and routed.settling.load is not None:
            tape.load, tape.asked = routed.settling.load, routed.asked
        out, form = pytree.tree_flatten(output)
        return _Pass([leaf for leaf in own if isinstance(leaf, Tensor)], out, form, replay, spent)

    def _drop(self, tape: _Tape) -> None:
        self._tape = None
        self._tapes = OrderedDict((kind, own) for kind, own in self._tapes.items() if own is not tape)


def _form(leaf: Any) -> Hashable:
    """What a recording depends on of an argument: of tensors all but their values."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return leaf if isinstance(leaf, Hashable) else repr(leaf)


def _parts(backbone: nn.Module, folded: FoldedWeights | None) -> list[Any]:
    """Where weights lie, with deltas or without, and what else of a backbone's modules a recording goes by."""
    swapped = {} if folded is None else folded.places()
    places: list[Any] = [
        swapped.get(id(tensor), tensor.data_ptr()) for tensor in (*backbone.parameters(), *backbone.buffers())
    ]
    for module in backbone.modules():
        held = module.__dict__
        places.append(held.get("processor"))
        registry = held.get("_diffusers_hook")
        if registry is not None:
            places += [hook for name, hook in registry.hooks.items() if name != NAME]
        if "_active_adapter" in held:
            places += [_copy(getattr(module, name, None)) for name in _SETTINGS]
    return places


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b or a == b for a, b in zip(one, other, strict=True))
