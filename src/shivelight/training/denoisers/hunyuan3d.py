"""Hunyuan3D: sets of latents [B, N, C], and time that runs the other way."""

from typing import Any

from torch import Tensor

from shivelight.training.denoisers.base import Denoiser


class Hunyuan3DDenoiser(Denoiser):
    """hy3dgen's convention for noise levels sigma, of which 0 is data and 1 noise: time runs from 0 (noise) to 1 (data), the
    velocity points from noise to data, and the conditions are one argument, a dictionary by name."""

    def patch(self) -> int:
        """Every latent is a token."""
        return 1

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """From 0 (noise) to 1 (data)."""
        return 1.0 - sigmas

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The velocity from noise to data."""
        return -super().target(clean, noise, sigmas)

    def predict(self, backbone: Any, noisy: Tensor, sigmas: Tensor, conditions: dict[str, Any]) -> Tensor:
        """Velocity [B, N, C]."""
        return backbone(noisy, self.timesteps(sigmas).to(noisy.dtype), contexts=conditions)


FAMILIES: dict[str, type[Denoiser]] = {"hunyuan3d": Hunyuan3DDenoiser}
