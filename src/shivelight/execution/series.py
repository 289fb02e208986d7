"""A value that is computed now and then, and what it is expected to be in between.

Shapes: B samples, R rows (tokens), D width.
"""

import torch
from torch import Tensor

from shivelight.execution.tokens import gather_tokens, write_rows

NEVER = -(2**20)


class Series:
    """Rows of a value: the last one of each, when it was computed, and, for a forecast, the one before.

    After two runs, `interval` steps apart, the value is taken to go on as it changed between them, by a share of that which falls
    from 1 to 0 as the interval grows to the horizon, and never for longer than one interval more: what lies further ahead is
    guessed too badly (docs/decisions/training-free.md). With horizon 0 it stays as it was.

    Args:
        like: [B, R, D], tells shape and device.
        horizon: in steps.
        remembers: keep the value before the last one even where nothing is forecast.
    """

    def __init__(self, like: Tensor, horizon: float = 0.0, remembers: bool = False) -> None:
        self.horizon = horizon
        self.last = torch.zeros_like(like)
        self.at = torch.full(like.shape[:2], NEVER, dtype=torch.int32, device=like.device)
        self.before = torch.zeros_like(like) if horizon or remembers else None
        self.at_before = self.at.clone() if horizon or remembers else None
        # at and at_before on the host, each while all rows agree: then a forecast is one operation, with a number for its weight.
        self._when: tuple[int | None, int | None] = (NEVER, NEVER)

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = (self.last, self.at, self.before, self.at_before)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def fits(self, like: Tensor) -> bool:
        """Whether it belongs to rows of this shape and device; what goes into a block and what comes out may differ in dtype, as
        under autocast."""
        return (self.last.shape, self.last.device) == (like.shape, like.device)

    def take(self, samples: Tensor) -> "Series":
        """That of some samples [b], as a copy."""
        part = Series.__new__(Series)
        part.horizon, part.last, part.at = self.horizon, self.last[samples], self.at[samples]
        part.before = None if self.before is None else self.before[samples]
        part.at_before = None if self.at_before is None else self.at_before[samples]
        part._when = self._when
        return part

    def put(self, samples: Tensor, part: "Series") -> None:
        """Write back what `take` gave out."""
        at, before = (own if own == theirs else None for own, theirs in zip(self._when, part._when, strict=True))
        self._when = at, before
        for whole, own in (
            (self.last, part.last),
            (self.at, part.at),
            (self.before, part.before),
            (self.at_before, part.at_before),
        ):
            if whole is not None and own is not None:
                whole[samples] = own

    def update(self, value: Tensor, step: int, indices: Tensor | None = None) -> None:
        """Take in what was computed at a step: value [B, k, D] of the rows `indices` [B, k], or [B, R, D] of all,
        which is then kept and changed by later ones."""
        if indices is None:
            if self.before is not None:
                self.before, self.at_before = self.last, self.at
            self.last, self.at = value, torch.full_like(self.at, step)
            self._when = step, self._when[0]
            return
        self._when = None, None
        if self.before is not None and self.at_before is not None:
            write_rows(self.before, indices, gather_tokens(self.last, indices))
            self.at_before.scatter_(1, indices, self.at.gather(1, indices))
        write_rows(self.last, indices, value)
        self.at.scatter_(1, indices, step)

    def detach(self) -> None:
        """Drop the gradients' way back to what computed it."""
        self.last = self.last.detach()
        self.before = None if self.before is None else self.before.detach()

    def stale(self, step: int, most: int) -> bool | Tensor:
        """Whether a row was computed more than `most` steps ago: one answer where all rows agree, else [B, R]."""
        at = self._when[0]
        return step - (self.at if at is None else at) > most

    def values(self) -> list[Tensor]:
        """What is known of all rows [B, R, D], the last first; only while all rows agree on when they were computed."""
        known = [] if self._when[0] in (None, NEVER) else [self.last]
        if known and self.before is not None and self._when[1] not in (None, NEVER):
            known.append(self.before)
        return known

    def expected(self, step: int) -> Tensor:
        """What every row is taken to be at a step [B, R, D]; may be the series' own memory, so do not write into it."""
        if self.before is None or self.at_before is None or not self.horizon:
            return self.last
        at, before = self._when
        if at is not None and before is not None:
            interval = max(1, at - before)
            ahead = max(0.0, 1 - interval / self.horizon) * min(1.0, (step - at) / interval)
            return torch.lerp(self.before, self.last, 1 + ahead)
        between = (self.at - self.at_before).clamp(min=1)
        # What was computed once alone has not changed yet: its interval is beyond every horizon.
        share = (1 - between / self.horizon).clamp(min=0) * ((step - self.at) / between).clamp(max=1)
        return torch.lerp(self.before, self.last, (1 + share)[..., None].to(self.last.dtype))
