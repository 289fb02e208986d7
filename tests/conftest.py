"""Tiny real pipelines: diffusers' and transformers' own classes with random weights, built once a session."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

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


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process; a test with another precision needs a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder, for everything that loads one."""
    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _session_pipe() -> StableDiffusion3Pipeline:
    return tiny_sd3()


@pytest.fixture
def pipe(_session_pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """A tiny pipeline of this test's own."""
    mine = copy.copy(_session_pipe)
    components = dict(_session_pipe.components)
    components["transformer"] = copy.deepcopy(_session_pipe.transformer)
    components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    mine = StableDiffusion3Pipeline(**components)
    mine.set_progress_bar_config(disable=True)
    return mine


class Sampler:
    """Runs a pipeline with the settings that every test shares."""

    def __call__(
        self, pipe: StableDiffusion3Pipeline, prompts: list[str], steps: int = 4, **options: object
    ) -> torch.Tensor:
        """Latents [B, C, H, W] of the prompts; sample i always starts from the noise of seed i."""
        first = int(options.pop("first_seed", 0))  # type: ignore[call-overload]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
        settings = {"num_inference_steps": steps, "guidance_scale": 3.0, "height": 32, "width": 32} | options
        return pipe(
            prompts, max_sequence_length=TEXT_TOKENS, generator=generators, output_type="latent", **settings
        ).images


@pytest.fixture(scope="session")
def sample() -> Sampler:
    return Sampler()
