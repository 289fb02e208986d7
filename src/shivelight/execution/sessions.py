"""What training and measurements put into, or see of, the forward pass of a routed backbone."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shivelight.config import RestPlan
from shivelight.execution.reuse import BlockResiduals


class Session(Protocol):
    """What training (or a measurement) puts into the forward pass; see `training/estimators.py`."""

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Scores to rank by [B, N], and how many tokens each sample keeps."""

    def drift(self, block: int) -> Tensor | None:
        """`centred_log_drift` [B, N] of the residuals that rejected tokens add; None where they add none."""

    def residuals(self, block: int, x: Tensor) -> BlockResiduals | None:
        """What rejected tokens add to x [B, N, D], or None."""

    def enter(self, block: int, x: Tensor, kept: Tensor) -> Tensor:
        """The block's input [B, N, D], given the mask of kept tokens [B, N]."""

    def leave(self, block: int, x: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        """The block's output [B, N, D], given its input."""


class Observer(Protocol):
    """Sees what every routed block does, without changing it."""

    def __call__(
        self, block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: tuple[Tensor, Tensor] | None
    ) -> None:
        """Input and output [B, N, D] of a block; indices [B, k] of the tokens it ran, None for all (or several k); text tokens
        [B, M, D] before and after, None where it returns none."""


class GateSession(Protocol):
    """What training puts into the forward pass of block routing; see `training/session.py`."""

    def choose(self, block: int, logits: Tensor) -> tuple[tuple[bool, ...], Tensor | None]:
        """From gate and width logits [B, 1 + S]: whether each sample runs, and a mask [B, H] of the MLP's channels."""

    def leave(
        self, block: int, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams that leave the block, given those that entered it and those that came out."""


class RestSession(Protocol):
    """What fits stand-ins puts into the passes of a generation: blocks run at steps at rest too, to be learned from; see
    `calibration/stand_ins.py`."""

    def fit(self, plan: RestPlan, step: int, call: int, values: Sequence[Tensor], out: Tensor, paired: bool) -> Tensor:
        """What is to stand in at this pass of a step [B, N, D], of the K values that are known [B, N, D] and what the blocks made
        [B, N, D]; `paired` where they are [unconditional; conditional] halves."""

    def needs(self, step: int, call: int, values: Sequence[Tensor]) -> Tensor:
        """Scores [B, N] of the tokens of a pass that was fitted, by how far off what stands in is."""
