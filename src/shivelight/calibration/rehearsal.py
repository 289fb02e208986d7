"""Passes of an attached backbone in which every routed block does what it is told, through the hooks, and that leave no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shivelight.backbones.examples import example_call
from shivelight.errors import ShivelightError
from shivelight.execution.context import Clock, StepContext
from shivelight.execution.gates import Decision, RouterOutputs, Spending
from shivelight.execution.planning import Budget
from shivelight.execution.pricing import Load
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.routed import Routed
from shivelight.execution.settling import Settling
from shivelight.execution.stand_ins import StandInMap

_STEPS = 50


def is_bare(routed: Routed) -> bool:
    """Whether passes have no order in time."""
    return routed.context.steps is None and routed.clock.pipeline is None


class Standing(Clock):
    """A clock that stands where it is put, in the middle of a generation or, for a bare transformer, outside of any.

    Args:
        load: of the passes.
        bare: whether passes have no order in time.
    """

    def __init__(self, load: Load, bare: bool) -> None:
        super().__init__(None, "none")
        self._load = load
        self.step = 0
        self._steps = None if bare else tuple(torch.linspace(1000, 20, _STEPS).tolist())
        self.context = StepContext(generation=1)

    def tick(self, timestep: Tensor | None) -> StepContext:
        """The same place again."""
        self.context = StepContext(
            generation=1, steps=self._steps, step=self.step, branch=self._load.branch, timestep=timestep
        )
        return self.context


@contextmanager
def rehearsal(routed: Routed, clock: Standing) -> Iterator[None]:
    """Passes in here leave no trace in the generation that may be under way."""
    names = (
        "clock",
        "residuals",
        "spending",
        "budget",
        "settling",
        "shape",
        "shape_seen",
        "enabled",
        "observer",
        "forced",
    )
    held = {name: getattr(routed, name) for name in (*names, "stale")}
    gates = routed.gates
    of_gates = None if gates is None else (gates.outputs, gates.cap)
    routed.clock, routed.residuals, routed.observer = clock, routed._new_residuals(), None
    routed.spending = Spending()
    # Any budget that does not run everything goes the whole way.
    routed.budget, routed.settling = Budget("compute", 0.99), Settling(routed)
    routed.stale = routed.new_stale()
    if gates is not None:
        gates.outputs, gates.cap = RouterOutputs(gates.config), None
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(routed, name, value)
        if gates is not None and of_gates is not None:
            gates.outputs, gates.cap = of_gates


class Rehearsed:
    """Passes of a backbone in which every routed block does what it is told.

    Args:
        backbone: attached.
        routed: its state.
        load: of the passes.
        clock: that is in force.
    """

    def __init__(self, backbone: nn.Module, routed: Routed, load: Load, clock: Standing) -> None:
        self.backbone, self.routed, self.load, self.clock = backbone, routed, load, clock
        spec = routed.spec
        self.call = example_call(backbone, spec, load.samples, load.tokens, load.text_tokens)
        device = next(backbone.parameters()).device
        self.call[spec.timestep_argument] = torch.full((load.samples,), 500.0 / spec.timestep_scale, device=device)
        self.repeats = 1

    def __call__(self, decide: Callable[[int], Decision] | None) -> None:
        """`repeats` passes; None is the untouched model."""
        self.routed.enabled, self.routed.forced = decide is not None, None
        if decide is not None:
            self.routed.forced = partial(self._told, decide)
        for _ in range(self.repeats):
            self.backbone(**self.call)

    def _told(self, decide: Callable[[int], Decision], block: int, entry: BlockResiduals | None) -> Decision:
        decision = decide(block)
        if decision.action == "reuse" and (entry is None or not all(entry.complete)):
            return Decision("run", self.load.tokens)  # without memory for residuals it must
        return decision

    def fill(self) -> tuple[Tensor, Tensor | None] | None:
        """Runs everything once, so that there are residuals; what entered the first routed block."""
        seen: list[tuple[Tensor, Tensor | None]] = []

        def see(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
            if not seen:
                seen.append((x, None if text is None else text[0]))

        self.routed.observer = see
        self.clock.step = 0
        self(lambda block: Decision("run", self.load.tokens))
        self.routed.observer = None
        self.clock.step = 1
        if self.routed.shape[0] != self.load.tokens:
            raise ShivelightError(
                f"The spec {self.routed.spec.name!r} gave an example of {self.routed.shape[0]} image tokens instead of "
                f"{self.load.tokens}, so blocks cannot be timed; correct its `example`."
            )
        return seen[0] if seen else None

    def routers(self, x: Tensor, text: Tensor | None) -> None:
        """What the routers of a pass do, and nothing else."""
        routed = self.routed
        first = len(x) // 2 if self.load.branch == "both" else 0
        for _ in range(self.repeats):
            for block in routed.routed:
                if routed.config.tokens is not None:
                    routed.scores(block, x[first:], slice(first, None))
                if routed.gates is not None:
                    routed.read_gates(block, x[first:], text, first)

    def map(self, own: StandInMap, x: Tensor) -> None:
        """What stands in for all blocks at rest, on values like x [B, N, D]."""
        for _ in range(self.repeats):
            own([x] * len(own.scale))
