"""Residuals of earlier steps: what a token that is left out adds instead of nothing.

A block's residual, out - x, moves slowly from one sampling step to the next, so the last one that was computed is a better
guess than zero. State is explicit: one entry for each (pass of the step, block), dropped when a generation begins, when a
shape changes, or when memory runs out. Shapes: B samples, N image tokens, k kept tokens, D width.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from shivelight.execution.tokens import gather_tokens, write_back, write_rows

_EXPIRED = 1e6
_NEVER = -(2**20)


class TokenResiduals:
    """The last residual of every token of one block, when it was computed, and how much it had moved by then.

    Args:
        x: [B, N, D], tells shape, dtype and device.
    """

    def __init__(self, x: Tensor) -> None:
        self.residual = torch.zeros_like(x)
        self.refreshed = torch.full(x.shape[:2], _NEVER, dtype=torch.int32, device=x.device)
        self.drift = torch.zeros(x.shape[:2], device=x.device)
        self.projections: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = (self.residual, self.refreshed, self.drift, *self.projections.values())
        return sum(t.numel() * t.element_size() for t in held)

    def fits(self, x: Tensor) -> bool:
        """Whether it belongs to tokens of this shape, dtype and device."""
        kept = self.residual
        return (kept.shape, kept.dtype, kept.device) == (x.shape, x.dtype, x.device)

    def scores(self, step: int, max_age: int) -> Tensor:
        """How much each token needs to run, [B, N] fp32: how far its residual had moved when last seen, times its age.

        Tokens whose residual may not be used any more come first, oldest first.
        """
        age = (step - self.refreshed).float()
        return torch.where(age > max_age, _EXPIRED * (1 + age / max_age), self.drift * age)

    def complete_projection(self, name: str, indices: Tensor | None, output: Tensor) -> Tensor:
        """A key or value projection of all tokens, from that of the tokens that run and the last one of the others.

        Without it, the tokens that run would attend to each other alone: with reuse, that is the larger error by far
        (docs/decisions/training-free.md).

        Args:
            name: of the projection.
            indices: [B, k], the tokens that run; None for all.
            output: [B, k, E], their projection.

        Returns:
            [B, N, E], or `output` as it is where the others have never run.
        """
        if indices is None:
            self.projections[name] = output
        elif name in self.projections:
            write_rows(self.projections[name], indices, output)
            return self.projections[name]
        return output

    def update(self, x: Tensor, indices: Tensor | None, out: Tensor, step: int, max_age: int) -> Tensor:
        """Take in what a block has computed, and complete its output.

        Args:
            x: [B, N, D], the block's input.
            indices: [B, k], the tokens it ran; None for all.
            out: [B, k, D], its output for them.
            step: the sampling step.
            max_age: residuals that were computed more steps ago are not used.

        Returns:
            [B, N, D]: `out` exactly where the block ran, x + the last residual elsewhere (x alone where there is none).
        """
        if indices is None:
            residual = out - x
            self.drift = torch.linalg.vector_norm((residual - self.residual).float(), dim=-1)
            self.residual = residual
            self.refreshed = torch.full_like(self.refreshed, step)
            return out
        stale = (step - self.refreshed > max_age)[..., None]
        residual = out - gather_tokens(x, indices)
        moved = torch.linalg.vector_norm((residual - gather_tokens(self.residual, indices)).float(), dim=-1)
        completed = torch.where(stale, x, x + self.residual)
        write_rows(self.residual, indices, residual)
        self.drift.scatter_(1, indices, moved)
        self.refreshed.scatter_(1, indices, step)
        return write_back(completed, indices, out)


class ResidualCache:
    """Residuals of all blocks within a bound on memory; the entry that was written longest ago goes first.

    Args:
        max_mb: bound in megabytes (1e6 bytes); an entry that is larger by itself is not kept.
    """

    def __init__(self, max_mb: float) -> None:
        self.max_mb = max_mb
        self._entries: OrderedDict[tuple[int, int], TokenResiduals] = OrderedDict()

    @property
    def megabytes(self) -> float:
        """Memory held, in units of 1e6 bytes."""
        return sum(entry.bytes for entry in self._entries.values()) / 1e6

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def scores(self, place: tuple[int, int], x: Tensor, samples: slice, step: int, max_age: int) -> Tensor | None:
        """`TokenResiduals.scores` of the chosen samples, or None where there is no entry; x [B, N, D] holds only those."""
        entry = self._entries.get(place)
        if entry is None or entry.residual[samples].shape != x.shape:
            return None
        return entry.scores(step, max_age)[samples]

    def enter(self, place: tuple[int, int], x: Tensor) -> TokenResiduals:
        """The entry of a (pass, block) that is about to run on tokens x [B, N, D]; a new one where none fits."""
        entry = self._entries.get(place)
        if entry is None or not entry.fits(x):
            entry = self._entries[place] = TokenResiduals(x)
        self._entries.move_to_end(place)
        return entry

    def trim(self) -> None:
        """Drop what is over the bound."""
        while self._entries and self.megabytes > self.max_mb:
            self._entries.popitem(last=False)
