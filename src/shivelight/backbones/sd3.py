"""Stable Diffusion 3, 3.5-Medium (dual attention) and 3.5-Large: diffusers' SD3Transformer2DModel."""

from typing import Any

import torch

from shivelight.backbones.spec import BackboneSpec, BlockSpec, Mlp, Streams, grid_latents


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": grid_latents(config, samples, tokens),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(samples, config.pooled_projection_dim),
    }


SPEC = BackboneSpec(
    name="sd3",
    classes=("SD3Transformer2DModel",),
    blocks=(
        BlockSpec(
            path="transformer_blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"),
            image_argument="hidden_states",
            # The last block is context_pre_only and returns None for the text; the order stays.
            returns=("text", "image"),
            streams=Streams(
                image=("attn.to_[qkv]", "attn.to_out.0", "attn2.to_[qkv]", "attn2.to_out.0", "ff.net.*"),
                text=("attn.add_[qkv]_proj", "attn.to_add_out", "ff_context.net.*"),
                sample=("norm1.linear", "norm1_context.linear"),
                joint_attention=("attn",),
                image_attention=("attn2",),
            ),
            context_linears=("attn.to_k", "attn.to_v", "attn2.to_k", "attn2.to_v"),
            text_argument="encoder_hidden_states",
            # Of the image stream; the text's, `ff_context`, runs whole.
            mlp=Mlp(up=("ff.net.0.proj",), down="ff.net.2"),
        ),
    ),
    timestep_embedding="time_text_embed.timestep_embedder",
    condition_embedding="time_text_embed.text_embedder",
    timestep_argument="timestep",
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
        "return_dict",
        "skip_layers",
    ),
    delta_targets=(
        r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    ),
    widths=lambda model: (model.inner_dim, model.inner_dim, model.inner_dim),
    # 77 CLIP and 256 T5 tokens, as the pipeline pads them by default.
    default_shape=lambda model: ((model.config.sample_size // model.config.patch_size) ** 2, 333),
    example=_example,
    guidance="batched",
)
