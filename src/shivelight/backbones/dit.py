"""DiT, class-conditional: diffusers' DiTTransformer2DModel."""

from typing import Any

import torch

from shivelight.backbones.spec import BackboneSpec, BlockSpec, Mlp, Streams, grid_latents


def _example(model: Any, samples: int, tokens: int, text_tokens: int) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": grid_latents(config, samples, tokens),
        "class_labels": torch.randint(0, config.num_embeds_ada_norm, (samples,)),
    }


SPEC = BackboneSpec(
    name="dit",
    classes=("DiTTransformer2DModel",),
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
            returns=("image",),
            streams=Streams(
                image=("attn1.to_*", "ff.net.*"),
                # Each block embeds timestep and class anew.
                sample=("norm1.linear", "norm1.emb.*"),
                image_attention=("attn1",),
            ),
            context_linears=("attn1.to_k", "attn1.to_v"),
            mlp=Mlp(up=("ff.net.0.proj",), down="ff.net.2"),
        ),
    ),
    # The model's head asks the first block's embedding too, which is never routed by what it embeds.
    timestep_embedding="transformer_blocks.0.norm1.emb",
    timestep_argument="timestep",
    model_arguments=("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict"),
    delta_targets=r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    widths=lambda model: (model.inner_dim, model.inner_dim, None),
    default_shape=lambda model: ((model.config.sample_size // model.config.patch_size) ** 2, 0),
    example=_example,
)
