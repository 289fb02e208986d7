"""Which blocks run now, for each sample: what the routers said, under the thresholds of the budget, on the host.

Shapes: B samples, L routed blocks, S widths.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shivelight.config import BlockRouting
from shivelight.errors import ShivelightError
from shivelight.execution.context import StepContext
from shivelight.routing import Dial

Action = Literal["run", "reuse", "skip"]
# A router's output for one sample: the gate logit, then S width logits.
SampleLogits = Sequence[float]


@dataclass(frozen=True)
class Decision:
    """What some samples of a batch do in one block.

    Attributes:
        action: run it, add its last residual, or pass by.
        tokens: image tokens that run.
        width: share of the MLP's hidden channels that runs.
    """

    action: Action
    tokens: int
    width: float = 1.0


def choose_action(
    gate_logit: float, dial: Dial, margin: float, may_reuse: bool, closed: Literal["pass", "reuse"] = "pass"
) -> Action:
    """E-DiT's rule: below the threshold a block is skipped, up to `margin` above it the last residual serves, else it runs.
    With `closed` = "reuse": below the threshold the last residual serves where it may, else the block runs.

    A NaN runs the block: the safe answer.
    """
    if closed == "reuse":
        return "reuse" if may_reuse and dial.skips(gate_logit) else "run"
    if dial.skips(gate_logit):
        return "skip"
    return "reuse" if may_reuse and dial.unsure(gate_logit, margin) else "run"


def choose_width(logits: SampleLogits, dial: Dial, widths: Sequence[float]) -> float:
    """Share of the MLP that runs at this dial; ties and NaN go to the widest.

    `routing.width_choice` on the host, for one sample: tensors of five numbers would cost more than the comparison.
    """
    best = len(widths) - 1
    moved = [logit + dial.shift * place for place, logit in enumerate(logits[1:])]
    for place in reversed(range(best)):
        if moved[place] > moved[best]:
            best = place
    return widths[best]


@dataclass
class Spending:
    """FLOPs of the blocks in one generation, counted by the plan's own arithmetic while it runs.

    Attributes:
        flops: of what ran, over all samples and passes.
        dense: what the dense blocks would have taken.
        actions: how often a sample ran, reused and skipped a block.
        shares: by (step, block), the share of the dense block that each sample of each pass took.
    """

    flops: float = 0.0
    dense: float = 0.0
    actions: dict[Action, int] = field(default_factory=lambda: {"run": 0, "reuse": 0, "skip": 0})
    shares: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def begin(self, dense: float, always: float, samples: int) -> None:
        """A pass begins: FLOPs of the dense blocks, and of those that are never routed, for each sample."""
        self.dense += dense * samples
        self.flops += always * samples

    def add(self, step: int, block: int, decisions: Sequence[Decision], costs: Sequence[float], dense: float) -> None:
        """A block runs: what each sample does, its FLOPs, and those of the dense block."""
        shares = self.shares.setdefault((step, block), [])
        for decision, cost in zip(decisions, costs, strict=True):
            self.actions[decision.action] += 1
            self.flops += cost
            shares.append(cost / dense)

    def include(self, other: "Spending") -> None:
        """Add what was counted apart."""
        self.flops += other.flops
        self.dense += other.dense
        for action, count in other.actions.items():
            self.actions[action] += count
        for place, shares in other.shares.items():
            self.shares.setdefault(place, []).extend(shares)

    @property
    def ratio(self) -> float | None:
        """Realised cost over dense; None before the first pass."""
        return self.flops / self.dense if self.dense else None

    def map(self) -> list[list[float]]:
        """Mean share of the dense block that ran, [steps][routed blocks]; of a generation that was read."""
        steps, blocks = (sorted({key[axis] for key in self.shares}) for axis in (0, 1))
        return [[statistics.fmean(self.shares[step, block]) for block in blocks] for step in steps]


class Cap:
    """A bound on what each sample of a generation spends in routed blocks: thresholds follow what is left of it.

    Args:
        budget: FLOPs for one sample and pass of every step.
        shifts: of the dial, ascending.
        remaining: expected FLOPs from each step to the end, at each shift [T][shifts].
    """

    def __init__(self, budget: float, shifts: Sequence[float], remaining: Sequence[Sequence[float]]) -> None:
        self.budget, self.shifts, self.remaining = budget, shifts, remaining
        planned = self._place(remaining[0], budget)
        self.reserved = [*(0.5 * row[planned] for row in remaining[1:]), 0.0]
        self.spent: dict[int, list[float]] = {}
        self._shift: dict[tuple[int, int], list[float]] = {}

    def shift(self, call: int, step: int, batch: int) -> list[float]:
        """Shift of the dial of each sample now: the largest whose expected cost from here on is left; asked at every block,
        settled once a step."""
        key = (call, step)
        if key not in self._shift:
            spent = self._of(call, batch)
            row = self.remaining[min(step, len(self.remaining) - 1)]
            self._shift = {key: [self.shifts[self._place(row, self.budget - used)] for used in spent]}
        return self._shift[key]

    def spend(self, call: int, step: int, sample: int, batch: int, flops: float) -> bool:
        """Whether a sample may still spend this much, which is then noted: half of what the plan has for the later steps
        stays theirs."""
        spent = self._of(call, batch)
        if spent[sample] + flops > self.budget - self.reserved[min(step, len(self.reserved) - 1)]:
            return False
        spent[sample] += flops
        return True

    def _of(self, call: int, batch: int) -> list[float]:
        spent = self.spent.get(call)
        if spent is None or len(spent) != batch:
            # Another batch in the middle of a generation: what its samples have spent is not known, so the dearest of
            # those before counts for all.
            self.spent[call] = spent = [max(spent, default=0.0) if spent else 0.0] * batch
        return spent

    @staticmethod
    def _place(row: Sequence[float], left: float) -> int:
        """Where the largest shift stands whose expected cost is left."""
        return max((place for place, cost in enumerate(row) if cost <= left), default=0)


class RouterOutputs:
    """The routers' logits on the host, when they are needed: those of this step, or those of the step before.

    Args:
        config: of block routing.
    """

    def __init__(self, config: BlockRouting) -> None:
        self.config = config
        self._this_step: dict[int, dict[int, Tensor]] = {}  # by pass and block, still on the device
        self._last_step: dict[int, list[list[float]]] = {}
        self._conditional: dict[int, list[list[float]] | None] = {}  # what the unconditional pass follows

    def clear(self) -> None:
        """A generation begins or ends."""
        self._this_step, self._last_step, self._conditional = {}, {}, {}

    def begin(self, context: StepContext) -> None:
        """A pass begins: in "step" mode, one transfer of all routers' logits in the same pass of the step before."""
        if context.branch != "uncond":
            self._conditional = {}
        if self.config.decide != "step" or context.steps is None:  # a bare transformer's passes have no order
            self._this_step = {}
            return
        logits = self._this_step.pop(context.call, {})
        self._last_step = {}
        if logits:
            together = torch.stack(list(logits.values())).tolist()
            self._last_step = dict(zip(logits, together, strict=True))

    def of(self, block: int, context: StepContext, read: Callable[[], Tensor]) -> list[list[float]] | None:
        """`SampleLogits` for each row that the router reads; None where nothing is known yet, so that everything runs.

        Args:
            block: index of the block.
            context: of the pass.
            read: runs the router now, [B, 1 + S].
        """
        if context.branch == "uncond" and self.config.cfg_gates == "cond":
            if block not in self._conditional:
                raise ShivelightError(
                    "The unconditional pass came before the conditional one of its step; with cfg_gates='cond' the "
                    "conditional branch decides for both. Run it first, under shivelight.branch(model, 'cond')."
                )
            return self._conditional[block]
        if self.config.decide == "step" and context.steps is not None:
            now = self._this_step.setdefault(context.call, {})[block] = read()
            before = self._last_step.get(block)
            logits = before if before is not None and len(before) == len(now) else None
        else:
            logits = read().tolist()
        if context.branch == "cond":
            self._conditional[block] = logits
        return logits
