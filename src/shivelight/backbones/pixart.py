"""PixArt-Sigma and PixArt-Alpha: diffusers' PixArtTransformer2DModel."""

from typing import Any

import torch

from shivelight.backbones.spec import BackboneSpec, BlockSpec, Mlp, Streams, grid_latents


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        size = {"resolution": torch.full((samples, 2), 1024.0), "aspect_ratio": torch.ones(samples, 1)}
    return {
        "hidden_states": grid_latents(config, samples, tokens),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.caption_channels),
        "added_cond_kwargs": size,
    }


SPEC = BackboneSpec(
    name="pixart",
    classes=("PixArtTransformer2DModel",),
    blocks=(
        BlockSpec(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "attention_mask",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "timestep",
                "cross_attention_kwargs",
                "class_labels",
            ),
            image_argument="hidden_states",
            context_argument="encoder_hidden_states",
            returns=("image",),
            streams=Streams(
                image=("attn1.to_*", "attn2.to_q", "attn2.to_out.0", "ff.net.*"),
                text=("attn2.to_[kv]",),
                image_attention=("attn1",),
                cross_attention=("attn2",),
            ),
            context_linears=("attn1.to_k", "attn1.to_v"),
            mlp=Mlp(up=("ff.net.0.proj",), down="ff.net.2"),
        ),
    ),
    timestep_embedding="adaln_single.emb",
    timestep_argument="timestep",
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
        "return_dict",
    ),
    delta_targets=r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    widths=lambda model: (model.inner_dim, model.inner_dim, None),
    # Sigma pads captions to 300 tokens, Alpha to 120.
    default_shape=lambda model: ((model.config.sample_size // model.config.patch_size) ** 2, 300),
    example=_example,
)
