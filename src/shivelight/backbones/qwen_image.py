"""Qwen-Image and its editing models: diffusers' QwenImageTransformer2DModel."""

from typing import Any

import torch
from torch import Tensor

from shivelight.backbones.spec import Angles, BackboneSpec, BlockSpec, Mlp, Rotary, Streams, near_square


def _angles(table: tuple[Tensor, Tensor], text_tokens: int) -> tuple[Angles, Angles]:
    """Of complex numbers [N, C] and [M, C]."""
    (image, text) = table
    return (image.real, image.imag), (text.real, text.imag)


def _sample_rows(rows: Tensor, times: Tensor) -> Tensor:
    """With zero_cond_t (Qwen-Image-Edit), rows for the samples' own timesteps are followed by as many for timestep 0."""
    return rows[: times.numel()] if len(rows) == 2 * times.numel() else rows


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.randn(samples, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.joint_attention_dim),
        "img_shapes": [[(1, *near_square(tokens))]] * samples,
    }


SPEC = BackboneSpec(
    name="qwen-image",
    classes=("QwenImageTransformer2DModel",),
    blocks=(
        BlockSpec(
            path="transformer_blocks",
            arguments=(
                "hidden_states",
                "encoder_hidden_states",
                "encoder_hidden_states_mask",
                "temb",
                "image_rotary_emb",
                "joint_attention_kwargs",
                "modulate_index",
            ),
            image_argument="hidden_states",
            # Angles of the image's and of the text's places, [N, *] and [M, *].
            shared_arguments=("image_rotary_emb",),
            token_arguments=("modulate_index",),
            stacked_arguments=("temb",),
            text_mask_argument="encoder_hidden_states_mask",
            context_linears=("attn.to_k", "attn.to_v"),
            rotary=Rotary(
                "image_rotary_emb",
                _angles,
                image=("attn.norm_q", "attn.norm_k"),
                text=("attn.norm_added_q", "attn.norm_added_k"),
            ),
            returns=("text", "image"),
            streams=Streams(
                image=("attn.to_[qkv]", "attn.to_out.0", "img_mlp.net.*"),
                text=("attn.add_[qkv]_proj", "attn.to_add_out", "txt_mlp.net.*"),
                sample=("img_mod.1", "txt_mod.1"),
                joint_attention=("attn",),
            ),
            text_argument="encoder_hidden_states",
            # Of the image stream; the text's, `txt_mlp`, runs whole.
            mlp=Mlp(up=("img_mlp.net.0.proj",), down="img_mlp.net.2", activated="img_mlp.net.0"),
        ),
    ),
    timestep_embedding="time_text_embed",
    timestep_argument="timestep",
    # The pipelines pass timesteps over 1000.
    timestep_scale=1000.0,
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "img_shapes",
        "guidance",
        "attention_kwargs",
        "controlnet_block_samples",
        "additional_t_cond",
        "return_dict",
    ),
    delta_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))"
    ),
    widths=lambda model: (model.inner_dim, model.inner_dim, None),
    # 1328 x 1328 pixels at 16 a token, and a prompt of a few sentences.
    default_shape=lambda model: (83 * 83, 128),
    example=_example,
    guidance="separate",
    # E-DiT's authors route every block.
    first_routed=0,
    sample_embeddings=_sample_rows,
)
