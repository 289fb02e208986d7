"""The curvature h of each block, for the second order of a token's gain: fitted to true flips while a run goes on.

A fit repeats the student's pass on the same batch and the same decisions, but in one block a few tokens change places: as many
that were kept are left out as rejected ones are put in, so that k stays, every gather remains a real batch, and what residuals
have in common cancels. The change of the loss, its first order and the sum of |r|^2 give one equation for h
(`estimators.curvature_moments`); h is the ratio of the equations' running averages. A fit costs one forward pass without
gradients, and all fits of a step one more backward pass through one micro-batch. Every block is fitted once before it is used;
afterwards one block in turn every `FIT_EVERY` steps.

Shapes: B samples, N tokens, L routed blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shivelight.execution.reuse import CachedPass
from shivelight.training.session import TokenSession

FIT_EVERY = 4
_NEWEST = 0.2  # weight of the newest equation in the averages
_SWAPPED = 1 / 64  # share of the tokens that is put in, and as many are taken out


class Curvature(nn.Module):
    """h of each routed block; in buffers, so that it is saved, resumed and moved like any module's state.

    Args:
        routed: indices of the routed blocks.
        reduce: mean over processes, `accelerate.Accelerator.reduce`; None for a single process.
    """

    moments: Tensor
    updates: Tensor

    def __init__(self, routed: tuple[int, ...], reduce: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.routed, self.reduce = routed, reduce
        self.register_buffer("moments", torch.zeros(len(routed), 2))
        self.register_buffer("updates", torch.zeros(len(routed), dtype=torch.int64))

    def due(self, step: int) -> tuple[int, ...]:
        """The blocks to fit at this step."""
        missing = [block for block, count in zip(self.routed, self.updates.tolist(), strict=True) if count == 0]
        turn = [self.routed[step // FIT_EVERY % len(self.routed)]] if step % FIT_EVERY == 0 else []
        return tuple(missing or turn)

    def update(self, block: int, moments: Tensor) -> None:
        """Take in a fit's moments [2]; those of no swap at all, (0, 0), change nothing."""
        place = self.routed.index(block)
        newest = moments.detach().to(self.moments)
        if self.reduce is not None:
            newest = self.reduce(newest, reduction="mean")
        if not bool(newest[1] > 0.0):
            return
        weight = 1.0 if self.updates[place] == 0 else _NEWEST
        self.moments[place] += weight * (newest - self.moments[place])
        self.updates[place] += 1

    def of(self, block: int) -> Tensor:
        """h, a scalar; 0 before the first fit, which leaves the first order."""
        numerator, denominator = self.moments[self.routed.index(block)]
        return torch.where(denominator > 0.0, numerator / denominator.clamp(min=1e-38), 0.0)


@dataclass
class SwapSession:
    """A `Session` that repeats a pass with the same decisions, except that in one block some tokens change places.

    Attributes:
        base: the pass, which has run.
        block: where tokens change places.
        taken_out: [B, N] bool, kept tokens that are rejected now.
        put_in: [B, N] bool, rejected tokens that are kept now; of each sample as many as are taken out.
        features: the outputs of the blocks that are compared.
    """

    base: TokenSession
    block: int
    taken_out: Tensor
    put_in: Tensor
    features: dict[int, Tensor] = field(default_factory=dict)

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What the pass decided; tokens that change places rank last or first."""
        scores, counts = self.base.decided[block]
        if block == self.block:
            scores = scores.masked_fill(self.taken_out, -torch.inf).masked_fill(self.put_in, torch.inf)
        return scores, counts

    def drift(self, block: int) -> Tensor | None:
        """As in the pass."""
        return self.base.drift(block)

    def residuals(self, block: int, x: Tensor) -> CachedPass | None:
        """As in the pass."""
        return self.base.residuals(block, x)

    def enter(self, block: int, x: Tensor, kept: Tensor) -> Tensor:
        """No gradients here."""
        return x

    def leave(self, block: int, x: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        """No gradients here."""
        if block in self.base.teacher.features_at:
            self.features[block] = out
        return out


def swapped(session: TokenSession, block: int, generator: torch.Generator) -> SwapSession | None:
    """Draw which tokens change places, as many of each sample; None where all tokens are kept, or none."""
    samples, tokens = session.kept[block].shape
    fewest = min(min(k, tokens - k) for k in session.decided[block][1])
    count = min(max(1, round(_SWAPPED * tokens)), fewest)
    if count == 0:
        return None
    kept = session.kept[block]
    here = kept.cpu()
    order = torch.rand(samples, tokens, generator=generator)
    masks = []
    for pool in (here, ~here):
        chosen = order.masked_fill(~pool, -1.0).topk(count, dim=1).indices
        masks.append(torch.zeros_like(here).scatter_(1, chosen, True).to(kept.device))
    return SwapSession(session, block, taken_out=masks[0], put_in=masks[1])


def first_order(swap: SwapSession, gain: Tensor) -> tuple[Tensor, Tensor]:
    """What the first order predicts of a swap, and the sum of |r|^2 over what changed places.

    Args:
        swap: from `swapped`.
        gain: [B, N], the gradient of the loss to the block's inclusion.
    """
    squares = swap.base.squares[swap.block]
    moved = swap.put_in | swap.taken_out
    return (gain * swap.put_in).sum() - (gain * swap.taken_out).sum(), (squares * moved).sum()
