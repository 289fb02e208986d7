"""Residuals of earlier steps: what a token that is left out adds instead of nothing.

A block's residual, out - x, moves slowly from one sampling step to the next, so the last one that was computed is a better
guess than zero. State is explicit: one entry for each (pass of the step, block), dropped when a generation begins, when a
shape changes, or when memory runs out. Shapes: B samples, N image tokens, M text tokens, k kept tokens, D width.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shivelight.execution.region import Loan
from shivelight.execution.series import NEVER, Series
from shivelight.execution.tokens import gather_tokens, write_back, write_rows

_EXPIRED = 1e6
# The block's number under which stands what all blocks make together, and what those make that rest where the last alone run.
TOGETHER, FRONT = -1, -2


class BlockResiduals:
    """The last residual of every token of one block, when it was computed, and how much it had moved by then.

    Args:
        x: [B, N, D], tells shape, dtype and device.
        text: [B, M, D], the text tokens, or None where the block has none.
        horizon: in steps, of forecasts; 0 for none.
        remembers: what stands in is worked out from what went in and came out at the last two runs, so keep both.
    """

    def __init__(self, x: Tensor, text: Tensor | None = None, horizon: float = 0.0, remembers: bool = False) -> None:
        self.image = Series(x, horizon, remembers)
        self.entered = Series(x, remembers=True) if remembers else None
        self.text = None if text is None else Series(text, horizon)
        # On the host, for each sample: whether every token has run once, how often in a row the block was left out, when it
        # ran.
        self.complete = [False] * len(x)
        self.reused = [0] * len(x)
        self.ran_at = [NEVER] * len(x)
        self.drift = torch.zeros(x.shape[:2], device=x.device)
        self.projections: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = (self.drift, *self.projections.values())
        series = sum(own.bytes for own in (self.image, self.entered, self.text) if own is not None)
        return series + sum(t.numel() * t.element_size() for t in held)

    def fits(self, x: Tensor, text: Tensor | None = None) -> bool:
        """Whether it belongs to tokens of this shape, dtype and device."""
        own = None if self.text is None else self.text.last.shape
        return own == (None if text is None else text.shape) and self.image.fits(x)

    def take(self, samples: Tensor, chosen: Sequence[int]) -> "BlockResiduals":
        """The entries of some samples, as copies; their numbers [b] on x's device, and on the host."""
        part = BlockResiduals.__new__(BlockResiduals)
        part.image, part.text = self.image.take(samples), None if self.text is None else self.text.take(samples)
        part.entered = None if self.entered is None else self.entered.take(samples)
        part.drift = self.drift[samples]
        part.complete = [self.complete[sample] for sample in chosen]
        part.reused = [self.reused[sample] for sample in chosen]
        part.ran_at = [self.ran_at[sample] for sample in chosen]
        # Those of a sample that never ran whole hold nothing.
        part.projections = {name: p[samples] for name, p in self.projections.items()} if all(part.complete) else {}
        return part

    def put(self, samples: Tensor, chosen: Sequence[int], part: "BlockResiduals") -> None:
        """Write back what `take` gave out."""
        self.image.put(samples, part.image)
        self.drift[samples] = part.drift
        if self.entered is not None and part.entered is not None:
            self.entered.put(samples, part.entered)
        if self.text is not None and part.text is not None:
            self.text.put(samples, part.text)
        for name, projection in part.projections.items():
            if name not in self.projections:
                self.projections[name] = projection.new_zeros(len(self.complete), *projection.shape[1:])
            self.projections[name][samples] = projection
        for place, sample in enumerate(chosen):
            self.complete[sample], self.reused[sample] = part.complete[place], part.reused[place]
            self.ran_at[sample] = part.ran_at[place]

    def detach(self) -> None:
        """Drop the gradients' way back to what computed them."""
        for series in (self.image, self.entered, self.text):
            if series is not None:
                series.detach()
        self.projections = {name: held.detach() for name, held in self.projections.items()}

    def may_serve(self, sample: int, most: int) -> bool:
        """Whether a sample's residual is there and was used fewer than `most` times in a row."""
        return self.complete[sample] and self.reused[sample] < most

    def relative_drift(self) -> Tensor:
        """How far the block's residual had moved when it was last computed, over its length: [B] fp32."""
        length = torch.linalg.vector_norm(self.image.last.float(), dim=(1, 2))
        return torch.linalg.vector_norm(self.drift, dim=1) / length.clamp(min=torch.finfo(torch.float32).tiny)

    def age(self, sample: int, step: int) -> int:
        """Steps since a sample ran the block, at least 1."""
        return max(1, step - self.ran_at[sample])

    def add(self, x: Tensor, text: Tensor | None, step: int, max_age: int) -> tuple[Tensor, Tensor | None]:
        """What a block that is left out adds: x + its expected residual, for both streams; tokens whose residual was computed
        more than `max_age` steps ago pass by."""
        self.reused = [count + 1 for count in self.reused]
        moved = self._moved(x, step, max_age)
        return moved, text if text is None or self.text is None else text + self.text.expected(step)

    def _moved(self, x: Tensor, step: int, max_age: int) -> Tensor:
        stale = self.image.stale(step, max_age)
        if isinstance(stale, bool):
            return x if stale else x + self.image.expected(step)
        return torch.where(stale[..., None], x, x + self.image.expected(step))

    def stand_in(self, x: Tensor, text: Tensor | None, step: int, max_age: int) -> tuple[Tensor, Tensor | None]:
        """What blocks that are left out are expected to make, in the place of x and the text, where whole outputs were kept;
        what never ran, or more than `max_age` steps ago, passes by."""
        self.reused = [count + 1 for count in self.reused]
        if text is None or self.text is None:
            return self._instead(self.image, x, step, max_age), text
        return self._instead(self.image, x, step, max_age), self._instead(self.text, text, step, max_age)

    @staticmethod
    def _instead(series: Series, x: Tensor, step: int, max_age: int) -> Tensor:
        stale = series.stale(step, max_age)
        if isinstance(stale, bool):
            # A copy: what comes after the block may write into it.
            return x if stale else series.expected(step).clone() if not series.horizon else series.expected(step)
        return torch.where(stale[..., None], x, series.expected(step))

    def update_text(self, text: Tensor | None, out: Tensor | None, step: int) -> None:
        """Take in what a block has added to the text tokens [B, M, D]; `out` is None in a block that is the text's last."""
        if self.text is not None and text is not None and out is not None:
            self.text.update(out - text, step)

    def scores(self, step: int, max_age: int) -> Tensor:
        """How much each token needs to run, [B, N] fp32: how far its residual had moved when last seen, times its age.

        Tokens whose residual may not be used any more come first, oldest first.
        """
        age = (step - self.image.at).float()
        return torch.where(age > max_age, _EXPIRED * (1 + age / max_age), self.drift * age)

    def log_drift(self, step: int, max_age: int) -> tuple[Tensor, Tensor]:
        """What a router is shown, `centred_log_drift` of `scores` [B, N] (0 where expired); and the expired tokens [B, N]."""
        scores = self.scores(step, max_age)
        expired = scores >= _EXPIRED
        return centred_log_drift(scores, ~expired), expired

    def completes(self, names: Iterable[str]) -> bool:
        """Whether the projections of these names are known of tokens that do not run."""
        return bool(self.projections) and all(name in self.projections for name in names)

    def lend(self, names: Iterable[str], indices: Tensor | None) -> dict[str, Loan]:
        """What key and value projections are lent while the block runs on the tokens `indices` [B, k] (None: all): those of the
        tokens that rest, as they last were.

        Without it, the tokens that run would attend to each other alone: with reuse, that is the larger error by far
        (docs/decisions/training-free.md).
        """
        if indices is None:
            return {name: Recording(self.image.last.shape[1]) for name in names}
        return {name: Completing(self.projections[name], indices) for name in names if name in self.projections}

    def take_back(self, loans: Mapping[str, Loan]) -> None:
        """Keep what was recorded."""
        for name, loan in loans.items():
            if isinstance(loan, Recording) and loan.taken is not None:
                self.projections[name] = loan.taken

    def update(self, x: Tensor, indices: Tensor | None, out: Tensor, step: int, max_age: int) -> Tensor:
        """Take in what a block has computed, and complete its output.

        Args:
            x: [B, N, D], the block's input.
            indices: [B, k], the tokens it ran; None for all.
            out: [B, k, D], its output for them.
            step: the sampling step.
            max_age: residuals that were computed more steps ago are not used.

        Returns:
            [B, N, D]: `out` exactly where the block ran, x + the expected residual elsewhere (x alone where there is none).
        """
        if indices is None:
            residual = out - x
            self.drift = torch.linalg.vector_norm((residual - self.image.last).float(), dim=-1)
            self.refresh(residual, step)
            return out
        self.reused, self.ran_at = [0] * len(x), [step] * len(x)
        residual = out - gather_tokens(x, indices)
        moved = torch.linalg.vector_norm((residual - gather_tokens(self.image.last, indices)).float(), dim=-1)
        completed = self._moved(x, step, max_age)
        self.image.update(residual, step, indices)
        self.drift.scatter_(1, indices, moved)
        return write_back(completed, indices, out)

    def refresh(
        self, residual: Tensor | None, step: int, text: Tensor | None = None, entered: Tensor | None = None
    ) -> None:
        """Take in the residuals (or outputs) of every token [B, N, D] and of every text token [B, M, D], and what the tokens were
        before the first block; None where there are none."""
        samples = len(self.complete)
        self.reused, self.ran_at, self.complete = [0] * samples, [step] * samples, [True] * samples
        if residual is not None:
            self.image.update(residual, step)
        if self.text is not None and text is not None:
            self.text.update(text, step)
        if self.entered is not None and entered is not None:
            self.entered.update(entered, step)

    def history(self) -> list[tuple[Tensor, Tensor]]:
        """What went in and came out [B, N, D] at the last run and the one before, as far as there were any."""
        return [] if self.entered is None else list(zip(self.entered.values(), self.image.values(), strict=True))


class OfBlock:
    """The projections of one block, where one entry serves all blocks.

    Args:
        entry: of all.
        block: its index.
        room: how many bytes the entry may have; what does not fit is not kept.
    """

    def __init__(self, entry: BlockResiduals, block: int, room: float) -> None:
        self.entry, self.block, self.room = entry, block, room

    def completes(self, names: Iterable[str]) -> bool:
        """As `BlockResiduals.completes`."""
        return self.entry.completes([self._named(name) for name in names])

    def lend(self, names: Iterable[str], indices: Tensor | None) -> dict[str, Loan]:
        """As `BlockResiduals.lend`; with gradients, nothing is changed in place."""
        if indices is None:
            return self.entry.lend(names, None)
        held = {name: self.entry.projections.get(self._named(name)) for name in names}
        in_place = not torch.is_grad_enabled()
        return {name: Completing(own, indices, in_place) for name, own in held.items() if own is not None}

    def take_back(self, loans: Mapping[str, Loan]) -> None:
        """Keep what was recorded, all of it or nothing."""
        taken = {self._named(n): own.taken for n, own in loans.items() if isinstance(own, Recording)}
        kept = {name: own for name, own in taken.items() if own is not None}
        size = sum(own.numel() * own.element_size() for own in kept.values())
        if self.entry.bytes + size <= self.room:
            self.entry.projections.update(kept)

    def _named(self, name: str) -> str:
        return f"{self.block}.{name}"


class CachedPass(BlockResiduals):
    """Residuals of an earlier pass as training simulates it: they serve one pass and are not brought up to date.

    Args:
        x: [B, N, D], tells shape, dtype and device.
        residual: [B, N, D], of every token.
        drift: [B, N] fp32, how far it had moved, times its age.
        projections: by name [B, N, E].
        text: [B, M, D], of the text tokens, where a block that is left out adds them.
    """

    def __init__(
        self, x: Tensor, residual: Tensor, drift: Tensor, projections: dict[str, Tensor], text: Tensor | None = None
    ) -> None:
        super().__init__(x[:, :0])
        self.residual, self.drift, self.projections, self.text_residual = residual, drift, projections, text
        self.complete = [True] * len(x)

    def take(self, samples: Tensor, chosen: Sequence[int]) -> "CachedPass":
        """The entries of some samples, as copies."""
        projections = {name: projection[samples] for name, projection in self.projections.items()}
        text = None if self.text_residual is None else self.text_residual[samples]
        residual = self.residual[samples]
        return CachedPass(residual, residual, self.drift[samples], projections, text)

    def put(self, samples: Tensor, chosen: Sequence[int], part: BlockResiduals) -> None:
        """Nothing is brought up to date."""

    def lend(self, names: Iterable[str], indices: Tensor | None) -> dict[str, Loan]:
        """As `BlockResiduals.lend`, but never changed in place: gradient checkpointing runs the block a second time."""
        if indices is None:
            return {}
        return {name: Completing(self.projections[name], indices, in_place=False) for name in names}

    def update(self, x: Tensor, indices: Tensor | None, out: Tensor, step: int, max_age: int) -> Tensor:
        """The block's output [B, N, D] completed by the residuals, as `BlockResiduals.update` does, with gradients."""
        return out if indices is None else write_back(x + self.residual.to(x.dtype), indices, out)


class Recording:
    """Lent to a projection whose block runs on all tokens: notes what it gives for the N image tokens, [B, N, E]."""

    def __init__(self, tokens: int) -> None:
        self.used, self.tokens = False, tokens
        self.taken: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """The output [B, N, E] as it is; text tokens may come before them, [B, M + N, E]."""
        self.used, self.taken = True, output[:, -self.tokens :].contiguous()
        return output


class Completing:
    """Lent to a projection whose block runs on some tokens: the last outputs of the others.

    Args:
        held: [B, N, E], of all tokens; brought up to date.
        indices: [B, k], the tokens that run.
        in_place: whether `held` itself is.
    """

    def __init__(self, held: Tensor, indices: Tensor, in_place: bool = True) -> None:
        self.used, self.held, self.indices, self.in_place = False, held, indices, in_place

    def __call__(self, output: Tensor) -> Tensor:
        """[B, N, E] (or [B, M + N, E]) of the output [B, k, E] (or [B, M + k, E])."""
        self.used = True
        leading = output.shape[1] - self.indices.shape[1]
        own = output[:, leading:]
        if self.in_place:
            write_rows(self.held, self.indices, own)
            completed = self.held
        else:
            completed = write_back(self.held.to(output.dtype), self.indices, own)
        return torch.cat([output[:, :leading], completed], dim=1) if leading else completed


def centred_log_drift(drift: Tensor, known: Tensor | None = None) -> Tensor:
    """log of (how far a residual moved times its age) [B, N], less its mean over the tokens; fp32.

    Args:
        drift: [B, N].
        known: [B, N] bool, the tokens that count; the others get 0. None for all.
    """
    logs = drift.float().clamp(min=1e-6).log()
    if known is None:
        return logs - logs.mean(dim=1, keepdim=True)
    logs = torch.where(known, logs, 0.0)
    mean = logs.sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(known, logs - mean, 0.0)


class ResidualCache:
    """Residuals within a bound on memory: of as many blocks, from the first on, as fit.

    Args:
        max_mb: bound in megabytes (1e6 bytes); an entry that is larger by itself is not kept.
    """

    def __init__(self, max_mb: float) -> None:
        self.max_mb = max_mb
        self._entries: OrderedDict[tuple[int, int], BlockResiduals] = OrderedDict()

    @property
    def megabytes(self) -> float:
        """Memory held, in units of 1e6 bytes."""
        return sum(entry.bytes for entry in self._entries.values()) / 1e6

    def detach(self) -> None:
        """Drop the gradients' way back to what computed the residuals."""
        for entry in self._entries.values():
            entry.detach()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def scores(self, place: tuple[int, int], x: Tensor, samples: slice, step: int, max_age: int) -> Tensor | None:
        """`BlockResiduals.scores` of the chosen samples, or None where there is no entry; x [B, N, D] holds only those."""
        entry = self._entries.get(place)
        if entry is None or entry.image.last[samples].shape != x.shape:
            return None
        return entry.scores(step, max_age)[samples]

    def log_drift(
        self, place: tuple[int, int], x: Tensor, samples: slice, step: int, max_age: int
    ) -> tuple[Tensor, Tensor] | None:
        """`BlockResiduals.log_drift` of the chosen samples, or None where there is no entry."""
        entry = self._entries.get(place)
        if entry is None or entry.image.last[samples].shape != x.shape:
            return None
        drift, expired = entry.log_drift(step, max_age)
        return drift[samples], expired[samples]

    def held(self, place: tuple[int, int]) -> BlockResiduals:
        """The entry of a (pass, block) that has run."""
        return self._entries[place]

    def find(self, place: tuple[int, int], x: Tensor, text: Tensor | None = None) -> BlockResiduals | None:
        """The entry of a (pass, block) for tokens x [B, N, D], where one fits."""
        entry = self._entries.get(place)
        return entry if entry is not None and entry.fits(x, text) else None

    def enter(
        self,
        place: tuple[int, int],
        x: Tensor,
        text: Tensor | None = None,
        horizon: float = 0.0,
        remembers: bool = False,
    ) -> BlockResiduals:
        """The entry of a (pass, block) that is about to run on tokens x [B, N, D]; where none fits a new one, with forecasts up to
        `horizon` steps, that remembers or not."""
        entry = self.find(place, x, text)
        if entry is None:
            entry = self._entries[place] = BlockResiduals(x, text, horizon, remembers)
        self._entries.move_to_end(place)
        return entry

    def trim(self) -> None:
        """Drop what is over the bound, the newest first: blocks run in the same order at every step, so that dropping the oldest
        would leave none of them a residual by the time its turn comes again."""
        while self._entries and self.megabytes > self.max_mb:
            self._entries.popitem(last=True)
