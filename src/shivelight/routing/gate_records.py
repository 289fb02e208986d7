"""Block routers' latest outputs, and where a budget puts their thresholds.

Gates are thresholds on probabilities, so what they cost on average is an observation, not a formula. It is made in
training and travels with the adapter. Shapes: M records, L routed blocks, S widths, T steps of a generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from torch import Tensor, nn

from shivelight.errors import BudgetError


def logit(p: float) -> float:
    """log(p / (1 - p)); infinite from 1 on.

    >>> logit(0.5), logit(1.0)
    (0.0, inf)
    """
    return math.log(p) - math.log1p(-p) if p < 1.0 else math.inf


@dataclass(frozen=True)
class Dial:
    """Where the gates stand: one shift moves all of them and the widths with them, so that one adapter serves any budget.

    A block runs where sigmoid(gate logit + shift) >= threshold, at the width that is largest in
    width logits + shift * (0, 1, ..., S - 1); `shift` 0 takes their logits as they are. Compared are the logits, in
    float64, so that a plan and what carries it out agree to the last bit. `low` is the logit of the threshold, as fp32 has
    it: routers' logits are fp32, and those of a fresh router lie on it.
    """

    threshold: float = 0.5
    shift: float = 0.0
    low: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", float(np.float32(logit(self.threshold))))

    @overload
    def skips(self, gate_logit: float) -> bool: ...

    @overload
    def skips(self, gate_logit: Tensor) -> Tensor: ...

    def skips(self, gate_logit: float | Tensor) -> bool | Tensor:
        """Whether the gate is closed; a tensor's answer is a bool tensor like it. A NaN runs the block: the safe answer."""
        return gate_logit + self.shift < self.low

    @overload
    def unsure(self, gate_logit: float, margin: float) -> bool: ...

    @overload
    def unsure(self, gate_logit: Tensor, margin: float) -> Tensor: ...

    def unsure(self, gate_logit: float | Tensor, margin: float) -> bool | Tensor:
        """Whether the probability is at most `margin` above the threshold, where a residual may serve (E-DiT, cache)."""
        return gate_logit + self.shift <= logit(self.threshold + margin)

    def moved_widths(self, width_logits: Tensor) -> Tensor:
        """Width logits [..., S] as this dial reads them: each wider one moves by as much more."""
        return width_logits + self.shift * torch.arange(
            width_logits.shape[-1], dtype=width_logits.dtype, device=width_logits.device
        )


class GateRecords(nn.Module):
    """The routers' logits for the last `size` samples of training, with their timesteps and the shift of the dial that those
    passes ran at (what enters a block depends on which ones before it ran); a ring of plain buffers.

    Args:
        blocks: L.
        widths: S.
        size: M.
    """

    timestep: Tensor
    shift: Tensor
    gate: Tensor
    width: Tensor
    written: Tensor

    def __init__(self, blocks: int, widths: int, size: int = 512) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("timestep", torch.zeros(size))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("gate", torch.zeros(size, blocks))
        self.register_buffer("width", torch.zeros(size, blocks, widths))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> int:
        """How many records there are."""
        return min(int(self.written), self.size)

    def clear(self) -> None:
        """Forget all records."""
        self.written.zero_()

    @torch.no_grad()
    def add(self, timesteps: Tensor, gate: Tensor, width: Tensor, shift: Tensor | None = None) -> None:
        """Write B samples over the oldest: timesteps [B] from 0 to 1000, gate [B, L], width [B, L, S], all without the shift
        [B] of their dial; None is 0."""
        places = (self.written + torch.arange(len(timesteps), device=self.written.device)) % self.size
        self.timestep[places] = timesteps.to(self.timestep)
        self.shift[places] = 0.0 if shift is None else shift.to(self.shift)
        self.gate[places] = gate.to(self.gate)
        self.width[places] = width.to(self.width)
        self.written += len(timesteps)

    def shift_to_run(self, share: float, threshold: float, raised: Tensor | None = None) -> float:
        """Shift of the dial at which this share of all recorded gates is open, in (0, 1]; 0 where nothing was recorded.
        `raised` [L] is added to the recorded logits: what the age of a residual adds."""
        if self.filled == 0:
            return 0.0
        logits = self.gate[: self.filled].float() + (0.0 if raised is None else raised.detach().to(self.gate))
        logits = logits.flatten().sort(descending=True).values
        opened = min(max(1, round(share * len(logits))), len(logits))
        # Half-way to the next one, so that no rounding closes the last gate that is to open.
        beyond = logits[opened] if opened < len(logits) else logits[-1] - 1.0
        return Dial(threshold).low - float((logits[opened - 1] + beyond) / 2)

    def near(self, steps: Sequence[float], share: float = 0.125) -> tuple[Tensor, Tensor, Tensor]:
        """The share of the records nearest to each timestep: gate logits [T, W, L], width logits [T, W, L, S], shifts
        [T, W], fp32, CPU.

        Raises:
            BudgetError: nothing was recorded.
        """
        filled = self.filled
        if filled == 0:
            raise BudgetError(
                "The adapter's block routers have no statistics, so no threshold can be chosen for a budget. Train the "
                "adapter, or let each block's router decide (BlockRouting.decide='block') at a threshold of your own: "
                "set_budget(model, threshold=0.5)."
            )
        times = self.timestep[:filled].float().cpu()
        wanted = torch.tensor(steps, dtype=torch.float32)
        nearest = (
            (wanted[:, None] - times).abs().topk(math.ceil(share * filled), dim=1, largest=False, sorted=False).indices
        )
        gate, width, shift = (values[:filled].float().cpu()[nearest] for values in (self.gate, self.width, self.shift))
        return gate, width, shift
