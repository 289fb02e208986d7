"""Loaders of the embedded pipeline and of the adapters trained for it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from shivelight.errors import DataError

FOLDER = Path(__file__).parent
PIPELINE = FOLDER / "pipeline"
ADAPTER = FOLDER / "adapters" / "tokens"
FINETUNED = FOLDER / "adapters" / "dense-finetuned"
REUSING = FOLDER / "adapters" / "tokens-reuse"
BLOCKS = FOLDER / "adapters" / "blocks"
REFRESHING = FOLDER / "adapters" / "blocks-refresh"
BOTH = FOLDER / "adapters" / "tokens+blocks-refresh"
# What stands beside the first in a table.
OTHERS = tuple(folder for folder in (REUSING, BLOCKS, REFRESHING, BOTH) if folder.is_dir())
# Its transformer and scheduler distilled to a few steps (recipes/distil_few_steps.py), and what was trained for that.
FEW_STEP = FOLDER / "few-step"
TEXT_TOKENS = 16
STEPS = 25
GUIDANCE = 4.0
FEW_STEPS = 4


def load_pipeline(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The embedded Stable Diffusion 3 pipeline: 128 px pictures of 32 things on many backgrounds."""
    if not (PIPELINE / "model_index.json").exists():
        raise DataError(f"The embedded pipeline is missing from {PIPELINE}; rebuild it with recipes/train_teacher.py.")
    return open_pipeline(PIPELINE, device, dtype)


def load_few_step(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The embedded pipeline distilled to `FEW_STEPS` steps: call it with so many and guidance_scale=1."""
    if not (FEW_STEP / "transformer").exists():
        raise DataError(
            f"The distilled transformer is missing from {FEW_STEP}; rebuild it with recipes/distil_few_steps.py."
        )
    transformer = SD3Transformer2DModel.from_pretrained(FEW_STEP / "transformer", dtype=dtype, local_files_only=True)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(FEW_STEP / "scheduler", local_files_only=True)
    return open_pipeline(PIPELINE, device, dtype, transformer=transformer, scheduler=scheduler)


def open_pipeline(
    source: str | Path, device: str | torch.device, dtype: torch.dtype, **parts: Any
) -> StableDiffusion3Pipeline:
    """An SD3 pipeline folder without T5, as the embedded one and those that the recipes write; `parts` go in place of its own."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        source, text_encoder_3=None, tokenizer_3=None, dtype=dtype, local_files_only=True, **parts
    )
    pipe = pipe.to(device)
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
