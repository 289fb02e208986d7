"""FLUX.1: diffusers' FluxTransformer2DModel. Double blocks, then single ones over both streams."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shivelight.backbones.spec import Angles, BackboneSpec, BlockSpec, Mlp, Rotary, Streams, near_square


def interleaved_angles(table: tuple[Tensor, Tensor], text_tokens: int) -> tuple[Angles, Angles]:
    """Of cosines and sines [M + N, 2 C], text first, each written twice in a row; FLUX.2's are alike."""
    cosines, sines = (part[:, ::2] for part in table)
    return (cosines[text_tokens:], sines[text_tokens:]), (cosines[:text_tokens], sines[:text_tokens])


def _adapter(block: Any) -> str:
    if hasattr(block.attn.processor, "to_k_ip"):
        return "An IP-Adapter reads its queries before they are turned by their places. Route blocks, or unload the IP-Adapter."
    return ""


DOUBLE = BlockSpec(
    path="transformer_blocks",
    arguments=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"),
    image_argument="hidden_states",
    text_argument="encoder_hidden_states",
    # Cosines and sines of the text's places and then the image's, [M + N, *].
    shared_arguments=("image_rotary_emb",),
    returns=("text", "image"),
    streams=Streams(
        image=("attn.to_[qkv]", "attn.to_out.0", "ff.net.*"),
        text=("attn.add_[qkv]_proj", "attn.to_add_out", "ff_context.net.*"),
        # An IP-Adapter's keys and values are those of the few tokens of a picture.
        sample=("norm1.linear", "norm1_context.linear", "attn.processor.*"),
        joint_attention=("attn",),
    ),
    context_linears=("attn.to_k", "attn.to_v"),
    rotary=Rotary(
        "image_rotary_emb",
        interleaved_angles,
        image=("attn.norm_q", "attn.norm_k"),
        text=("attn.norm_added_q", "attn.norm_added_k"),
        obstacle=_adapter,
    ),
    # Of the image stream; the text's, `ff_context`, runs whole.
    mlp=Mlp(up=("ff.net.0.proj",), down="ff.net.2"),
)
_SINGLE = replace(
    DOUBLE,
    path="single_transformer_blocks",
    streams=Streams(both=("attn.to_[qkv]", "proj_mlp", "proj_out"), sample=("norm.linear",), joint_attention=("attn",)),
    rotary=Rotary("image_rotary_emb", interleaved_angles, both=("attn.norm_q", "attn.norm_k")),
    # One MLP for both streams; `proj_out` reads the attention's output first.
    mlp=Mlp(up=("proj_mlp",), down="proj_out"),
)


def places(tokens: int, axes: int) -> Tensor:
    """Ids [N, axes] of image tokens: rows and columns are the second and the third, as FLUX.2's are too."""
    ids = torch.zeros(*near_square(tokens), axes)
    ids[..., 1] = torch.arange(ids.shape[0])[:, None]
    ids[..., 2] = torch.arange(ids.shape[1])
    return ids.flatten(0, 1)


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.randn(samples, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.joint_attention_dim),
        "pooled_projections": torch.randn(samples, config.pooled_projection_dim),
        "img_ids": places(tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
        "guidance": torch.full((samples,), 3.5) if config.guidance_embeds else None,
    }


SPEC = BackboneSpec(
    name="flux",
    classes=("FluxTransformer2DModel",),
    blocks=(DOUBLE, _SINGLE),
    timestep_embedding="time_text_embed",
    timestep_argument="timestep",
    # The pipelines pass timesteps over 1000.
    timestep_scale=1000.0,
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "return_dict",
        "controlnet_blocks_repeat",
    ),
    delta_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    ),
    widths=lambda model: (model.inner_dim, model.inner_dim, None),
    # 1024 x 1024 pixels at 16 a token, and T5's 512 tokens.
    default_shape=lambda model: (64 * 64, 512),
    example=_example,
    guidance="separate",
)
