"""Families trained to predict noise: PixArt-Sigma, PixArt-Alpha and DiT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shivelight.pipelines import call_default, class_labels, pixels_per_latent
from shivelight.training.denoisers.base import Conditions, Denoiser


class LearnedVarianceDenoiser(Denoiser):
    """Backbones whose output has the variance in a second half of its channels, which samplers do not ask for."""

    def predict(self, backbone: Any, noisy: Tensor, sigmas: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The first half of the backbone's output."""
        return super().predict(backbone, noisy, sigmas, conditions)[:, : noisy.shape[1]]


class PixArtDenoiser(LearnedVarianceDenoiser):
    """PixArt: T5's embeddings; the largest of Alpha is also told the size of the picture."""

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Prompt embeddings [B, M, J] and their mask [B, M]."""
        length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            clean_caption=bool(call_default(self.pipe, "clean_caption")),  # as its call does
            **length,
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def predict(self, backbone: Any, noisy: Tensor, sigmas: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The first half of the output; picture size [B, 2] and aspect ratio [B, 1] go in where they are asked for."""
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if backbone.use_additional_conditions:
            height, width = (pixels_per_latent(self.pipe) * side for side in noisy.shape[-2:])
            size["resolution"] = noisy.new_tensor([height, width]).expand(len(noisy), 2)
            size["aspect_ratio"] = noisy.new_tensor([height / width]).expand(len(noisy), 1)
        return super().predict(backbone, noisy, sigmas, conditions | {"added_cond_kwargs": size})


class DiTDenoiser(LearnedVarianceDenoiser):
    """DiT: captions are classes, as numbers or by the names that the pipeline knows."""

    def encode_captions(self, captions: Sequence[str], max_sequence_length: int | None) -> Conditions:
        """Classes [B]."""
        return {"class_labels": torch.tensor(class_labels(self.pipe, captions))}

    def encode_empty(self, max_sequence_length: int | None) -> Conditions:
        """The class of no class [1], one after the last."""
        return {"class_labels": torch.tensor([self.pipe.transformer.config.num_embeds_ada_norm])}


FAMILIES: dict[str, type[Denoiser]] = {"pixart": PixArtDenoiser, "dit": DiTDenoiser}
