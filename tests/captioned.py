"""The tiny pipelines of `families.py` with text encoders: transformers' own classes, random weights, one token a word."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from families import build
from tiny import TEXT_TOKENS, tiny_text_encoder, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32
_WORDS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
_SMALL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": WIDTH}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Single letters are known words; all else is unknown."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def _t5(config: type = T5Config, model: type = T5EncoderModel) -> Any:
    return model(config(vocab_size=len(_WORDS), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _clip() -> CLIPTextModel:
    config = tiny_text_encoder(tiny_tokenizer()).config
    config.hidden_size = WIDTH
    return CLIPTextModel(config)


def _qwen() -> Qwen2_5_VLForConditionalGeneration:
    text = _SMALL | {
        "vocab_size": len(_WORDS), "intermediate_size": 32, "max_position_embeddings": 256,
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": WIDTH, "intermediate_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=None, eos_token_id=1)
    )


def _gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(vocab_size=len(_WORDS), intermediate_size=32, head_dim=16, **_SMALL))


def _flux2_klein() -> Any:
    # The pipeline reads the layers 9, 18 and 27.
    config = Qwen3Config(**_SMALL | {
        "vocab_size": len(_WORDS), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 28, "head_dim": 4,
        "max_position_embeddings": 64,
    })  # fmt: skip
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pipe = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_num_groups=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
    )  # fmt: skip
    pipe.vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    pipe.vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 8))
    pipe.set_progress_bar_config(disable=True)
    return pipe


_ENCODERS = {
    "flux": lambda: {
        "text_encoder": _clip(), "tokenizer": tiny_tokenizer(), "text_encoder_2": _t5(), "tokenizer_2": word_tokenizer(),
    },
    "pixart": lambda: {"text_encoder": _t5(), "tokenizer": word_tokenizer()},
    "qwen-image": lambda: {"text_encoder": _qwen(), "tokenizer": word_tokenizer()},
    "wan": lambda: {"text_encoder": _t5(UMT5Config, UMT5EncoderModel), "tokenizer": word_tokenizer()},
    "sana": lambda: {"text_encoder": _gemma(), "tokenizer": word_tokenizer()},
}  # fmt: skip
CAPTIONED = ("sd3", *_ENCODERS, "flux2", "dit")
# Sides of the pictures that the tiny backbones take.
SIDES = {"sd3": 32, "dit": 16, "flux": 32, "flux2": 16, "pixart": 16, "qwen-image": 32, "wan": 32, "sana": 32}


def captioned(name: str) -> Any:
    """A tiny pipeline that encodes captions of single letters itself; classes for DiT."""
    torch.manual_seed(1)
    pipe = _flux2_klein() if name == "flux2" else build(name)
    if name in _ENCODERS:  # a pipeline asks its tokenizers for their lengths when it is made
        pipe = type(pipe)(**(pipe.components | _ENCODERS[name]()))
        pipe.set_progress_bar_config(disable=True)
    if name == "flux":  # its pipeline adds one in any case
        pipe.vae.register_to_config(shift_factor=0.1)
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False).eval()
    return pipe
