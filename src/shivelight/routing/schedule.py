"""The policy frozen into integers: how many tokens each block keeps at each step, known before the first step.

Shapes: S steps, L routed blocks, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shivelight.errors import AdapterError, BudgetError
from shivelight.routing.select import guarded_floor

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Schedule:
    """Kept tokens per step and routed block.

    Attributes:
        keep: S rows of L counts, each from 1 to `tokens`.
        tokens: N, the image tokens of the picture.
    """

    keep: tuple[tuple[int, ...], ...]
    tokens: int

    def __post_init__(self) -> None:
        if not self.keep or not self.keep[0] or len({len(row) for row in self.keep}) != 1:
            raise BudgetError("A schedule needs one row for each step, all of the same length, at least one block.")
        for step, row in enumerate(self.keep):
            for block, kept in enumerate(row):
                if not 1 <= kept <= self.tokens:
                    raise BudgetError(
                        f"The schedule keeps {kept} of {self.tokens} tokens at step {step}, routed block {block}; "
                        f"every entry must be from 1 to {self.tokens}."
                    )

    @property
    def steps(self) -> int:
        """S."""
        return len(self.keep)

    @property
    def blocks(self) -> int:
        """L."""
        return len(self.keep[0])

    @property
    def total(self) -> int:
        """Kept tokens, summed over steps and blocks."""
        return sum(map(sum, self.keep))

    @property
    def mean_keep(self) -> float:
        """Mean keep ratio over steps and routed blocks: what the `keep` budget bounds."""
        return self.total / (self.tokens * self.steps * self.blocks)

    def row(self, step: int) -> tuple[int, ...]:
        """Kept tokens of each routed block at one step."""
        return self.keep[step]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        return {"tokens": self.tokens, "keep": [list(row) for row in self.keep]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schedule:
        """The schedule written by `to_dict`."""
        try:
            return cls(tuple(tuple(int(kept) for kept in row) for row in data["keep"]), int(data["tokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                f"A stored schedule cannot be read ({error!r}); it needs 'tokens' and 'keep'."
            ) from error

    def __str__(self) -> str:
        title = f"{self.steps} steps x {self.blocks} blocks, {self.tokens} tokens, mean keep {self.mean_keep:.4f}"
        shown = range(self.steps) if self.steps <= 12 else sorted({round(i * (self.steps - 1) / 11) for i in range(12)})
        lines = [f"  step {step:>3}: " + " ".join(f"{kept:>5}" for kept in self.keep[step]) for step in shown]
        return "\n".join([title, *lines])


def uniform_schedule(steps: int, blocks: int, tokens: int, keep: float) -> Schedule:
    """The same ratio at every step and block; the total is floor(keep * N * S * L), leftovers are spread evenly."""
    total = _total_tokens(steps, blocks, tokens, keep)
    base, leftover = divmod(total, steps * blocks)
    counts = [base] * (steps * blocks)
    for entry in _spread_order(len(counts))[:leftover]:
        counts[entry] += 1
    return _from_flat(counts, blocks, tokens)


def schedule_from_logits(logits: Tensor, tokens: int, keep: float, unit: int = 1) -> Schedule:
    """The policy's shape at a mean keep ratio: sum(k) is floor(keep * N * S * L) exactly, every k from 1 to N; or, for
    a larger unit u, every k a multiple of u and sum(k) the largest such sum within the budget.

    The anchor is solved with the clamp to [1, N] inside, the ratios are rounded down, and the tokens left over go to
    the largest remainders. Equal remainders are served spread out, so flat logits give `uniform_schedule`.

    Args:
        logits: [S, L], from `RatioPolicy`.
        tokens: N.
        keep: mean keep ratio over steps and blocks, in (0, 1].
        unit: u, a divisor of N.
    """
    if unit > 1:
        steps, blocks = logits.shape
        _total_tokens(steps, blocks, _units(tokens, unit), keep, unit)  # an error speaks of tokens, not of units
        return _scaled(schedule_from_logits(logits, _units(tokens, unit), keep), unit)
    flat = _finite_flat(logits)
    steps, blocks = logits.shape
    total = _total_tokens(steps, blocks, tokens, keep)
    entries = steps * blocks
    if total == tokens * entries:
        return _from_flat([tokens] * entries, blocks, tokens)
    mean = total / (tokens * entries)
    centre = math.log(mean) - math.log1p(-mean)
    low, high = centre - float(flat.max()), centre - float(flat.min())
    anchor = _bisect(lambda anchor: float(_ideal_counts(flat, anchor, tokens).sum()) <= total, low, high)

    ideal = _ideal_counts(flat, anchor, tokens)
    counts = [int(count) for count in ideal.floor().tolist()]
    leftover = total - sum(counts)
    for entry in _by_remainder(ideal):
        if leftover == 0:
            break
        if counts[entry] < tokens:
            counts[entry] += 1
            leftover -= 1
    return _from_flat(counts, blocks, tokens)


def schedule_within_cost(
    logits: Tensor, tokens: int, cost_of: Callable[[int, int], float], budget: float, unit: int = 1
) -> Schedule:
    """The policy's shape at a cost: the total is within `budget`, and no entry could take one more unit within it.

    The cost of the rounded-down schedule is monotone in the anchor where `cost_of` is monotone in k; after
    bisection, single tokens are added in order of remainder, round by round, until none fits.

    Args:
        logits: [S, L], from `RatioPolicy`.
        tokens: N.
        cost_of: (position of the block among the routed ones, k) -> cost, in any unit; non-decreasing in k.
        budget: the most that the sum over steps and blocks may cost, in the same unit of cost.
        unit: tokens that every k is a multiple of, a divisor of N.
    """
    if unit > 1:
        in_units = schedule_within_cost(
            logits, _units(tokens, unit), lambda block, count: cost_of(block, count * unit), budget
        )
        return _scaled(in_units, unit)
    flat = _finite_flat(logits)
    steps, blocks = logits.shape
    price = cache(cost_of)

    def cost(counts: list[int]) -> float:
        return math.fsum(price(entry % blocks, count) for entry, count in enumerate(counts))

    entries = steps * blocks
    dense, least = cost([tokens] * entries), cost([1] * entries)
    if dense <= budget:
        return _from_flat([tokens] * entries, blocks, tokens)
    if not least <= budget:
        raise BudgetError(
            f"A cost of {budget:.6g} cannot be reached: one token in each of {blocks} blocks at each of {steps} steps "
            f"costs {least:.6g} already, {least / dense:.4f} of running everything. Ask for that much or more.",
            nearest=least,
        )

    def rounded(anchor: float) -> list[int]:
        return [int(count) for count in _ideal_counts(flat, anchor, tokens).floor().tolist()]

    # sigmoid(-40) * N is below one token and sigmoid(40) is 1.0 in float64.
    anchor = _bisect(lambda a: cost(rounded(a)) <= budget, -40.0 - float(flat.max()), 40.0 - float(flat.min()))
    counts = rounded(anchor)
    order = _by_remainder(_ideal_counts(flat, anchor, tokens))
    paid = [price(entry % blocks, count) for entry, count in enumerate(counts)]
    grown = True
    while grown:
        grown = False
        for entry in order:
            if counts[entry] == tokens:
                continue
            before, paid[entry] = paid[entry], price(entry % blocks, counts[entry] + 1)
            if math.fsum(paid) <= budget:
                counts[entry] += 1
                grown = True
            else:
                paid[entry] = before
    return _from_flat(counts, blocks, tokens)


def _units(tokens: int, unit: int) -> int:
    if tokens % unit:
        raise BudgetError(f"{tokens} tokens cannot be counted in units of {unit}; give a divisor.")
    return tokens // unit


def _scaled(schedule: Schedule, unit: int) -> Schedule:
    return Schedule(tuple(tuple(unit * k for k in row) for row in schedule.keep), unit * schedule.tokens)


def _total_tokens(steps: int, blocks: int, tokens: int, keep: float, unit: int = 1) -> int:
    if min(steps, blocks, tokens) < 1:
        raise BudgetError(f"A schedule of {steps} steps x {blocks} blocks x {tokens} tokens; all must be at least 1.")
    if not 0.0 < keep <= 1.0:
        raise BudgetError(f"keep is {keep}; give a mean keep ratio in (0, 1], for example 0.6.")
    entries = steps * blocks
    total = min(guarded_floor(keep * tokens * entries), tokens * entries)
    if total < entries:
        raise BudgetError(
            f"keep={keep} cannot be reached with {tokens * unit} tokens: every block runs at least {unit}. "
            f"The nearest is keep={math.ceil(1e6 / tokens) / 1e6}.",
            nearest=1.0 / tokens,
        )
    return total


def _finite_flat(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or not logits.numel():
        raise BudgetError(f"The policy's logits have shape {tuple(logits.shape)}; they must be [steps, blocks].")
    flat = logits.detach().to("cpu", torch.float64).reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise AdapterError(
            "The ratio policy gives NaN or infinite logits: its weights are broken; load the adapter anew."
        )
    return flat


def _ideal_counts(flat: Tensor, anchor: float, tokens: int) -> Tensor:
    return (tokens * torch.sigmoid(flat + anchor)).clamp(1.0, float(tokens))


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest float64 (to its resolution) at which `holds` is true, given that it is true at `low`."""
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return low
        if holds(middle):
            low = middle
        else:
            high = middle


def _spread_order(entries: int) -> list[int]:
    """Indices such that every prefix is spread evenly over the range (multiples of the golden ratio)."""
    return sorted(range(entries), key=lambda entry: (entry * _GOLDEN) % 1.0)


def _by_remainder(ideal: Tensor) -> list[int]:
    """Entries by falling remainder; those equal to nine digits are spread out, not served first come first."""
    remainders = [round(remainder, 9) for remainder in (ideal - ideal.floor()).tolist()]
    return sorted(_spread_order(len(remainders)), key=lambda entry: -remainders[entry])


def _from_flat(counts: list[int], blocks: int, tokens: int) -> Schedule:
    rows = [tuple(counts[start : start + blocks]) for start in range(0, len(counts), blocks)]
    return Schedule(tuple(rows), tokens)
