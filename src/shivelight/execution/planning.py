"""From a budget to a schedule: the policy's shape, solved for the steps, tokens and text at hand."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from shivelight import cost
from shivelight.errors import BudgetError
from shivelight.routing import RatioPolicy, Schedule, count_unit, schedule_from_logits, schedule_within_cost


@dataclass(frozen=True)
class Budget:
    """A bound that every generation meets.

    Attributes:
        kind: "keep" is the mean token keep ratio, "compute" the share of dense FLOPs; in time, "speedup" is how many times faster
            than dense, "latency_ms" the milliseconds that the backbone takes for a generation.
        value: of it; of keep and compute in (0, 1], of speedup at least 1.
        threshold: for "keep": blocks run where their router's probability is at least this; None runs all of them.
        cap: for "compute": no sample ever exceeds it, instead of meeting it on average.
    """

    kind: Literal["keep", "compute", "speedup", "latency_ms"]
    value: float
    threshold: float | None = None
    cap: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.value, int | float) and math.isfinite(self.value)
        if self.kind == "speedup":
            if not number or self.value < 1:
                raise BudgetError(f"speedup is {self.value!r}; give a number of at least 1, for example speedup=1.5.")
        elif self.kind == "latency_ms":
            if not number or self.value <= 0:
                raise BudgetError(
                    f"latency_ms is {self.value!r}; give milliseconds, more than 0, for example latency_ms=800."
                )
        elif not number or not 0.0 < self.value <= 1.0:
            raise BudgetError(f"{self.kind} is {self.value!r}; give a number in (0, 1], for example {self.kind}=0.6.")
        if self.threshold is not None and not (isinstance(self.threshold, int | float) and 0 < self.threshold < 1):
            raise BudgetError(f"threshold is {self.threshold!r}; give a probability in (0, 1), 0.5 in the paper.")

    @property
    def everything(self) -> bool:
        """Whether nothing is to be left out."""
        return self.value == 1.0 and self.threshold is None and self.kind != "latency_ms"

    @property
    def timed(self) -> bool:
        """Whether it is a budget of time, which comes to one of FLOPs once steps and tokens are known."""
        return self.kind in ("speedup", "latency_ms")


@dataclass(frozen=True)
class Request:
    """What a schedule is asked for: all that it depends on except the policy.

    Attributes:
        budget: the bound.
        steps: timesteps of the generation's model calls.
        tokens: N, the image tokens of a dense block.
        text_tokens: length of the text stream.
        warmup: share of the steps, the first ones, that run everything where there is no policy; the others make up for
            them.
        attend_all: whether attention to every token is counted, also to those that do not run (keys and values reused).
    """

    budget: Budget
    steps: tuple[float, ...]
    tokens: int
    text_tokens: int
    warmup: float = 0.0
    attend_all: bool = False

    @property
    def attended(self) -> int | None:
        """Image tokens that are attended to, if more than those that run."""
        return self.tokens if self.attend_all else None


# Steps after a warm-up get at least this share of their cost: with less, a longer warm-up costs more than it brings
# (docs/decisions/training-free.md).
LEAST_AFTER = 1 / 3


def warm_steps(share: float, whole: Sequence[float], budget: float) -> int:
    """How many steps run everything first: this share of them, or as many as leave the later ones `LEAST_AFTER` of their cost;
    at least one if the share is above 0.

    Args:
        share: asked for.
        whole: cost of running everything at each step.
        budget: for all steps.
    """
    warm = math.ceil(share * len(whole))
    while warm > 1 and budget - math.fsum(whole[:warm]) < LEAST_AFTER * math.fsum(whole[warm:]):
        warm -= 1
    return warm


class Planner:
    """Schedules for a backbone, solved once for each distinct request.

    Args:
        costs: of every block of the backbone.
        routed: indices of the routed blocks.
        granularity: see `TokenRouting`; the rounding unit of every schedule is `count_unit(tokens, granularity)`.
    """

    def __init__(self, costs: Sequence[cost.BlockCost], routed: Sequence[int], granularity: int = 1) -> None:
        self.costs = list(costs)
        self.granularity = granularity
        self.routed = tuple(routed)
        self._cache: dict[Hashable, Any] = {}

    def forget(self) -> None:
        """Drop what was solved, after the policy or the routers' records changed."""
        self._cache.clear()

    def once(self, key: Hashable, solve: Callable[[], Any]) -> Any:
        """What `solve` gives, solved once for each key."""
        if key not in self._cache:
            self._cache[key] = solve()
        return self._cache[key]

    def dense_flops(self, tokens: int, text_tokens: int) -> tuple[int, int]:
        """FLOPs of one pass of one sample: (of all blocks, of those that are never routed)."""
        each = [c.flops(tokens, text_tokens) for c in self.costs]
        return sum(each), sum(flops for block, flops in enumerate(each) if block not in self.routed)

    def whole_flops(self, kept: Sequence[Sequence[int]], request: Request) -> list[float]:
        """FLOPs of the routed blocks of one sample at each step [T], if all of them run on the tokens `kept` [T][L]."""
        return [
            math.fsum(
                self.costs[block].flops(k, request.text_tokens, attended=request.attended)
                for block, k in zip(self.routed, row, strict=True)
            )
            for row in kept
        ]

    def schedule(self, policy: RatioPolicy | None, request: Request) -> Schedule:
        """The integers that were asked for; `policy` None means the same ratio at every step after the warm-up."""
        return self.once((policy is None, request), lambda: self._solve(policy, request))

    def planned_ratio(self, schedule: Schedule, request: Request) -> float:
        """Planned FLOPs of the schedule that answers this request, over dense."""
        return cost.planned_ratio(
            self.costs, schedule.keep, self.routed, schedule.tokens, request.text_tokens, attended=request.attended
        )

    def _solve(self, policy: RatioPolicy | None, request: Request) -> Schedule:
        budget, steps, tokens, text_tokens = request.budget, request.steps, request.tokens, request.text_tokens
        shape = (len(steps), len(self.routed))
        if budget.everything:
            return Schedule(((tokens,) * shape[1],) * shape[0], tokens)
        if policy is None:
            logits = torch.zeros(shape)
        else:
            with torch.no_grad():
                logits = policy(torch.tensor(steps, device=policy.bias.device)).float().cpu()
        dense, always = self.dense_flops(tokens, text_tokens)
        share = budget.value if budget.kind == "keep" else (budget.value * dense - always) / (dense - always)
        warm = warm_steps(request.warmup, [1.0] * len(steps), share * len(steps))
        logits[:warm] = 60.0  # a ratio of sigmoid(60) is 1.0 in float64
        unit = count_unit(tokens, self.granularity)
        if budget.kind == "keep":
            return schedule_from_logits(logits, tokens, budget.value, unit)
        price = [self.costs[i] for i in self.routed]
        try:
            return schedule_within_cost(
                logits,
                tokens,
                lambda i, k: price[i].flops(k, text_tokens, attended=request.attended),
                (budget.value * dense - always) * len(steps),
                unit,
            )
        except BudgetError as error:
            least = (always + sum(c.flops(unit, text_tokens, attended=request.attended) for c in price)) / dense
            nearest = math.ceil(least * 1e4) / 1e4  # as printed, and never below what can be reached
            raise BudgetError(
                f"compute={budget.value} cannot be reached: the blocks that are never routed and the text stream take "
                f"{least:.4f} of the dense FLOPs, at {tokens} image and {text_tokens} text tokens. The nearest is "
                f"compute={nearest}.",
                nearest=nearest,
            ) from error
