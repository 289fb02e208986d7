"""What peers stand on: a comparison of a pipeline or a bare loop, followed call by call, hooked, and left as it was found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec, find_spec
from shivelight.cost import BlockCost, backbone_costs
from shivelight.errors import ShivelightError
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.execution.call import BlockCall
from shivelight.execution.context import Clock, StepContext
from shivelight.execution.region import Taps, run_whole
from shivelight.execution.rotary import turning

Where = Comparison | BareLoop
Plan = Callable[[tuple[int, int]], float]
_HOOK = "shivelight_peer"


class Ground:
    """A backbone with what calls it.

    Args:
        where: a comparison on a pipeline, whose adapter is switched off while a peer runs, or a bare loop.

    Attributes:
        bare: whether the weights are random, so that nothing that depends on data means anything.
        pipe: what has the scheduler: the pipeline, or the loop.
        steps: sampling steps of the dense reference.
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self.bare = isinstance(where, BareLoop)
        self.pipe: Any = where if isinstance(where, BareLoop) else where.pipe
        self.backbone: Any = self.pipe.transformer if isinstance(where, BareLoop) else where.backbone
        self.steps = where.steps if isinstance(where, BareLoop) else where.setting.steps
        self.spec = find_spec(self.backbone)

    @cached_property
    def blocks(self) -> list[tuple[BlockSpec, nn.Module]]:
        """All blocks in the order in which they run."""
        return self.spec.block_list(self.backbone)

    @cached_property
    def costs(self) -> list[BlockCost]:
        """Of each block."""
        return backbone_costs(self.backbone, self.spec)

    def dense(self) -> AbstractContextManager[Any]:
        """The backbone as it is without an adapter."""
        return self.where.dense() if isinstance(self.where, BareLoop) else self.where.routed.switched(False)

    def generate(self) -> None:
        """One generation of one sample, in the state that is in force; of a bare loop, of its batch."""
        if isinstance(self.where, BareLoop):
            self.where()
        else:
            self.where.call([self.where.any], self.steps)

    def point(
        self,
        method: str,
        budget: dict[str, float],
        state: Callable[[], AbstractContextManager[Any]],
        plan: Plan | None = None,
    ) -> OperatingPoint:
        """The dense model in a peer's state, at the reference number of steps."""

        @contextmanager
        def entered() -> Iterator[None]:
            with self.dense(), unchanged(self.backbone), state():
                yield

        return OperatingPoint(method, budget, self.steps, entered, peer=True, plan=plan)

    def refuse(self, method: str, reason: str) -> ShivelightError:
        """Why a peer cannot run here; `reason` is a clause."""
        return ShivelightError(f"{method} cannot run on {type(self.backbone).__name__}: {reason}.")


class Passes:
    """Follows the calls of a backbone while a peer is in force.

    Attributes:
        context: where the current call stands.
        text_tokens: M, where blocks have joined streams.
        arguments: of the current call, by name.
        memory: what a peer keeps for the passes of this guidance branch; empty at the first one of a generation.
    """

    def __init__(self, ground: Ground) -> None:
        self._spec, self._backbone = ground.spec, ground.backbone
        self._clock = Clock(ground.pipe, ground.spec.guidance)
        self._memories: dict[str, dict[str, Any]] = defaultdict(dict)
        self._generation: int | None = None
        self.context = StepContext()
        self.text_tokens = 0
        self.arguments: dict[str, Any] = {}

    @property
    def branch(self) -> str:
        """A name of the calls that follow each other from step to step."""
        return f"{self.context.branch} {self.context.call}"

    @property
    def memory(self) -> dict[str, Any]:
        """Of this branch."""
        return self._memories[self.branch]

    @contextmanager
    def followed(
        self, begin: Callable[[bool], None] | None = None, end: Callable[[], None] | None = None
    ) -> Iterator[Passes]:
        """Follow every call; `begin` is told whether a new generation starts with it, `end` comes after it."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.arguments = self._spec.arguments(args, kwargs)
            time = self.arguments.get(self._spec.timestep_argument)
            self.context = self._clock.tick(
                None if time is None else self._spec.sample_times(time) * self._spec.timestep_scale
            )
            if self._spec.text_length is not None:
                self.text_tokens = self._spec.text_length(self.arguments)
            fresh, self._generation = self.context.generation != self._generation, self.context.generation
            if fresh:
                self._memories.clear()
            if begin is not None:
                begin(fresh)

        def after(*_: Any) -> None:
            self.arguments = {}
            if end is not None:
                end()

        # Not diffusers' hooks: those of a backbone that accelerate offloads are taken off after each picture.
        handles = [
            self._backbone.register_forward_pre_hook(before, with_kwargs=True),
            self._backbone.register_forward_hook(after, always_call=True),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._memories.clear()


BlockForward = Callable[[nn.Module, BlockCall, Callable[..., Any]], tuple[Tensor, Tensor | None]]


class _BlockHook(ModelHook):
    """In the place of a block's forward: a function of the call, which gives (image, text)."""

    def __init__(self, kind: BlockSpec, passes: Passes, run: BlockForward) -> None:
        super().__init__()
        self.kind, self.passes, self.run = kind, passes, run

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run, and give what the block would."""
        call = BlockCall(self.kind, args, kwargs, self.passes.text_tokens)
        return call.join(*self.run(module, call, self.fn_ref.original_forward))


@contextmanager
def blocks_run(ground: Ground, run: Mapping[int, BlockForward], passes: Passes) -> Iterator[None]:
    """Some blocks, by their indices, run by functions of ours: (block, call, its own forward) -> (image, text)."""
    with unchanged(ground.backbone), passes.followed():
        for index, function in run.items():
            kind, block = ground.blocks[index]
            HookRegistry.check_if_exists_or_initialize(block).register_hook(_BlockHook(kind, passes, function), _HOOK)
        yield


def run_gathered(
    module: nn.Module, call: BlockCall, forward: Callable[..., Any], x: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(image [B, k, D], text): a block on the tokens at `indices` [B, k] of x [B, N, D], each at its own place."""
    layers, turns, unturned = turning(module, call, indices)
    taps = Taps()
    try:
        return call.split(run_whole(forward, call.on_tokens(x, indices) | unturned, None, taps.on(layers), turns))
    finally:
        taps.remove()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Hooks of diffusers' kind that were put on any module meanwhile are gone afterwards, without a trace."""
    before = {
        module: (list(module.__dict__["_diffusers_hook"].hooks) if "_diffusers_hook" in module.__dict__ else None)
        for module in model.modules()
    }
    forwards = {module for module in before if "forward" in module.__dict__}
    try:
        yield
    finally:
        for module, known in before.items():
            registry = module.__dict__.get("_diffusers_hook")
            if registry is None:
                continue
            for name in [name for name in reversed(registry._hook_order) if name not in (known or ())]:
                registry.remove_hook(name, recurse=False)
            registry._child_registries_cache = None
            if known is None:
                del module._diffusers_hook
            if module not in forwards:
                # The registry leaves a bound copy of the class's forward on the instance.
                module.__dict__.pop("forward", None)


def rests(step: int, skip: float) -> bool:
    """Whether this step is one of those that are left out, evenly spread, never the first.

    A share of 1/n leaves out every n-th step, one of (n - 1)/n all but every n-th.

    >>> [rests(step, 0.5) for step in range(4)], [step for step in range(9) if not rests(step, 2 / 3)]
    ([False, True, False, True], [0, 3, 6])
    """
    # 2/3 of three steps is 1.9999999999999998.
    return math.floor((step + 1) * skip + 1e-6) > math.floor(step * skip + 1e-6)


def resting(steps: int, skip: float) -> int:
    """How many of so many steps are left out."""
    return sum(rests(step, skip) for step in range(steps))


def block_share(ground: Ground, blocks: Sequence[int], shape: tuple[int, int]) -> float:
    """FLOPs of some blocks over those of all, whole."""
    flops = [cost.flops(*shape) for cost in ground.costs]
    return sum(flops[index] for index in blocks) / sum(flops)


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on these alone."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
