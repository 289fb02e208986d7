"""How noise is added to data, and what a model is asked to predict: read from the scheduler of its pipeline.

A noise level sigma lies in [0, 1]: 0 is data, 1 is noise; the timestep is 1000 sigma. Shapes: B samples.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from shivelight.errors import TrainingError
from shivelight.training.losses import noisy_latents

_TIMESTEPS = 1000


class NoiseProcess(Protocol):
    """What a family's loop needs to know of noise."""

    # Name of the loss to the data in the log.
    loss: ClassVar[str]

    def noisy(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The model's input [B, ...] at noise levels [B]."""

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What the model should predict there, [B, ...]."""

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The pipeline's timesteps [B], from 0 to 1000, of noise levels [B]."""

    def levels(self, timesteps: Tensor) -> Tensor:
        """Noise levels [B], float64, of the pipeline's timesteps [B]: the inverse."""


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x = (1 - sigma) clean + sigma noise, and the model predicts noise - clean."""

    loss: ClassVar[str] = "flow"

    def noisy(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The path at sigma."""
        return noisy_latents(clean, noise, sigmas)

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Its velocity, in fp32."""
        return noise.float() - clean.float()

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """1000 sigma."""
        return _TIMESTEPS * sigmas

    def levels(self, timesteps: Tensor) -> Tensor:
        """A thousandth."""
        return timesteps.double() / _TIMESTEPS


@dataclass(frozen=True)
class Diffusion:
    """Variance-preserving diffusion: x = sqrt(a) clean + sqrt(1 - a) noise, with a of the timestep floor(1000 sigma).

    Attributes:
        signal: [T], a of every timestep (the scheduler's `alphas_cumprod`).
        predicts: "epsilon" (the noise), "v_prediction" or "sample" (the data).
    """

    signal: Tensor
    predicts: str
    loss: ClassVar[str] = "noise"

    def noisy(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The noisy input."""
        signal, rest = self._roots(clean, sigmas)
        return signal * clean + rest * noise

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What `predicts` says, in fp32."""
        clean, noise = clean.float(), noise.float()
        if self.predicts == "epsilon":
            return noise
        if self.predicts == "sample":
            return clean
        signal, rest = self._roots(clean, sigmas)
        return signal * noise - rest * clean

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Whole numbers below T, as such models were trained on: int64."""
        return (len(self.signal) * sigmas).long().clamp(max=len(self.signal) - 1)

    def levels(self, timesteps: Tensor) -> Tensor:
        """In the middle of those that are rounded down to a timestep."""
        return (timesteps.double() + 0.5) / len(self.signal)

    def _roots(self, like: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        signal = self.signal.to(sigmas.device)[self.timesteps(sigmas)]
        signal = signal.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
        return signal.sqrt(), (1.0 - signal).sqrt()


def noise_process(scheduler: Any) -> NoiseProcess:
    """The noise process that a scheduler walks.

    Raises:
        TrainingError: its models predict something that is not known here.
    """
    predicts = getattr(scheduler.config, "prediction_type", None) or "flow_prediction"
    if predicts == "flow_prediction":
        return FlowMatching()
    if predicts in ("epsilon", "v_prediction", "sample") and hasattr(scheduler, "alphas_cumprod"):
        return Diffusion(scheduler.alphas_cumprod.float(), predicts)
    raise TrainingError(
        f"The scheduler {type(scheduler).__name__} has prediction_type {predicts!r}; training knows flow matching and, of "
        "schedulers with alphas_cumprod, epsilon, v_prediction and sample. Write `noisy`, `target` and `timesteps` of a "
        "Denoiser of your own."
    )


def schedule_shift(scheduler: Any, tokens: int) -> float:
    """The shift of a flow-matching schedule: sigmas become s sigma / (1 + (s - 1) sigma) (see `losses.shift_sigmas`).

    Args:
        scheduler: of the pipeline.
        tokens: image tokens of a picture; dynamic shifting goes by them.
    """
    config = scheduler.config
    if (getattr(config, "prediction_type", None) or "flow_prediction") != "flow_prediction":
        return 1.0  # timesteps of diffusion are spaced evenly
    if getattr(config, "use_dynamic_shifting", False):
        few, many = getattr(config, "base_image_seq_len", 256), getattr(config, "max_image_seq_len", 4096)
        low, high = getattr(config, "base_shift", 0.5), getattr(config, "max_shift", 1.15)
        # As diffusers' pipelines work it out: on a line through (few, low) and (many, high).
        moved = low + (high - low) * (tokens - few) / (many - few)
        return moved if getattr(config, "time_shift_type", "exponential") == "linear" else math.exp(moved)
    return float(getattr(config, "flow_shift", None) or getattr(config, "shift", None) or 1.0)
