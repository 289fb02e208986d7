"""Block routing without training: all blocks at intervals, or those whose residuals are stalest, run, and the others add what
their residuals are expected to be; a static budget.

Shapes: B samples, N image tokens, D width, T steps, L routed blocks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from shivelight.config import BlockRouting, RestPlan, Reuse, TokenRouting
from shivelight.errors import BudgetError
from shivelight.execution.context import StepContext
from shivelight.execution.gates import Decision
from shivelight.execution.planning import Budget, Planner, Request, warm_steps
from shivelight.execution.reuse import FRONT, BlockResiduals
from shivelight.execution.stand_ins import StandInMaps
from shivelight.routing import count_unit

# Share of all tokens that a step in part runs at least.
_LEAST = 0.125

Find = Callable[[int], BlockResiduals | None]


@dataclass(frozen=True)
class StalePlan:
    """What the routed blocks of one sample may take.

    Attributes:
        allotted: FLOPs at each step [T], and what is left over goes to the next.
        stand_ins: FLOPs of the maps that stand in for blocks at rest, over all steps; 0 where none do.
        rests: where all blocks run or rest together, the generation that this is.
        tokens: how many of them run at the step that runs in part; 0 where there is none.
    """

    allotted: tuple[float, ...]
    stand_ins: float = 0.0
    rests: RestPlan | None = None
    tokens: int = 0

    @property
    def cost(self) -> float:
        """Summed over the steps."""
        return math.fsum(self.allotted) + self.stand_ins

    @property
    def steps(self) -> int:
        """T."""
        return len(self.allotted)


def run_steps(count: int, steps: int, longest: int, growth: float) -> list[int]:
    """Steps of a generation at which all blocks run: the first, and others at intervals that never shrink, grow about
    `growth`-fold from first to last, and never exceed `longest`.

    Args:
        count: how many, at least steps / longest.
        steps: of the generation, at least `count`.
        longest: an interval, in steps.
        growth: at least 1.
    """
    weights = [1 + (growth - 1) * place / max(1, count - 1) for place in range(count)]
    ends = [round(steps * sum(weights[: place + 1]) / sum(weights)) for place in range(count)]
    intervals = [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    while sum(intervals) > steps:
        intervals[intervals.index(max(intervals))] -= 1
    while max(intervals) > longest:
        intervals[intervals.index(max(intervals))] -= 1
        intervals[intervals.index(min(intervals))] += 1
    return [0, *itertools.accumulate(sorted(intervals)[:-1])]


def partial_step(runs: Sequence[int], steps: int) -> int:
    """The step at rest at which some tokens run: the last one before a run (or the end) that comes first, since what stands in is
    furthest off where noise is high, and what such a step makes is of use at the next run; 0 where all steps run."""
    ends = zip(runs, (*runs[1:], steps), strict=True)
    return next((end - 1 for start, end in ends if end - start > 1), 0)


class StaleGates:
    """Which blocks run: with router="interval" all at some steps and none at the others; with "age" those whose residual is
    oldest, in the order of the backbone where ages are equal; with "drift" those whose age times how far the residual moved
    when it was last computed, over its length, is largest.

    By intervals or age nothing is read from the device, and the runs are known before the first step.

    Args:
        config: of block routing; with cfg_gates="cond" the conditional branch's residuals decide for both.
        reuse: of residuals; a block that was left out `max_reuses` times in a row comes first.
        planner: of the backbone; knows the routed blocks and their costs.
        stand_ins: maps that were fitted for steps at rest, or None.
    """

    def __init__(
        self, config: BlockRouting, reuse: Reuse, planner: Planner, stand_ins: StandInMaps | None = None
    ) -> None:
        self.config, self.reuse, self.planner, self.stand_ins = config, reuse, planner, stand_ins
        self._chosen: list[set[int]] | None = None
        self._saved: dict[int, list[float]] = {}

    def begin(self, context: StepContext) -> None:
        """A pass begins; a separate unconditional one follows the conditional one's choice."""
        if context.branch != "uncond" or self.config.cfg_gates == "each":
            self._chosen = None

    def clear(self) -> None:
        """Drop what belongs to one generation."""
        self._chosen = None
        self._saved = {}

    def plan(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> StalePlan | None:
        """What a generation whose token schedule is `kept` may spend, or None where every block runs."""
        if budget.everything or budget.kind == "keep":
            return None
        fitted = None if self.stand_ins is None else self.stand_ins.config
        key = ("stale", self.config.router, budget, request, self.reuse, fitted, tuple(kept))
        return self.planner.once(key, lambda: self._solve(request, budget, kept))

    def _solve(self, request: Request, budget: Budget, kept: Sequence[Sequence[int]]) -> StalePlan:
        planner, steps = self.planner, len(kept)
        dense, always = planner.dense_flops(request.tokens, request.text_tokens)
        whole = planner.whole_flops(kept, request)
        left = (budget.value * dense - always) * steps
        # The first step always runs everything: there is nothing yet to reuse.
        together = self.config.router == "interval"
        fewest = math.ceil(steps / self.reuse.max_age) if together else 1
        least = math.fsum(whole[step] for step in (self._runs(fewest, steps) if together else {0}))
        if least > left * (1 + 1e-9):
            nearest = math.ceil(1e4 * (always * steps + least) / (dense * steps)) / 1e4
            raise BudgetError(
                f"compute={budget.value} cannot be reached in {steps} steps: "
                + ("the first runs everything." if fewest == 1 else f"{fewest} run everything (Reuse.max_age).")
                + f" The nearest is compute={nearest}.",
                nearest=nearest,
            )
        if together:
            found = self._at_intervals(whole, fewest, left, request.tokens)
            return self._in_part(found, left, request) or found
        warm = max(1, warm_steps(self.reuse.warmup, whole, left))
        # The steps after the warm-up share the rest by their own cost.
        rest = min(1.0, (left - math.fsum(whole[:warm])) / math.fsum(whole[warm:])) if warm < steps else 1.0
        return StalePlan((*whole[:warm], *(rest * cost for cost in whole[warm:])))

    def _runs(self, count: int, steps: int) -> set[int]:
        return set(run_steps(count, steps, self.reuse.max_age, self.reuse.spacing(steps)))

    def _at_intervals(self, whole: Sequence[float], fewest: int, left: float, tokens: int) -> StalePlan:
        """What each step may spend, where as many as possible run everything and the others nothing, or, where what is left over
        pays for it, the maps that were fitted for them."""
        within, steps = left * (1 + 1e-9), len(whole)
        plans = (self._runs(count, steps) for count in range(steps, fewest - 1, -1))
        runs = next(runs for runs in plans if math.fsum(whole[step] for step in runs) <= within)
        rests = RestPlan(steps, tuple(sorted(runs)))
        plan = StalePlan(tuple(cost if step in runs else 0.0 for step, cost in enumerate(whole)), rests=rests)
        if self.stand_ins is None:
            return plan
        fitted = replace(plan, stand_ins=float(sum(self.stand_ins.flops(rests, tokens))))
        return fitted if fitted.cost <= within else plan

    def _in_part(self, plan: StalePlan, left: float, request: Request) -> StalePlan | None:
        """With as many tokens, or as many of the last blocks, at one step at rest as what is left over pays for; None where those
        are too few, or forecasts, which count the steps between runs, have a say."""
        runs, steps = plan.rests, plan.steps
        assert runs is not None
        at = partial_step(runs.runs, steps)
        if not self.config.partial or self.reuse.horizon(steps) > 0 or not at:
            return None
        spent = math.fsum(plan.allotted)
        for tokens, rear in self._parts(request.tokens):
            rests = replace(runs, partial=at, rear=rear)
            if self.stand_ins is not None and not self.stand_ins.knows(rests):
                continue  # what was fitted, to this part or to whole steps, is worth more
            maps = 0.0 if self.stand_ins is None else float(sum(self.stand_ins.flops(rests, request.tokens)))
            cost = math.fsum(self._price(block, tokens, request) for block in self.planner.routed[-rear:])
            if spent + maps + cost <= left * (1 + 1e-9):
                allotted = tuple(cost if step == at else own for step, own in enumerate(plan.allotted))
                return StalePlan(allotted, maps, rests, tokens)
        return None

    def _parts(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(tokens, last blocks; 0 for all of them) that may run at the step in part, the most first."""
        if self.config.partial == "rear":
            yield from ((tokens, rear) for rear in range(len(self.planner.routed) - 1, 0, -1))
            return
        unit = count_unit(tokens, TokenRouting.granularity)
        yield from ((some, 0) for some in range(tokens - unit, math.ceil(_LEAST * tokens) - 1, -unit))

    def decide(
        self,
        block: int,
        batch: int,
        kept: Sequence[int],
        plan: StalePlan,
        context: StepContext,
        find: Find,
        request: Request,
    ) -> tuple[Decision, ...]:
        """What each of the B samples does in this block; settled for all blocks at the first one of a pass.

        Args:
            block: index of the block.
            batch: B.
            kept: tokens that each routed block keeps at this step where it runs [L].
            plan: of the generation.
            context: of the pass.
            find: block -> its residuals in this pass.
            request: of the generation.
        """
        if plan.rests is not None and context.step == plan.rests.partial > 0:
            rear = plan.rests.rear
            known = find(FRONT if rear else block)
            ready = known is not None and all(known.complete)
            if rear and ready and block in self.planner.routed[:-rear]:
                return (Decision("reuse", 0),) * batch
            return (Decision("run", plan.tokens if ready else request.tokens),) * batch
        chosen = self._chosen
        if chosen is None or len(chosen) != batch:
            first = batch // 2 if context.branch == "both" and self.config.cfg_gates == "cond" else 0
            chosen = self._choose(range(first, batch), kept, plan, context, find, request)
            chosen = self._chosen = [*chosen, *chosen] if first else chosen
        entry = find(block)
        return tuple(
            Decision("run", kept[self.planner.routed.index(block)])
            if block in runs or entry is None or not entry.complete[sample]  # without memory for residuals it must run
            else Decision("reuse", 0)
            for sample, runs in enumerate(chosen)
        )

    def _choose(
        self, samples: range, kept: Sequence[int], plan: StalePlan, context: StepContext, find: Find, request: Request
    ) -> list[set[int]]:
        """The blocks that run, for each sample: those that need it most, as far as the step's allotment goes."""
        needs, forced = self._needs(samples, context.step, find)
        prices = {block: self._price(block, k, request) for block, k in zip(self.planner.routed, kept, strict=True)}
        saved = self._saved.get(context.call)
        if saved is None or len(saved) != len(samples):
            saved = self._saved[context.call] = [0.0] * len(samples)
        chosen: list[set[int]] = []
        for sample in range(len(samples)):
            left = plan.allotted[context.step] * (1 + 1e-9) + saved[sample]
            # What has no residual runs in any case, and is paid for by the steps to come if this one cannot.
            runs = {block for block in self.planner.routed if forced[block][sample]}
            left -= sum(prices[block] for block in runs)
            for block in sorted(self.planner.routed, key=lambda block: -needs[block][sample]):
                if block not in runs and prices[block] <= left:
                    runs.add(block)
                    left -= prices[block]
            saved[sample] = left
            chosen.append(runs)
        return chosen

    def _needs(self, samples: range, step: int, find: Find) -> tuple[dict[int, list[float]], dict[int, list[bool]]]:
        """How much each block needs to run, and whether it must, for each of the samples."""
        entries = {block: find(block) for block in self.planner.routed}
        drifts: dict[int, list[float]] = {block: [1.0] * samples.stop for block in entries}
        if self.config.router == "drift":
            moved = {block: entry.relative_drift() for block, entry in entries.items() if entry is not None}
            if moved:  # one transfer for all blocks
                drifts |= dict(zip(moved, torch.stack(list(moved.values())).tolist(), strict=True))
        needs: dict[int, list[float]] = {}
        forced: dict[int, list[bool]] = {}
        for block, entry in entries.items():
            if entry is None:
                needs[block], forced[block] = [math.inf] * len(samples), [True] * len(samples)
                continue
            forced[block] = [not entry.complete[sample] for sample in samples]
            needs[block] = [
                drifts[block][sample] * (step - entry.ran_at[sample])
                if entry.may_serve(sample, self.reuse.max_reuses)
                else math.inf
                for sample in samples
            ]
        return needs, forced

    def _price(self, block: int, kept: int, request: Request) -> float:
        return self.planner.costs[block].flops(kept, request.text_tokens, attended=request.attended)
