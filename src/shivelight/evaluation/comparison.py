"""One comparison of methods on one pipeline: same captions, same seeds, timed in turns, judged against the dense images.

An operating point is a method at a budget and a step count. Every ratio is of a whole generation to the dense one at the
reference number of steps, so fewer sampling steps stand in the same table as everything else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shivelight.adapter import backbone_of, install, prepare, routed_of
from shivelight.budgets import planned_ratio, set_budget
from shivelight.config import RoutingConfig
from shivelight.errors import ShivelightError
from shivelight.evaluation.judging import Judge
from shivelight.evaluation.results import new_row
from shivelight.execution.folding import Delta, FoldedWeights
from shivelight.execution.planning import Budget
from shivelight.execution.routed import Routed
from shivelight.measurement.latency import ModuleClock, Timings, interleave, synchronize
from shivelight.measurement.memory import peak_memory_mb
from shivelight.pipelines import any_caption, draw

Progress = Callable[[str], None]
# What `Comparison.clock` says of a row.
CLOCK = ("latency_ms", "speedup", "speedup_end_to_end", "efficiency")
Variant = dict[str, Any]
# Routers and deltas of one backbone, as `adapter_files.read_adapter` returns them.
Adapter = tuple[Routed, dict[str, Delta]]


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Attributes:
        steps: of the dense reference.
        guidance: classifier-free guidance scale.
        seed: caption i starts from the noise of seed + i.
        batch: samples per call while pictures are made; timing runs one sample.
        options: further arguments of the pipeline call.
    """

    steps: int = 25
    guidance: float = 4.0
    seed: int = 0
    batch: int = 16
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OperatingPoint:
    """A method at a budget and a step count.

    Attributes:
        method: its name in results.json.
        budget: {"keep": 0.6} or {"compute": 0.7}, or {} where there is none.
        steps: sampling steps.
        state: context manager that puts the pipeline into the state of the method.
        peer: whether it is somebody else's.
        plan: of a peer whose cost is known in advance: (image tokens, text tokens) -> planned FLOPs of the blocks over those of
            as many dense steps.
    """

    method: str
    budget: dict[str, float]
    steps: int
    state: Callable[[], AbstractContextManager[Any]]
    peer: bool = False
    plan: Callable[[tuple[int, int]], float] | None = None

    @property
    def name(self) -> str:
        """A name of its own within one comparison."""
        budget = "".join(f" {key} {value:g}" for key, value in self.budget.items())
        return f"{self.method}{budget} {self.steps} steps"


def point_key(row: OperatingPoint | dict[str, Any]) -> tuple[str, tuple[tuple[str, float], ...], int]:
    """What a row of results.json and its operating point have in common."""
    if isinstance(row, OperatingPoint):
        return row.method, tuple(sorted(row.budget.items())), row.steps
    return row["method"], tuple(sorted(row["budget"].items())), row["steps"]


class Comparison:
    """Runs operating points on a pipeline with an adapter attached.

    Args:
        pipe: an attached pipeline.
        setting: what all methods share.
    """

    def __init__(self, pipe: Any, setting: Setting) -> None:
        self.pipe, self.setting = pipe, setting
        self.backbone = backbone_of(pipe)
        self._free: dict[str, Adapter] = {}
        # For what does not depend on the caption.
        self.any = any_caption(pipe)
        # By the points' names: FLOPs of the blocks over those of the dense ones, of the pictures that were drawn.
        self.realised: dict[str, float] = {}
        routed_of(pipe)

    @property
    def routed(self) -> Routed:
        """The state of the adapter that is attached now."""
        return routed_of(self.pipe)

    def dense(self, steps: int | None = None) -> OperatingPoint:
        """The untouched model; with fewer steps than the reference, the peer that costs nothing."""
        steps = steps or self.setting.steps
        name = "dense" if steps == self.setting.steps else "fewer-steps"
        return OperatingPoint(name, {}, steps, lambda: self.routed.switched(False))

    def routed_point(
        self, method: str, *, cap: bool = False, variant: Variant | None = None, **budget: float
    ) -> OperatingPoint:
        """The adapter at a budget, or a variant of it on the same weights.

        Args:
            method: its name in results.json.
            cap: see `set_budget`.
            variant: arguments of `Routed.variant`: {"scores": "random", "ratios": "fixed"}, {"blocks": {"decide": "static"}}.
            budget: keep=, compute= or threshold=, as for `set_budget`.
        """

        @contextmanager
        def state() -> Iterator[None]:
            before = self.routed.budget
            with self.routed.variant(**variant or {}):
                set_budget(self.pipe, cap=cap, **budget)
                try:
                    yield
                finally:
                    self.routed.budget = before

        return OperatingPoint(method, budget, self.setting.steps, state)

    def tokens(self, keep: float) -> OperatingPoint:
        """Token routing as it was trained."""
        return self.routed_point("tokens", keep=keep)

    def on(self, adapter: Adapter | None, point: OperatingPoint) -> OperatingPoint:
        """The point on another adapter of the same backbone, in the place of the one that is attached; None is that one."""
        if adapter is None:
            return point
        routed, deltas = adapter

        @contextmanager
        def state() -> Iterator[None]:
            attached, enabled = self.routed, self.routed.enabled
            routed.shape, routed.shape_seen = attached.shape, attached.shape_seen
            install(self.pipe, routed, deltas)
            routed.enable(True)
            try:
                with point.state():
                    yield
            finally:
                install(self.pipe, attached, attached.deltas)
                attached.enable(enabled)

        return replace(point, state=state)

    def training_free(self, axis: Literal["tokens", "blocks", "both"] = "tokens", **budget: float) -> OperatingPoint:
        """`RoutingConfig.training_free` on the backbone's own weights, whatever adapter is attached; of tokens
        "training-free", else "training-free-blocks" or "training-free-both"."""
        if axis not in self._free:
            self._free[axis] = prepare(self.pipe, RoutingConfig.training_free(compute=1.0, axis=axis)), {}
        name = "training-free" if axis == "tokens" else f"training-free-{axis}"
        return self.on(self._free[axis], self.routed_point(name, cap=False, variant=None, **budget))

    def finetuned(self, weights: FoldedWeights) -> OperatingPoint:
        """The dense model with other deltas: the same training without routing."""

        @contextmanager
        def state() -> Iterator[None]:
            with self.routed.switched(False):
                weights.apply(True)
                try:
                    yield
                finally:
                    weights.apply(False)

        return OperatingPoint("dense-finetuned", {}, self.setting.steps, state)

    def fewer_steps(
        self, points: Sequence[OperatingPoint], rounds: int = 3, progress: Progress | None = None
    ) -> list[OperatingPoint]:
        """The peers that cost nothing: dense with as many steps as fit into each point's measured time, and into its planned
        FLOPs (where a method is not faster on this machine, only the second says what its plan is up against).
        """
        timings = self.time([self.dense(), *points], rounds, warmup=1, progress=progress)
        counts = {round(self.setting.steps / timings.speedup(point.name, self.dense().name).value) for point in points}
        plans = [self.planned(point) for point in points]
        counts |= {round(self.setting.steps * plan) for plan in plans if plan is not None}
        return [self.dense(steps) for steps in sorted(counts, reverse=True) if 0 < steps < self.setting.steps]

    def time(
        self,
        points: Sequence[OperatingPoint],
        rounds: int,
        warmup: int = 1,
        progress: Progress | None = None,
        captions: Sequence[str] = (),
    ) -> Timings:
        """One-sample generations, in turns, each round of another of the captions (gates spend what a sample needs); the
        backbone's share is timed inside."""

        def runner(steps: int) -> Callable[[], Tensor]:
            turns = cycle(captions or [self.any])
            return lambda: self.call([next(turns)], steps)

        runs = {point.name: runner(point.steps) for point in points}
        if len(runs) != len(points):
            names = [point.name for point in points]
            twice = next(name for name in names if names.count(name) > 1)
            raise ShivelightError(
                f"Two operating points of one comparison have the name {twice!r}; compare adapters of one kind in runs of "
                "their own."
            )
        clock, states = ModuleClock(self.backbone), {point.name: point.state for point in points}
        return interleave(runs, rounds, warmup, synchronize(self.pipe.device), clock, progress, states)

    def call(self, captions: Sequence[str], steps: int, first_seed: int | None = None) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] of some captions, in the state that is in force."""
        setting = self.setting
        start = setting.seed if first_seed is None else first_seed
        seeds = range(start, start + len(captions))
        images = draw(self.pipe, captions, seeds, steps, setting.guidance, output_type="pt", **setting.options)
        return images.float().clamp(0, 1).cpu()

    def look(self, samples: int = 1) -> None:
        """The shortest generation, for what is known once a step has run. Not of one step: a scheduler that stretches its noise
        levels to a last one (shift_terminal) divides by zero then."""
        self.call([self.any] * samples, 2)

    def pictures(self, point: OperatingPoint, captions: Sequence[str], progress: Progress | None = None) -> Tensor:
        """All captions at one operating point [n, 3, H, W]; what block routing spent on them is noted in `realised`."""
        parts, flops, dense = [], 0.0, 0.0
        with point.state():
            for first in range(0, len(captions), self.setting.batch):
                part = captions[first : first + self.setting.batch]
                parts.append(self.call(part, point.steps, self.setting.seed + first))
                if self.routed.enabled and self.routed.config.blocks is not None:
                    flops, dense = flops + self.routed.spending.flops, dense + self.routed.spending.dense
                if progress is not None:
                    progress(point.name)
        if dense:
            self.realised[point.name] = flops / dense
        return torch.cat(parts)

    def counted_flops(self, point: OperatingPoint, captions: Sequence[str] = ()) -> float:
        """FLOPs of the backbone in one generation, counted by torch while it runs (matrix products); the captions' mean."""
        name, captions = type(self.backbone).__name__, captions or [self.any]
        # The fused kernels of a CPU are not counted; the plain form of attention has the same products.
        with point.state(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.call(captions, point.steps)
        return sum(counter.get_flop_counts()[name].values()) / len(captions)

    def planned(self, point: OperatingPoint) -> float | None:
        """Planned FLOPs of the blocks in one generation over those of the dense reference; None where nothing is known."""
        if point.peer and point.plan is None:
            return None
        if not point.budget:
            return point.steps / self.setting.steps
        if not self.routed.shape_seen:
            # So few steps can keep no budget.
            budget, self.routed.budget = self.routed.budget, Budget("keep", 1.0)
            try:
                with self.routed.switched(True):
                    self.look()
            finally:
                self.routed.budget = budget
        if point.plan is not None:
            return point.plan(self.routed.shape) * point.steps / self.setting.steps
        with point.state():
            plan = planned_ratio(self.pipe, point.steps)
            return None if plan is None else plan * point.steps / self.setting.steps

    def _peak_memory_mb(self, point: OperatingPoint) -> float | None:
        with point.state():
            return peak_memory_mb(partial(self.call, [self.any], point.steps), self.pipe.device)

    def clock(
        self, timings: Timings, point: OperatingPoint, reference: OperatingPoint, planned: float | None
    ) -> dict[str, Any]:
        """What the timings say of a point beside the reference; efficiency where its share of the FLOPs was planned."""
        speedup = timings.speedup(point.name, reference.name, inner=True, seed=self.setting.seed)
        figures: dict[str, Any] = {
            "latency_ms": timings.latency_ms(point.name),
            "speedup": speedup,
            "speedup_end_to_end": timings.speedup(point.name, reference.name, seed=self.setting.seed),
        }
        if planned is not None:
            values = {name: getattr(speedup, name) * planned for name in ("value", "low", "high")}
            figures["efficiency"] = replace(speedup, **values)
        return figures

    def retime(
        self,
        rows: Sequence[dict[str, Any]],
        points: Sequence[OperatingPoint],
        rounds: int,
        captions: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        """Time rows of an earlier run anew and replace their clock (`CLOCK`); what was drawn and judged stays.

        Args:
            rows: of results.json, the dense reference first.
            points: among which those of the rows are.
            rounds, captions, progress: see `time`.
        """
        known = {point_key(point): point for point in points}
        chosen = [known[point_key(row)] for row in rows]
        timings = self.time(chosen, rounds, progress=progress, captions=captions)
        for row, point in zip(rows, chosen, strict=True):
            clock = self.clock(timings, point, chosen[0], row.get("planned_ratio"))
            take_clock(row, new_row(row["method"], row["budget"], **clock))

    def rows(
        self,
        points: Sequence[OperatingPoint],
        timings: Timings,
        pictures: dict[str, Tensor],
        references: Tensor | None = None,
        network: torch.nn.Module | None = None,
        progress: Progress | None = None,
        captions: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Rows of results.json; the first point must be the dense reference.

        Args:
            points: in the order of the table; after "dense-finetuned" each row has its paired KID difference to that one.
            timings: from `time`.
            pictures: by the points' names.
            references: real pictures [m, 3, H, W] for KID and FD, or None.
            network: feature network for them.
            progress: told each point's name.
            captions: of the pictures; FLOPs of gates, which spend what a sample needs, are counted on the first two. Of the
                embedded data set, they give the rows their agreement.
        """
        reference = points[0]
        judge = Judge(pictures[reference.name], self.setting.seed, references, network, captions)
        dense_flops = self.counted_flops(reference)
        rows = []
        for point in points:
            planned = self.planned(point)
            gated = point.name in self.realised
            figures: dict[str, Any] = {
                "steps": point.steps, "batch": 1, "guidance": self.setting.guidance,
                "dtype": str(self.backbone.dtype).removeprefix("torch."), "compiled": False,
                "flops_ratio": self.counted_flops(point, captions[:2] if gated else ()) / dense_flops,
                "realised": self.realised.get(point.name),
                "planned_ratio": planned, **self.clock(timings, point, reference, planned),
                "peak_memory_mb": self._peak_memory_mb(point),
                "samples": len(pictures[point.name]),
            }  # fmt: skip
            figures |= judge.figures(point.method, pictures[point.name])
            rows.append(new_row(point.method, point.budget, **figures))
            if progress is not None:
                progress(point.name)
        return rows


class KeptTokens:
    """An `Observer` that remembers which tokens each block ran at each step, for one sample of the batch.

    Args:
        routed: state of the attached backbone.
        sample: index in the batch; the conditional half comes second under batched guidance.
    """

    def __init__(self, routed: Any, sample: int = -1) -> None:
        self.routed, self.sample = routed, sample
        self.masks: dict[tuple[int, int], Tensor] = {}

    def __call__(self, block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        """Note the mask [N] of kept tokens."""
        mask = torch.ones(x.shape[1], dtype=torch.bool)
        if kept is not None:
            mask = torch.zeros(x.shape[1], dtype=torch.bool)
            mask[kept[self.sample].cpu()] = True
        self.masks[self.routed.context.step, block] = mask

    @contextmanager
    def watching(self) -> Iterator["KeptTokens"]:
        """Observe every pass in this block."""
        with ExitStack() as stack:
            previous, self.routed.observer = self.routed.observer, self
            stack.callback(setattr, self.routed, "observer", previous)
            yield self

    def array(self) -> Tensor:
        """[steps, blocks, side, side] bool; square pictures only."""
        steps, blocks = 1 + max(s for s, _ in self.masks), sorted({b for _, b in self.masks})
        flat = torch.stack([torch.stack([self.masks[step, block] for block in blocks]) for step in range(steps)])
        side = round(flat.shape[-1] ** 0.5)
        return flat.reshape(steps, len(blocks), side, side)


def take_clock(row: dict[str, Any], other: dict[str, Any]) -> None:
    """Replace what a row of results.json says of time by what another one of the same point says."""
    ci95 = {name: interval for name, interval in row.get("ci95", {}).items() if name not in CLOCK}
    ci95 |= {name: interval for name, interval in other.get("ci95", {}).items() if name in CLOCK}
    row.update({name: other[name] for name in CLOCK if name in other}, ci95=ci95)
