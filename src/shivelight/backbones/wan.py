"""Wan 2.1 and 2.2: diffusers' WanTransformer3DModel, video tokens."""

from typing import Any

import torch
from torch import Tensor

from shivelight.backbones.spec import Angles, BackboneSpec, BlockSpec, Mlp, Rotary, Streams, near_square


def _angles(table: tuple[Tensor, Tensor], text_tokens: int) -> tuple[Angles, None]:
    """Of cosines and sines [1, N, 1, 2 C], each written twice in a row; text is not turned."""
    cosines, sines = (part[0, :, 0, ::2] for part in table)
    return (cosines, sines), None


def _sample_times(times: Tensor) -> Tensor:
    """Wan 2.2 TI2V has timesteps [B, N]: 0 for tokens of a given picture, the step's own for the others."""
    return times.amax(dim=1) if times.ndim == 2 else times


def _sample_rows(rows: Tensor, times: Tensor) -> Tensor:
    """Of rows [B, N, T] for timesteps [B, N], those of each sample's latest one."""
    if times.ndim < 2:
        return rows
    return rows[torch.arange(len(times), device=rows.device), times.argmax(dim=1)]


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config, (rows, columns) = model.config, near_square(tokens)
    frames, height, width = config.patch_size
    return {
        "hidden_states": torch.randn(samples, config.in_channels, frames, rows * height, columns * width),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.text_dim),
    }


SPEC = BackboneSpec(
    name="wan",
    classes=("WanTransformer3DModel",),
    blocks=(
        BlockSpec(
            path="blocks",
            arguments=("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
            image_argument="hidden_states",
            context_argument="encoder_hidden_states",
            # Cosines and sines of the places, [1, N, 1, *].
            shared_arguments=("rotary_emb",),
            # Modulation by timesteps of single tokens, [B, N, 6, D], or of samples, [B, 6, D].
            token_arguments=("temb",),
            token_dimensions={"temb": 4},
            context_linears=("attn1.to_k", "attn1.to_v"),
            rotary=Rotary("rotary_emb", _angles, image=("attn1.norm_q", "attn1.norm_k")),
            returns=("image",),
            streams=Streams(
                image=("attn1.to_*", "attn2.to_q", "attn2.to_out.0", "ffn.net.*"),
                # Of an image that conditions the video, keys and values (attn2.add_*) are counted for every context token, of
                # the image and of the text: a little too many.
                text=("attn2.to_[kv]", "attn2.add_[kv]_proj"),
                image_attention=("attn1",),
                cross_attention=("attn2",),
            ),
            mlp=Mlp(up=("ffn.net.0.proj",), down="ffn.net.2"),
        ),
    ),
    timestep_embedding="condition_embedder.time_embedder",
    timestep_argument="timestep",
    model_arguments=(
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "return_dict",
        "attention_kwargs",
    ),
    delta_targets=r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
    widths=lambda model: (
        model.config.num_attention_heads * model.config.attention_head_dim,
        model.config.num_attention_heads * model.config.attention_head_dim,
        None,
    ),
    # 81 frames of 480 x 832 pixels: 21 x 30 x 52 tokens; T5's 512.
    default_shape=lambda model: (21 * 30 * 52, 512),
    example=_example,
    guidance="separate",
    sample_times=_sample_times,
    sample_embeddings=_sample_rows,
)
