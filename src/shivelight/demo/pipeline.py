"""Loaders of the embedded pipeline and of the adapters trained for it."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

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
TEXT_TOKENS = 16
STEPS = 25
GUIDANCE = 4.0


def load_pipeline(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The embedded Stable Diffusion 3 pipeline: 128 px pictures of 32 things on many backgrounds."""
    if not (PIPELINE / "model_index.json").exists():
        raise DataError(f"The embedded pipeline is missing from {PIPELINE}; rebuild it with recipes/train_teacher.py.")
    return open_pipeline(PIPELINE, device, dtype)


def open_pipeline(source: str | Path, device: str | torch.device, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """An SD3 pipeline folder without T5, as the embedded one and those that the recipes write."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        source, text_encoder_3=None, tokenizer_3=None, dtype=dtype, local_files_only=True
    )
    pipe = pipe.to(device)
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
