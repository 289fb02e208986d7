"""A tiny captioned folder, its cache, and a short run's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import shivelight as sl
from shivelight.config import DeltaConfig, RoutingConfig
from shivelight.training.cache import LatentCache
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer


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
        router_steps=2, policy_steps=2, joint_steps=2, groups=2, group_size=2, warmup=1, checkpoint_every=2,
        calibration_batches=4,
    )  # fmt: skip


@pytest.fixture
def routing() -> RoutingConfig:
    return RoutingConfig(deltas=DeltaConfig(rank=2, alpha=2.0))


@pytest.fixture
def make_trainer(
    pipe,  # noqa: ANN001
    cache: LatentCache,
    short: TrainingConfig,
    routing: RoutingConfig,
    tmp_path: Path,
) -> Callable[..., Trainer]:
    """Build a trainer of the short run; keyword arguments change its settings, `folder` is below tmp_path."""

    def build(
        folder: str = "run",
        *,
        routing: RoutingConfig = routing,
        accelerator: Accelerator | None = None,
        **settings: object,
    ) -> Trainer:
        config = dataclasses.replace(short, **settings)  # type: ignore[arg-type]
        return Trainer(pipe, routing, config, cache, tmp_path / folder, accelerator)

    return build


@pytest.fixture
def loads_back(pipe, sample) -> Callable[..., None]:  # noqa: ANN001
    """Check that a trained adapter's folder draws, at a budget, what the trainer left attached drew."""

    def check(trainer: Trainer, folder: Path, **budget: float) -> None:
        sl.set_budget(pipe, **budget)
        trained = sample(pipe, ["a b"])
        trainer.close()
        sl.load_adapter(pipe, folder)
        sl.set_budget(pipe, **budget)
        assert torch.equal(sample(pipe, ["a b"]), trained)

    return check
