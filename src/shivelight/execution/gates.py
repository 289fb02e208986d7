"""Which blocks run now, for each sample: what the routers said, under the thresholds of the budget, on the host.

Shapes: B samples, L routed blocks, S widths.
"""

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
# One router's word on one sample: the gate logit, then S width logits.
Word = Sequence[float]


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


def choose_action(gate_logit: float, dial: Dial, margin: float, may_reuse: bool) -> Action:
    """E-DiT's rule: below the threshold a block is skipped, up to `margin` above it the last residual serves, else it runs.

    A NaN runs the block: the safe answer.
    """
    moved = gate_logit + dial.shift
    if moved < dial.low:
        return "skip"
    return "reuse" if may_reuse and moved <= dial.high(margin) else "run"


def choose_width(word: Word, dial: Dial, widths: Sequence[float]) -> float:
    """Share of the MLP that runs at this dial; ties and NaN go to the widest."""
    best = len(widths) - 1
    moved = [logit + dial.shift * place for place, logit in enumerate(word[1:])]
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
    """

    flops: float = 0.0
    dense: float = 0.0
    actions: dict[Action, int] = field(default_factory=lambda: {"run": 0, "reuse": 0, "skip": 0})

    @property
    def ratio(self) -> float | None:
        """Realised cost over dense; None before the first pass."""
        return self.flops / self.dense if self.dense else None


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


class GateWords:
    """What the routers said, when it is needed: now, from the step before, or from the records.

    Args:
        config: of block routing.
    """

    def __init__(self, config: BlockRouting) -> None:
        self.config = config
        self._said: dict[int, dict[int, Tensor]] = {}
        self._heard: dict[int, list[list[float]]] = {}
        self._rule: dict[int, list[list[float]] | None] = {}

    def clear(self) -> None:
        """A generation begins or ends."""
        self._said, self._heard, self._rule = {}, {}, {}

    def begin(self, context: StepContext) -> None:
        """A pass begins: in "step" mode, one transfer of what all routers said in the same pass of the step before."""
        if context.branch != "uncond":
            self._rule = {}
        if self.config.decide != "step" or context.steps is None:  # a bare transformer's passes have no order
            self._said = {}
            return
        said = self._said.pop(context.call, {})
        self._heard = {}
        if said:
            together = torch.stack(list(said.values())).tolist()
            self._heard = dict(zip(said, together, strict=True))

    def of(self, block: int, context: StepContext, read: Callable[[], Tensor]) -> list[list[float]] | None:
        """One `Word` for each row that the router reads; None where nothing is known yet, so that everything runs.

        Args:
            block: index of the block.
            context: of the pass.
            read: runs the router now, [B, 1 + S].
        """
        if context.branch == "uncond" and self.config.cfg_gates == "cond":
            if block not in self._rule:
                raise ShivelightError(
                    "The unconditional pass came before the conditional one of its step; with cfg_gates='cond' the "
                    "conditional branch decides for both. Run it first, under shivelight.branch(model, 'cond')."
                )
            return self._rule[block]
        if self.config.decide == "step" and context.steps is not None:
            said = read()
            self._said.setdefault(context.call, {})[block] = said
            heard = self._heard.get(block)
            words = heard if heard is not None and len(heard) == len(said) else None
        else:
            words = read().tolist()
        if context.branch == "cond":
            self._rule[block] = words
        return words
