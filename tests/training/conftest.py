"""A tiny captioned folder, its cache, and a short run's settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shivelight.config import DeltaConfig, RoutingConfig
from shivelight.training.data import LatentCache, build_cache, read_folder
from shivelight.training.stages import TrainingConfig


def write_images(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {'abcdef'[i]}\n")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def cache(pipe, images: Path, tmp_path: Path) -> LatentCache:  # noqa: ANN001
    return build_cache(pipe, read_folder(images), tmp_path / "cache", 32, 16)


@pytest.fixture
def short() -> TrainingConfig:
    """Two steps of each stage."""
    return TrainingConfig(
        router_steps=2, policy_steps=2, joint_steps=2, groups=2, group_size=2, warmup=1, checkpoint_every=2
    )


@pytest.fixture
def routing() -> RoutingConfig:
    return RoutingConfig(deltas=DeltaConfig(rank=2, alpha=2.0))
