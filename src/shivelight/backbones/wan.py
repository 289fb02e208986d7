"""Wan 2.1 and 2.2: diffusers' WanTransformer3DModel, video tokens."""

from shivelight.backbones.spec import SHARED_PLACES, BackboneSpec, BlockSpec, Mlp, Streams

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
    guidance="separate",
    no_tokens=SHARED_PLACES,
)
