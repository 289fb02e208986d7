"""Forward passes of one backbone in training: as teacher (routing and deltas off), as student, and as its own past.

Shapes: B samples of a micro-batch, latents [B, ...], N image tokens, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from shivelight.execution.reuse import CachedPass
from shivelight.execution.routed import Routed
from shivelight.execution.sessions import Observer
from shivelight.training.cache import LatentCache
from shivelight.training.damage import OneClosed, log_damage
from shivelight.training.deltas import LiveDeltas
from shivelight.training.denoisers import Conditions, Denoiser
from shivelight.training.draws import Draw, Draws
from shivelight.training.losses import prediction_loss
from shivelight.training.session import PassRecord


class Batch(NamedTuple):
    """A micro-batch: what goes into the backbone, and what it was made of.

    Attributes:
        clean: [B, ...], latents.
        noise: like `clean`.
        sigmas: [B], noise levels.
        conditions: by name, each [B, ...].
    """

    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    conditions: Conditions


class Passes:
    """Runs the backbone for the trainer.

    Args:
        backbone: with `routed` attached.
        routed: its routing.
        deltas: live ones, or None.
        denoiser: of the family.
        cache: latents and conditions.
        draws: of the run.
        accelerator: device and precision.
    """

    def __init__(
        self,
        backbone: Any,
        routed: Routed,
        deltas: LiveDeltas | None,
        denoiser: Denoiser,
        cache: LatentCache,
        draws: Draws,
        accelerator: Accelerator,
    ) -> None:
        self.backbone, self.routed, self.deltas = backbone, routed, deltas
        self.denoiser, self.cache, self.draws, self.accelerator = denoiser, cache, draws, accelerator

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's weights."""
        found = getattr(self.backbone, "dtype", None)
        return found if isinstance(found, torch.dtype) else next(self.backbone.parameters()).dtype

    def batch(self, draw: Draw) -> Batch:
        """The samples and the noise of a micro-batch."""
        device, dtype = self.accelerator.device, self.dtype
        sample = self.cache.batch(draw.indices, draw.dropped)
        clean = sample.latents.to(device)
        noise = torch.randn(clean.shape, generator=draw.generator).to(device)
        conditions = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.denoiser.collate(sample.conditions).items()
        }
        return Batch(clean, noise, torch.full((len(clean),), draw.sigma, device=device), conditions)

    def predict(self, batch: Batch) -> Tensor:
        """The backbone's prediction, in the shape of the latents, as it is set now."""
        noisy = self.denoiser.noisy(batch.clean, batch.noise, batch.sigmas).to(self.dtype)
        with self.accelerator.autocast():
            return self.denoiser.predict(self.backbone, noisy, batch.sigmas, batch.conditions)

    def data_loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean square of what a prediction misses of the data's own target, in fp32."""
        return prediction_loss(prediction, self.denoiser.target(batch.clean, batch.noise, batch.sigmas))

    def without_deltas(self) -> AbstractContextManager[None]:
        """The backbone's own weights for a while."""
        return nullcontext() if self.deltas is None else self.deltas.disabled()

    @torch.no_grad()
    def teacher(self, batch: Batch, observer: Observer) -> Tensor:
        """The dense model's output, while `observer` looks on."""
        with self.without_deltas():
            return self._dense(batch, observer)

    @torch.no_grad()
    def cached(self, draw: Draw, batch: Batch) -> dict[int, CachedPass]:
        """What is left out adds: residuals of the student's own dense pass `draw.age` steps earlier; nothing without reuse."""
        routing = self.routed.config
        reuse, tokens = routing.reuse, routing.tokens is not None
        if reuse is None or not (tokens or routing.closed_reuse):
            return {}
        passes = []
        # Only tokens go by how far a residual had moved, which takes a second pass.
        for steps, context in ((draw.age, reuse.context and tokens), (draw.age + 1, False))[: 1 + tokens]:
            earlier = batch._replace(sigmas=torch.full_like(batch.sigmas, self.draws.earlier(draw.sigma, steps)))
            record = PassRecord(self.backbone, self.routed.spec, self.routed.routed, context)
            with record.listening():
                self._dense(earlier, record)
            passes.append(record)
        return passes[0].aged(passes[-1], draw.age)

    @torch.no_grad()
    def log_damage(self, block: int, residuals: CachedPass, batch: Batch, wanted: Tensor) -> Tensor:
        """What it costs that this block alone adds old residuals, [B]; `wanted` is the output where it runs."""
        self.routed.gate_session = OneClosed(block, residuals)
        try:
            return log_damage(wanted, self.predict(batch))
        finally:
            self.routed.gate_session = None

    def _dense(self, batch: Batch, observer: Observer) -> Tensor:
        self.routed.observer = observer
        try:
            with self.routed.switched(False):
                return self.predict(batch)
        finally:
            self.routed.observer = None
