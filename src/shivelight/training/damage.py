"""What it costs to let one block add a residual of an earlier step: measured, and learned by the block routers.

The gradient that a straight-through gate gets is of first order, and at a student that equals its teacher the first order of a
squared error is zero: gates then learn from interactions alone, which are small and noisy. But the damage itself can be
measured. For a few blocks of every micro-batch the pass is repeated with that block alone adding its old residual, and the
router is taught the logarithm of the squared change of the model's output. A residual of age a does damage s a^2, so a block
that runs every A steps costs s A^3 / 3 + (the price of one run) in A steps; that is least where s A^2 * A, its damage times
its age, comes to a fixed multiple of the price. So the gate's logit is log(damage) + log(age), and the dial sets the price.

Shapes: B samples, N image tokens, M text tokens, D width, L routed blocks, S widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from shivelight.execution.reuse import CachedPass
from shivelight.execution.routed import Routed
from shivelight.training.session import TeacherRecord

_LEAST = 1e-12  # squared change of a normalised output; below it there is no damage to tell apart


@dataclass
class GateReading:
    """An `Observer` of the dense pass that also asks each block's router, with gradients.

    Attributes:
        routed: the backbone's state.
        teacher: sees the pass too.
        logits: per routed block [B, 1 + S].
    """

    routed: Routed
    teacher: TeacherRecord
    logits: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: tuple[Tensor, Tensor] | None
    ) -> None:
        """Ask the router what it says of the block's input."""
        self.teacher(block, x, out, kept, text)
        with torch.enable_grad():
            self.logits[block] = self.routed.read_gates(block, x, None if text is None else text[0])


@dataclass
class OneClosed:
    """A `GateSession` in which one block adds its old residual for all samples, and all others run.

    Attributes:
        block: the one that is left out.
        cached: its residuals.
    """

    block: int
    cached: CachedPass

    def choose(self, block: int, logits: Tensor) -> tuple[tuple[bool, ...], Tensor | None]:
        """Every sample runs every block but one, at its full width."""
        return (block != self.block,) * len(logits), None

    def leave(
        self, block: int, before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output, or its input plus the old residuals."""
        if block != self.block:
            return after
        image, text = before
        if text is not None and self.cached.text_residual is not None:
            text = text + self.cached.text_residual.to(text.dtype)
        return image + self.cached.residual.to(image.dtype), text


def log_damage(wanted: Tensor, changed: Tensor) -> Tensor:
    """log of the mean squared change of the model's output [B, ...], for each sample [B], fp32."""
    return (changed.float() - wanted.float()).square().flatten(1).mean(1).clamp(min=_LEAST).log()


def damage_loss(logits: Tensor, damage: Tensor, age: int) -> Tensor:
    """Huber loss of a block's gate logits [B], at this age of its residual, to log(damage) + log(age)."""
    return F.smooth_l1_loss(logits.float(), damage + math.log(age))
