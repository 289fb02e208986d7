"""Families trained by flow matching: SD3, Sana, Wan, and FLUX and Qwen-Image, which pack their latents."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from shivelight.pipelines import accepted, call_default
from shivelight.training.denoisers.base import Conditions, Denoiser


class SD3Denoiser(Denoiser):
    """Stable Diffusion 3: prompt embeddings of all text encoders, and pooled ones."""

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J] and pooled ones [B, P]."""
        texts = list(captions)
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, **_length(max_sequence_length)
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


class SanaDenoiser(Denoiser):
    """Sana: Gemma's embeddings, asked with the instruction that the pipeline's call puts before a caption."""

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J] and their mask [B, M]."""
        return self._encode(captions, max_sequence_length, call_default(self.pipe, "complex_human_instruction"))

    def encode_empty(self, max_sequence_length: int | None) -> Conditions:
        """The empty caption, which has no instruction before it."""
        return self._encode([""], max_sequence_length, None)

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Some of the family count time from 0 to 1."""
        return super().timesteps(sigmas) * self.pipe.transformer.config.timestep_scale

    def _encode(
        self, captions: Sequence[str], max_sequence_length: int | None, instruction: list[str] | None
    ) -> Conditions:
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, complex_human_instruction=instruction,
            **_length(max_sequence_length),
        )  # fmt: skip
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


class WanDenoiser(Denoiser):
    """Wan: pictures are videos of one frame, latents [B, C, 1, h, w]."""

    def call_options(self, side: int, max_sequence_length: int | None) -> dict[str, Any]:
        """One frame."""
        return super().call_options(side, max_sequence_length) | accepted(self.pipe, num_frames=1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w], normalised."""
        return super().encode_images(images[:, :, None])

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J], zero after the caption's end."""
        embeddings, _ = self.pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, **_length(max_sequence_length)
        )
        return {"encoder_hidden_states": embeddings}


class PackedDenoiser(Denoiser):
    """Backbones that take latents [B, C, h, w] as [B, h w / 4, 4 C], one token for each 2 x 2 places."""

    def patch(self) -> int:
        """Two places along each side make a token."""
        return 2

    def predict(self, backbone: Any, noisy: Tensor, sigmas: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The backbone's prediction, put back into the shape of the latents."""
        if getattr(backbone.config, "guidance_embeds", False):
            scale = torch.full((len(noisy),), self.guidance, device=noisy.device, dtype=torch.float32)
            conditions = conditions | {"guidance": scale}
        output = backbone(
            hidden_states=self.pack(noisy),
            # Rounded before it is scaled, as the pipelines do.
            timestep=self.noise.timesteps(sigmas).to(noisy.dtype) / self.spec.timestep_scale,
            **conditions,
            **self.places(noisy, conditions),
            return_dict=False,
        )[0]
        return self.unpack(output, noisy.shape)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as tokens [B, N, D]."""
        return pack(latents)

    def unpack(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `pack`, for latents of this shape."""
        return unpack(tokens, shape)

    def places(self, noisy: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the backbone that say where its tokens are."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a distilled backbone is told."""
        distilled = getattr(self.pipe.transformer.config, "guidance_embeds", False)
        return {"guidance": self.guidance} if distilled else {}


class FluxDenoiser(PackedDenoiser):
    """FLUX.1: T5's embeddings, and pooled ones of CLIP."""

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J] and pooled ones [B, P]."""
        embeddings, pooled, _ = self.pipe.encode_prompt(list(captions), **_length(max_sequence_length))
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def places(self, noisy: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """Rows and columns [N, 3] of the image tokens; text has none, [M, 3]."""
        rows, columns = (side // 2 for side in noisy.shape[-2:])
        grid = noisy.new_zeros(rows, columns, 3)
        grid[..., 1] += torch.arange(rows, device=noisy.device)[:, None]
        grid[..., 2] += torch.arange(columns, device=noisy.device)[None]
        text = conditions["encoder_hidden_states"].shape[1]
        return {"img_ids": grid.flatten(0, 1), "txt_ids": noisy.new_zeros(text, 3)}


class Flux2Denoiser(PackedDenoiser):
    """FLUX.2, dev and klein: each place of its latents [B, 4 C, h / 2, w / 2] is a token, normalised by statistics of the VAE."""

    # Their schedule also shifts with the number of sampling steps: those of the pipelines' default.
    STEPS = 50

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, 4 C, h / 2, w / 2], normalised."""
        vae = self.pipe.vae
        raw = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        squares = raw.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))
        latents = squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        mean, variance = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J] of three layers of the text encoder."""
        embeddings, _ = self.pipe.encode_prompt(list(captions), **_length(max_sequence_length))
        return {"encoder_hidden_states": embeddings}

    def tokens(self, latents: torch.Size) -> int:
        """One for each place."""
        return latents[1:].numel()

    def shift(self, latents: torch.Size) -> float:
        """By tokens and steps, as the pipelines have measured it."""
        if not getattr(self.pipe.scheduler.config, "use_dynamic_shifting", False):
            return super().shift(latents)
        return math.exp(compute_empirical_mu(self.tokens(latents), self.STEPS))

    def pack(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, h w, D]."""
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """[B, h w, D] -> [B, D, h, w]."""
        return tokens.transpose(1, 2).reshape(shape)

    def places(self, noisy: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """Picture, row, column and place in the text [N, 4] of the image tokens, and [M, 4] of the text."""
        rows, columns = (torch.arange(side, device=noisy.device) for side in noisy.shape[-2:])
        text = torch.arange(conditions["encoder_hidden_states"].shape[1], device=noisy.device)
        first = torch.zeros(1, dtype=torch.int64, device=noisy.device)
        return {
            "img_ids": torch.cartesian_prod(first, rows, columns, first),
            "txt_ids": torch.cartesian_prod(first, first, first, text),
        }


class QwenImageDenoiser(PackedDenoiser):
    """Qwen-Image: Qwen2.5-VL's embeddings, as long as each caption is."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w], normalised; its VAE is one of videos."""
        return super().encode_images(images[:, :, None])[:, :, 0]

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J], M of the longest caption, and their mask [B, M]."""
        embeddings, mask = self.pipe.encode_prompt(list(captions), **_length(max_sequence_length))
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask}

    def collate(self, conditions: Conditions) -> Conditions:
        """Up to the longest caption of the batch; no mask where all are as long, as in the pipeline."""
        mask = conditions["encoder_hidden_states_mask"].bool()
        longest = int(mask.sum(1).max())
        cut = {name: value[:, :longest] for name, value in conditions.items()}
        if bool(mask[:, :longest].all()):
            del cut["encoder_hidden_states_mask"]
        return cut

    def places(self, noisy: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        """Frames, rows and columns of every sample."""
        rows, columns = (side // 2 for side in noisy.shape[-2:])
        return {"img_shapes": [[(1, rows, columns)]] * len(noisy)}


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w / 4, 4 C]: each 2 x 2 square is one token."""
    squares = latents.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # [B, C, h/2, 2, w/2, 2]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`, for latents of this shape."""
    batch, channels, height, width = shape
    squares = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def _length(max_sequence_length: int | None) -> dict[str, int]:
    """The pipeline's own default where nothing is asked for."""
    return {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}


FAMILIES: dict[str, type[Denoiser]] = {
    "sd3": SD3Denoiser,
    "sana": SanaDenoiser,
    "wan": WanDenoiser,
    "flux": FluxDenoiser,
    "flux2": Flux2Denoiser,
    "qwen-image": QwenImageDenoiser,
}
