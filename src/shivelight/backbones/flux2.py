"""FLUX.2: diffusers' Flux2Transformer2DModel. Double blocks, then single ones over both streams, joined."""

from dataclasses import replace
from typing import Any

import torch

from shivelight.backbones.flux import DOUBLE, interleaved_angles, places
from shivelight.backbones.spec import BackboneSpec, BlockSpec, Mlp, Rotary, Streams

_DOUBLE = replace(
    DOUBLE,
    arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb_mod_img",
        "temb_mod_txt",
        "image_rotary_emb",
        "joint_attention_kwargs",
    ),
    # Modulation is made once for all blocks, outside of them.
    streams=Streams(
        image=("attn.to_[qkv]", "attn.to_out.0", "ff.linear_*"),
        text=("attn.add_[qkv]_proj", "attn.to_add_out", "ff_context.linear_*"),
        joint_attention=("attn",),
    ),
    # Of the image stream; the text's, `ff_context`, runs whole.
    mlp=Mlp(up=("ff.linear_in",), down="ff.linear_out", halves=2),
)
_SINGLE = BlockSpec(
    path="single_transformer_blocks",
    arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "temb_mod",
        "image_rotary_emb",
        "joint_attention_kwargs",
        "split_hidden_states",
        "text_seq_len",
    ),
    image_argument="hidden_states",
    joined=True,
    shared_arguments=("image_rotary_emb",),
    returns=("image",),
    streams=Streams(both=("attn.to_qkv_mlp_proj", "attn.to_out"), joint_attention=("attn",)),
    # Queries, keys, values and both halves of the MLP are one projection, so the others' keys cannot be kept beside queries of
    # those that run: tokens that run attend to each other and to the text.
    rotary=Rotary("image_rotary_emb", interleaved_angles, both=("attn.norm_q", "attn.norm_k")),
    mlp=Mlp(up=("attn.to_qkv_mlp_proj",), down="attn.to_out", halves=2, fused=3, size="attn.mlp_hidden_dim"),
)


def _call_obstacle(arguments: dict[str, Any]) -> str:
    if arguments.get("kv_cache_mode") is not None:
        return "It keeps keys and values of reference pictures from every block's first run, which a block that is left out lacks."
    return ""


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.randn(samples, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(samples, text_tokens, config.joint_attention_dim),
        "img_ids": places(tokens, 4),
        "txt_ids": torch.zeros(text_tokens, 4),
        "guidance": torch.full((samples,), 4.0) if config.guidance_embeds else None,
    }


SPEC = BackboneSpec(
    name="flux2",
    classes=("Flux2Transformer2DModel",),
    blocks=(_DOUBLE, _SINGLE),
    timestep_embedding="time_guidance_embed",
    timestep_argument="timestep",
    # The pipelines pass timesteps over 1000.
    timestep_scale=1000.0,
    model_arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
        "joint_attention_kwargs",
        "return_dict",
        "kv_cache",
        "kv_cache_mode",
        "num_ref_tokens",
        "ref_fixed_timestep",
    ),
    delta_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    widths=lambda model: (model.inner_dim, model.inner_dim, None),
    # 1024 x 1024 pixels at 16 a token, and 512 of the text.
    default_shape=lambda model: (64 * 64, 512),
    example=_example,
    guidance="separate",
    text_length=lambda arguments: arguments["encoder_hidden_states"].shape[1],
    call_obstacle=_call_obstacle,
)
