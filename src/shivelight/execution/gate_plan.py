"""From a budget to thresholds: where the gates must stand so that their expected cost meets what is left to them.

Shapes: T steps of a generation, W records near each step, L routed blocks, S widths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shivelight.cost import BlockCost
from shivelight.routing import Dial, GateRecords, width_choice

# Records made at a shift this far off count 1 / e.
_NEAR = 0.5
_MOST_SHIFTS = 801


@dataclass(frozen=True)
class GatePlan:
    """Where the gates stand in one generation.

    Attributes:
        dial: threshold and shift.
        cost: expected FLOPs of the routed blocks, summed over the steps, for one sample and pass; None if nothing is known.
        steps: how many the sum is over.
        logits: static mode: (gate logits [T][L], width logits [T][L][S]) that decide, the records' means; else None.
        slopes: what the log of a residual's age adds to its block's gate logit [L]; None where closed gates pass by.
        first: the first step at which a block may add its last residual.
    """

    dial: Dial
    cost: float | None
    steps: int
    logits: tuple[list[list[float]], list[list[list[float]]]] | None = None
    slopes: tuple[float, ...] | None = None
    first: int = 0


def aged(slope: float, age: int) -> float:
    """What a residual's age in steps adds to its block's gate logit."""
    return slope * math.log(age)


class GatePlanner:
    """Expected cost of the gates of one generation, as a function of their shift.

    Args:
        costs: of the routed blocks.
        records: what the routers said in training.
        widths: the shares to choose from.
        kept: tokens that run [T][L], from the token schedule.
        steps: timesteps.
        text_tokens: length of the text stream.
        attended: image tokens that are attended to, if more than those that run.
        threshold: tau.
        reuse: (margin, most reuses in a row, first step that may reuse), or None without reuse.
        decide: see `BlockRouting`.
        whole: for each routed block, whether its MLP runs whole at any width [L].
        tokens: N; a block has a residual to add once it ran on all of them.
        slopes: see `GatePlan`.
    """

    def __init__(
        self,
        costs: Sequence[BlockCost],
        records: GateRecords,
        widths: Sequence[float],
        kept: Sequence[Sequence[int]],
        steps: Sequence[float],
        text_tokens: int,
        attended: int | None,
        threshold: float,
        reuse: tuple[float, int, int] | None,
        decide: str,
        whole: Sequence[bool],
        tokens: int,
        slopes: tuple[float, ...] | None = None,
    ) -> None:
        self.gate, self.width, self.recorded_at = records.near(steps)
        self.slopes = slopes
        self.static, self.late, self.threshold, self.reuse = decide == "static", decide == "step", threshold, reuse
        self.all_tokens = torch.tensor([[k == tokens for k in row] for row in kept])  # [T, L]
        self.gate, self.width = self.gate.double(), self.width.double()  # as the decisions are taken
        largest = max(float(logits.nan_to_num(0.0).abs().max()) for logits in (self.gate, self.width))
        if slopes is not None and reuse is not None:
            largest += max(abs(aged(slope, reuse[1])) for slope in slopes)
        # Shifts between which gates open and close, and beyond which nothing changes any more.
        self.reach, self.farthest = 12.0 + largest, 60.0 + 2.0 * largest
        prices = [
            [
                [cost.flops(k, text_tokens, 1.0 if stays else share, attended) for share in widths]
                for cost, k, stays in zip(costs, row, whole, strict=True)
            ]
            for row in kept
        ]
        self.prices = torch.tensor(prices, dtype=torch.float64)  # [T, L, S]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.gate)

    @property
    def least(self) -> float:
        """The least that the gates can be made to cost."""
        return float(self.cost_by_step(-self.farthest).sum())

    def cost_by_step(self, shift: float) -> Tensor:
        """Expected FLOPs of the routed blocks at each step [T], for one sample."""
        dial, (gate, width, weights) = Dial(self.threshold, shift), self._logits_at(shift)
        chosen = width_choice(dial.moved_widths(width))
        prices = self.prices[:, None].expand(*chosen.shape, -1).gather(-1, chosen[..., None]).squeeze(-1)
        runs = self._runs(gate, dial) if self.slopes is None else self._refreshes(gate, dial, self.slopes)
        costs = (prices * runs * weights[..., None]).sum((1, 2))
        if self.late:  # at the first step nothing is known yet, and everything runs
            costs[0] = self.prices[0, :, -1].sum()
        return costs

    def _logits_at(self, shift: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gate logits [T, W, L], width logits [T, W, L, S] and weights [T, W] of the records, the more the nearer to this
        shift they were made; in static mode their weighted means, W = 1."""
        weights = torch.softmax(-(self.recorded_at - shift).abs().double() / _NEAR, dim=1)
        if not self.static:
            return self.gate, self.width, weights
        gate = (self.gate * weights[..., None]).sum(1, keepdim=True)
        width = (self.width * weights[..., None, None]).sum(1, keepdim=True)
        return gate, width, torch.ones_like(weights[:, :1])

    def _runs(self, gate: Tensor, dial: Dial) -> Tensor:
        """Expected runs [T, W, L] of the blocks at this dial: 1, 0, or between where residuals are reused."""
        allowed = (~dial.skips(gate)).double()
        if self.reuse is None:
            return allowed
        margin, most, first = self.reuse
        unsure = ~dial.skips(gate) & dial.unsure(gate, margin)
        if not self.static:
            # A block that stays unsure runs once in (most + 1) steps.
            unsure[: max(first, 1)] = False
            return torch.where(unsure, 1.0 / (most + 1), allowed)
        runs, stored, used = allowed.clone(), torch.zeros_like(allowed[0]).bool(), torch.zeros_like(allowed[0])
        for step in range(len(allowed)):
            reused = unsure[step] & stored & (used < most) & (step >= first)
            runs[step] = torch.where(reused, 0.0, allowed[step])
            ran = runs[step] > 0
            used = torch.where(ran, 0.0, used + reused)
            stored |= ran & self.all_tokens[step]
        return runs

    def _refreshes(self, gate: Tensor, dial: Dial, slopes: Sequence[float]) -> Tensor:
        """Expected runs [T, W, L] where a closed gate reuses: a block runs when its residual is old enough to open the gate,
        in one of so many steps."""
        if self.reuse is None:
            return torch.ones_like(gate)
        _, most, first = self.reuse
        # [ages, T, W, L]: whether a residual that is 1, ..., most steps old opens the gate; an older one may not serve.
        raised = [
            torch.tensor([aged(slope, age) for slope in slopes], dtype=torch.float64) for age in range(1, most + 1)
        ]
        opens = torch.stack([~dial.skips(gate + more) for more in raised])
        if self.static:
            return self._walk(opens, first)
        runs = torch.full_like(gate, 1.0 / (most + 1))
        for age in range(most, 0, -1):
            runs = torch.where(opens[age - 1], 1.0 / age, runs)
        runs[: max(first, 1)] = 1.0
        return runs

    def _walk(self, opens: Tensor, first: int) -> Tensor:
        """The runs [T, 1, L] of static gates, step by step; opens [ages, T, 1, L]."""
        most, steps, _, blocks = opens.shape
        runs = torch.ones(steps, 1, blocks, dtype=torch.float64)
        age, stored = torch.zeros(1, blocks, dtype=torch.int64), torch.zeros(1, blocks, dtype=torch.bool)
        for step in range(steps):
            age += 1
            opened = opens[:, step].gather(0, age.clamp(max=most)[None] - 1)[0]
            ran = ~stored | (age > most) | opened if step >= first else torch.ones_like(stored)
            runs[step] = ran.double()
            age = torch.where(ran, 0, age)
            stored |= ran & self.all_tokens[step]
        return runs

    def plan(self, shift: float) -> GatePlan:
        """The gates at this shift."""
        gate, width, _ = self._logits_at(shift)
        logits = (gate[:, 0].tolist(), width[:, 0].tolist()) if self.static else None
        cost = float(self.cost_by_step(shift).sum())
        first = 0 if self.reuse is None else self.reuse[2]
        return GatePlan(Dial(self.threshold, shift), cost, self.steps, logits, self.slopes, first)

    def solve(self, budget: float) -> GatePlan:
        """The largest shift whose expected cost is within `budget` FLOPs of the routed blocks, at least `least`."""
        if budget >= float(self.cost_by_step(self.farthest).sum()):
            return self.plan(self.farthest)
        # Routers answer to the dial, so the cost need not rise everywhere: the last place of a grid that fits, then halves.
        grid = [-self.farthest, *self._shifts(), self.farthest]
        fits = [place for place, shift in enumerate(grid) if float(self.cost_by_step(shift).sum()) <= budget]
        low, high = grid[fits[-1]], grid[fits[-1] + 1]
        for _ in range(60):
            middle = (low + high) / 2
            if float(self.cost_by_step(middle).sum()) <= budget:
                low = middle
            else:
                high = middle
        return self.plan(low)

    def _shifts(self) -> list[float]:
        return torch.linspace(-self.reach, self.reach, min(math.ceil(8 * self.reach), _MOST_SHIFTS)).tolist()

    def remaining(self) -> tuple[list[float], list[list[float]]]:
        """Shifts, ascending, and for each step the expected FLOPs from there to the end at each of them: what a hard cap
        steers by."""
        shifts = self._shifts()
        costs = torch.stack([self.cost_by_step(shift) for shift in shifts], dim=1)  # [T, shifts]
        return shifts, costs.flip(0).cumsum(0).flip(0).tolist()
