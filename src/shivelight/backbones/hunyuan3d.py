"""Hunyuan3D-2.0: hy3dgen's Hunyuan3DDiT. An unordered set of latents, double blocks, then single ones over both streams, joined."""

from typing import Any

import torch

from shivelight.backbones.spec import BackboneSpec, BlockSpec, Mlp, Streams

_DOUBLE = BlockSpec(
    path="double_blocks",
    arguments=("img", "txt", "vec", "pe"),
    image_argument="img",
    text_argument="txt",
    returns=("image", "text"),
    # Queries, keys and values are one projection here and in single blocks, so the others' keys cannot be kept beside queries of
    # those that run: tokens that run attend to each other and to the condition.
    streams=Streams(
        image=("img_attn.*", "img_mlp.*"),
        text=("txt_attn.*", "txt_mlp.*"),
        sample=("img_mod.lin", "txt_mod.lin"),
        joint_attention=("",),
    ),
    # Of the latents; the condition's, `txt_mlp`, runs whole.
    mlp=Mlp(up=("img_mlp.0",), down="img_mlp.2"),
)
_SINGLE = BlockSpec(
    path="single_blocks",
    arguments=("x", "vec", "pe"),
    image_argument="x",
    joined=True,
    returns=("image",),
    streams=Streams(both=("linear[12]",), sample=("modulation.lin",), joint_attention=("",)),
    mlp=Mlp(up=("linear1",), down="linear2", fused=3, size="mlp_hidden_dim"),
)


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    condition = torch.randn(samples, text_tokens, model.context_in_dim)
    return {"x": torch.randn(samples, tokens, model.in_channels), "contexts": {"main": condition}}


SPEC = BackboneSpec(
    name="hunyuan3d",
    classes=("Hunyuan3DDiT",),
    blocks=(_DOUBLE, _SINGLE),
    timestep_embedding="time_in",
    timestep_argument="t",
    # The pipeline passes 0 (noise) to 1 (data).
    timestep_scale=1000.0,
    model_arguments=("x", "t", "contexts"),
    delta_targets=(
        r"double_blocks\.\d+\.((img|txt)_attn\.(qkv|proj)|(img|txt)_mlp\.[02])|single_blocks\.\d+\.linear[12]"
    ),
    widths=lambda model: (model.hidden_size, model.hidden_size, None),
    # 3072 latents, and DINOv2's 1370 tokens of a picture of 518 x 518 pixels.
    default_shape=lambda model: (3072, 1370),
    example=_example,
    text_length=lambda arguments: arguments["contexts"]["main"].shape[1],
)
