"""Sana: diffusers' SanaTransformer2DModel. Linear attention, and MLPs that are convolutions."""

from typing import Any

import torch

from shivelight.backbones.spec import BackboneSpec, BlockSpec, Streams, grid_latents


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": grid_latents(config, samples, tokens),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.caption_channels),
    }


SPEC = BackboneSpec(
    name="sana",
    classes=("SanaTransformer2DModel",),
    blocks=(
        BlockSpec(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "attention_mask",
                "encoder_hidden_states",
                "encoder_attention_mask",
                "timestep",
                "height",
                "width",
            ),
            image_argument="hidden_states",
            context_argument="encoder_hidden_states",
            returns=("image",),
            streams=Streams(
                image=("attn1.to_*", "attn2.to_q", "attn2.to_out.0", "ff.conv_*"),
                text=("attn2.to_[kv]",),
                linear_attention=("attn1",),
                cross_attention=("attn2",),
            ),
        ),
    ),
    timestep_embedding="time_embed.emb",
    timestep_argument="timestep",
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "guidance",
        "encoder_attention_mask",
        "attention_mask",
        "attention_kwargs",
        "controlnet_block_samples",
        "return_dict",
    ),
    delta_targets=r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
    widths=lambda model: (
        model.config.num_attention_heads * model.config.attention_head_dim,
        model.config.num_attention_heads * model.config.attention_head_dim,
        None,
    ),
    # 1024 x 1024 pixels at 32 a token, and 300 of the caption.
    default_shape=lambda model: ((model.config.sample_size // model.config.patch_size) ** 2, 300),
    example=_example,
    guidance="batched",
    no_tokens="Its MLPs are convolutions over the whole picture, which has no places for tokens that are left out.",
)
