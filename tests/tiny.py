"""A tiny real pipeline (diffusers' and transformers' own classes, random weights), and inputs for its bare transformer."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import shivelight as sl

TEXT_TOKENS = 16


def tiny_tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_TOKENS)


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TEXT_TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def tiny_sd3() -> StableDiffusion3Pipeline:
    """4 blocks of width 32, dual attention in the first two, 64 image tokens, 32 px pictures."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip
    pipe.transformer.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_inputs(
    batch: int, times: float | list[float] | None = None, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Arguments of the tiny transformer but for `return_dict`; `timestep` only where `times` are given."""
    generator = torch.Generator().manual_seed(seed)
    call = {
        "hidden_states": torch.randn(batch, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
    }
    if times is not None:
        call["timestep"] = torch.tensor(times if isinstance(times, list) else [times] * batch)
    return {name: value.to(device) for name, value in call.items()}


def rows(call: dict[str, Tensor], *samples: int) -> dict[str, Tensor]:
    """The inputs of some samples of a batch."""
    return {name: value[list(samples)] for name, value in call.items()}


@torch.no_grad()
def guided_walk(pipe: StableDiffusion3Pipeline, steps: int, split: bool) -> Tensor:
    """What the transformer gives at each step [T, 4, C, H, W], two unconditional samples before two conditional ones: in one batch,
    or in two calls, the conditional one first."""
    cond, uncond = tiny_inputs(2), tiny_inputs(2, seed=1)
    pipe.scheduler.set_timesteps(steps)
    outputs = []
    for time in pipe.scheduler.timesteps:
        stamp = {"timestep": time.expand(2)}
        if split:
            with sl.branch(pipe, "cond"):
                first = pipe.transformer(**cond, **stamp, return_dict=False)[0]
            with sl.branch(pipe, "uncond"):
                second = pipe.transformer(**uncond, **stamp, return_dict=False)[0]
            outputs.append(torch.cat([second, first]))
        else:
            both = {name: torch.cat([uncond[name], cond[name]]) for name in cond} | {"timestep": time.expand(4)}
            with sl.branch(pipe, "both"):
                outputs.append(pipe.transformer(**both, return_dict=False)[0])
        pipe.scheduler.step(outputs[-1][:2], time, outputs[-1][:2])
    return torch.stack(outputs)


@torch.no_grad()
def walk(pipe: StableDiffusion3Pipeline, call: dict[str, Tensor], steps: int) -> Tensor:
    """A generation without guidance, text encoders and VAE: latents [B, C, H, W] at its end."""
    pipe._guidance_scale = 0.0
    pipe.scheduler.set_timesteps(steps)
    latents = call["hidden_states"]
    for time in pipe.scheduler.timesteps:
        here = call | {"hidden_states": latents, "timestep": time.expand(len(latents))}
        latents = pipe.scheduler.step(pipe.transformer(**here, return_dict=False)[0], time, latents)[0]
    pipe.transformer._reset_stateful_cache()
    return latents
