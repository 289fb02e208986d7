"""Budgets in time: the share of FLOPs at which a generation is predicted to take what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from shivelight.errors import BudgetError
from shivelight.execution.context import GRID, Branch
from shivelight.execution.gate_plan import GatePlan
from shivelight.execution.latency_table import LatencyTable
from shivelight.execution.planning import Budget, Request
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.stale import StalePlan

if TYPE_CHECKING:
    from shivelight.execution.gates import Decision
    from shivelight.execution.routed import Routed

# Budgets of FLOPs that are tried are multiples of 1 / _PLACES.
_PLACES = 10_000
# A predicted time this near below the one asked for is taken for it.
_CLOSE = 1e-3
# Of the 1000 timesteps of a bare transformer, its mean time is over these.
_COARSE = slice(9, None, 20)

Forced = Callable[[int, BlockResiduals | None], "Decision"]


@dataclass(frozen=True)
class Load:
    """What passes of a backbone hold.

    Attributes:
        tokens: N, image tokens.
        text_tokens: M.
        samples: B of a pass, both halves of a guided batch counted.
        branch: of guidance.
    """

    tokens: int
    text_tokens: int
    samples: int
    branch: Branch


class Stopwatch(Protocol):
    """Where tables come from."""

    def __call__(self, load: Load, measure: bool) -> LatencyTable | None:
        """The table of this load, measured now if it must be and `measure` says so; None where it is not known."""


def passes_per_step(routed: Routed, branch: Branch) -> int:
    """Passes of the backbone in a step: two where guidance is known to run its branches as separate calls."""
    guided = getattr(routed.clock.pipeline, "do_classifier_free_guidance", False)
    return 2 if branch in ("cond", "uncond") and guided else 1


def predicted_ms(routed: Routed, table: LatencyTable, request: Request, budget: Budget) -> float:
    """Mean milliseconds of a pass over the steps of a generation under a budget of tokens or FLOPs; with gates, as expected.

    Samples of one batch whose gates differ run in parts, which take longer together than the table says.
    """
    kept = routed.schedule(request).keep
    gates = routed.gates or routed.stale
    plan = None if gates is None else gates.plan(request, budget, kept)
    if isinstance(plan, GatePlan):
        return _gated_ms(routed, table, request, budget, kept, plan)
    runs = [table.pass_ms(row) for row in kept]
    if isinstance(plan, StalePlan):
        rest = table.pass_ms([0] * len(kept[0]))
        whole = routed.planner.whole_flops(kept, request)
        shares = [min(1.0, spent / all_) for spent, all_ in zip(plan.allotted, whole, strict=True)]
        runs = [rest + share * (run - rest) for share, run in zip(shares, runs, strict=True)]
        if plan.rests is not None and plan.rests.partial:
            rear = plan.rests.rear or len(kept[0])
            runs[plan.rests.partial] = table.pass_ms([0] * (len(kept[0]) - rear) + [plan.tokens] * rear)
        if routed.stand_ins is not None and plan.stand_ins:
            maps = plan.stand_ins / routed.stand_ins.largest().flops(request.tokens)
            return (math.fsum(runs) + maps * table.map_ms) / len(runs)
    return math.fsum(runs) / len(runs)


def _gated_ms(
    routed: Routed, table: LatencyTable, request: Request, budget: Budget, kept: Sequence[Sequence[int]], plan: GatePlan
) -> float:
    assert routed.gates is not None
    assert routed.config.blocks is not None
    planner = routed.gates.gate_planner(request, budget, kept)
    rows = kept[_COARSE] if request.steps is GRID else kept
    prices = [
        [
            [table.run_ms(place, k, width) - table.rest_ms for width in routed.config.blocks.widths]
            for place, k in enumerate(row)
        ]
        for row in rows
    ]
    planner.prices = torch.tensor(prices, dtype=torch.float64)
    above = float(planner.cost_by_step(plan.dial.shift).sum()) / planner.steps
    return table.pass_ms([0] * len(routed.routed)) + above


def equivalent(routed: Routed, table: LatencyTable, budget: Budget, steps: tuple[float, ...], load: Load) -> Budget:
    """The most FLOPs whose generation is predicted to meet a budget in time.

    Args:
        routed: state of the backbone.
        table: of this load.
        budget: a speed-up, or milliseconds.
        steps: timesteps of the generation's model calls.
        load: of its passes.

    Raises:
        BudgetError: not reachable; the message says the nearest that is.
    """
    bare = steps is GRID
    passes = 1 if bare else len(steps) * passes_per_step(routed, load.branch)
    dense = table.dense_ms * passes
    target = dense / budget.value if budget.kind == "speedup" else budget.value

    def predict(compute: float) -> float:
        tried = Budget("compute", compute)
        request = routed.request(steps, load.tokens, load.text_tokens, tried)
        if bare and routed.gates is None:  # the mean of a few says as much
            request = replace(request, steps=GRID[_COARSE])
        return passes * predicted_ms(routed, table, request, tried)

    found = routed.planner.once(
        ("time", budget, steps, load, table, passes, routed.config), lambda: most_compute(predict, target)
    )
    if found.compute is not None:
        return Budget("compute", found.compute)
    what = "one pass" if bare else f"{len(steps)} steps"
    fastest = dense / found.ms
    if budget.kind == "speedup":
        nearest = math.floor(fastest * 1e3) / 1e3
        said = f"speedup={budget.value} cannot be reached: dense takes {dense:.4g} ms for {what}"
        said += f" here, and the least that this adapter can run {found.ms:.4g} ms. The nearest is speedup={nearest}."
    else:
        nearest = math.ceil(found.ms * 1e3) / 1e3
        said = f"latency_ms={budget.value} cannot be reached: {what} take {dense:.4g} ms when dense here, and {found.ms:.4g} ms"
        said += f" with the least that this adapter can run. The nearest is latency_ms={nearest}."
    raise BudgetError(said, nearest=nearest)


@dataclass(frozen=True)
class Found:
    """A budget of FLOPs within the time asked for, or None; and its time, or the least that any takes."""

    compute: float | None
    ms: float


def most_compute(predict: Callable[[float], float], target: float) -> Found:
    """A share of FLOPs whose predicted time is at most `target`, and within 0.1% of it or the largest such multiple of 1e-4, where
    time rises with FLOPs.

    Args:
        predict: share -> time; `BudgetError` with a `nearest` where the share cannot be reached.
        target: in the same unit.
    """
    whole = predict(1.0)
    if whole <= target:
        return Found(1.0, whole)
    # At `low` it cannot be reached (no time) or fits, at `high` it is too slow.
    low, high, slow = 0, _PLACES, whole
    fits: float | None = None
    halve = True
    while high - low > 1 and (fits is None or fits < (1 - _CLOSE) * target):
        middle = (low + high) // 2
        if fits is not None and not halve:  # time is nearly linear in FLOPs
            middle = low + round((high - low) * (target - fits) / (slow - fits))
            middle = min(max(middle, low + 1), high - 1)
        halve = not halve
        try:
            time = predict(middle / _PLACES)
        except BudgetError as error:
            if error.nearest is None:  # not a matter of how much
                raise
            low = middle
            continue
        if time <= target:
            low, fits = middle, time
        else:
            high, slow = middle, time
    return Found(None, slow) if fits is None else Found(low / _PLACES, fits)
