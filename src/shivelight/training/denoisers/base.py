"""Denoisers: how the trainer encodes data for a family, adds noise to it, and asks its backbone.

One class for each kind of family, found by the name of its spec. Shapes: B samples; latents are [B, ...], in whatever shape
the class of the family says.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shivelight.adapter import backbone_of
from shivelight.backbones import find_spec
from shivelight.errors import DataError, TrainingError
from shivelight.pipelines import accepted, any_caption, call_default, draw, native_side, pixels_per_latent
from shivelight.training.noise import noise_process, schedule_shift

Conditions = dict[str, Tensor]


class Denoiser:
    """What the trainer must know of a pipeline: as it stands, that of flow matching or diffusion (as the scheduler says) on
    latents that the backbone takes as they are, with conditions named like the backbone's arguments.

    That is enough to train any backbone with a spec from a cache of your own (`data.write_cache`); to encode pictures and
    captions too, override `encode_images` and `encode_captions`. Register a class under the spec's name
    (`register_denoiser`), or hand an instance to the `Trainer`.

    Args:
        pipe: any object with `transformer` and `scheduler`; encoding also needs `vae` and text encoders.
        guidance: scale that a guidance-distilled backbone is told; the pipeline's default for None.
    """

    def __init__(self, pipe: Any, guidance: float | None = None) -> None:
        self.pipe, self.spec = pipe, find_spec(backbone_of(pipe))
        self.noise = noise_process(pipe.scheduler)
        default = call_default(pipe, "guidance_scale")
        self.guidance = guidance if guidance is not None else 1.0 if default is None else float(default)

    @property
    def loss(self) -> str:
        """Name of the loss to the data in the log."""
        return self.noise.loss

    # Data, once.

    def side(self) -> int:
        """Side in pixels of the pictures that the backbone was made for."""
        return native_side(self.pipe)

    def check_side(self, side: int) -> None:
        """DataError where pictures of this side in pixels give latents that the backbone cannot take."""
        unit = pixels_per_latent(self.pipe) * self.patch()
        if side < unit or side % unit:
            raise DataError(
                f"Pictures of {side} pixels do not fit {type(self.pipe).__name__}: give a multiple of {unit}, such as "
                f"{max(unit, round(side / unit) * unit)}."
            )

    def patch(self) -> int:
        """Places of the latents, along one side, that make one image token."""
        size = getattr(getattr(backbone_of(self.pipe), "config", None), "patch_size", 1)
        return int(size if isinstance(size, int) else size[-1])

    def call_options(self, side: int, max_sequence_length: int | None) -> dict[str, Any]:
        """Arguments with which the pipeline draws what such data trains."""
        return accepted(self.pipe, height=side, width=side, max_sequence_length=max_sequence_length)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w], scaled as the backbone sees them, of pictures [B, 3, S, S] in [-1, 1]."""
        vae = self.pipe.vae
        encoded = vae.encode(images.to(vae.device, vae.dtype))
        plain = getattr(encoded, "latents", getattr(encoded, "latent", None))
        latents = encoded.latent_dist.mode() if plain is None else plain
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and deviation is not None:
            shape = (1, -1, *[1] * (latents.dim() - 2))
            return (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(deviation).view(shape)
        return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Conditions of captions by name, each [B, ...]; further arguments of the backbone's call are the easiest."""
        raise TrainingError(
            f"{type(self).__name__} cannot encode captions: override `encode_captions` (and `encode_images`), or write your "
            "latents and conditions with shivelight.training.data.write_cache."
        )

    def encode_empty(self, max_sequence_length: int | None) -> Conditions:
        """Conditions [1, ...] of no caption at all, as guidance uses them."""
        return self.encode_captions([""], max_sequence_length)

    # Training, every step.

    def collate(self, conditions: Conditions) -> Conditions:
        """A micro-batch's conditions on the CPU, before they go to the device: the place to cut off common padding."""
        return conditions

    def tokens(self, latents: torch.Size) -> int:
        """Image tokens of one sample's latents [...], by which dynamic schedules shift."""
        return latents[1:].numel() // self.patch() ** 2 if len(latents) > 2 else latents[0]

    def shift(self, latents: torch.Size) -> float:
        """Shift of the noise levels that the pipeline's scheduler visits for one sample's latents [...]."""
        return schedule_shift(self.pipe.scheduler, self.tokens(latents))

    def levels(self, steps: int, options: dict[str, Any]) -> tuple[float, ...]:
        """Noise levels that a generation of so many steps visits, for `TrainingConfig.levels`: one picture is drawn, since
        pipelines pass their schedulers more than a number.

        Args:
            steps: sampling steps.
            options: further arguments of the pipeline's call (`call_options`).
        """
        draw(self.pipe, [any_caption(self.pipe)], range(1), steps, 1.0, output_type="latent", **options)
        found = dict.fromkeys(self.noise.levels(self.pipe.scheduler.timesteps).tolist())  # Heun's method asks twice
        return tuple(found)

    def noisy(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The input [B, ...] at noise levels [B]; 0 is data, 1 is noise."""
        return self.noise.noisy(clean, noise, sigmas)

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What the model should predict, [B, ...]."""
        return self.noise.target(clean, noise, sigmas)

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Timesteps [B] as the backbone takes them."""
        timesteps, scale = self.noise.timesteps(sigmas), self.spec.timestep_scale
        return timesteps if scale == 1.0 else timesteps / scale

    def predict(self, backbone: Any, noisy: Tensor, sigmas: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The backbone's prediction, in the shape of the latents.

        Args:
            backbone: the model, routed or dense as it is set now.
            noisy: [B, ...], from `noisy`, in the backbone's dtype.
            sigmas: [B].
            conditions: each [B, ...], on the backbone's device, floating ones in its dtype.
        """
        call: dict[str, Any] = {
            self.spec.model_arguments[0]: noisy,
            self.spec.timestep_argument: self.timesteps(sigmas),
            **conditions,
        }
        if "return_dict" in self.spec.model_arguments:
            call["return_dict"] = False
        output = backbone(**call)
        return output if isinstance(output, Tensor) else output[0]

    def identity(self) -> dict[str, Any]:
        """Settings of its own that must be the same for a run to go on."""
        return {}


_REGISTRY: dict[str, type[Denoiser]] = {}


def register_denoiser(name: str, kind: type[Denoiser]) -> None:
    """Make the denoiser of a family known by the name of its spec; a later one replaces it."""
    _REGISTRY[name] = kind


def denoiser_for(pipe: Any, guidance: float | None = None) -> Denoiser:
    """The denoiser of a pipeline's family.

    Raises:
        TrainingError: none is registered for its spec.
    """
    name = find_spec(backbone_of(pipe)).name
    if name not in _REGISTRY:
        raise TrainingError(
            f"Training does not know how the family {name!r} encodes its data and calls its backbone. Known: "
            f"{', '.join(sorted(_REGISTRY))}. Write a subclass of shivelight.training.denoisers.Denoiser (it says what to "
            f"override) and call register_denoiser({name!r}, YourDenoiser), or hand Trainer a denoiser."
        )
    return _REGISTRY[name](pipe, guidance)
