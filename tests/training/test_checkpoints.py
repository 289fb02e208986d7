"""Checkpoints: whole or absent, the newest two, and never of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from shivelight.errors import TrainingError
from shivelight.training import checkpoints

IDENTITY = {"training": {"seed": 0}}


class Interrupts:
    """Pressing Ctrl-C while this is being written."""

    def __reduce__(self) -> NoReturn:
        raise KeyboardInterrupt


def save(out: Path, step: int, optimizer: dict[str, Any] | None = None) -> Path:
    return checkpoints.save(out, step, {"weight": torch.full((2,), float(step))}, optimizer or {"state": {}}, IDENTITY)


def test_an_interrupted_checkpoint_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for step in (3, 4):  # over the same one, and a later one
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, step, {"state": Interrupts()})
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000003"]
        state = checkpoints.load(tmp_path / "checkpoint-00000003", IDENTITY)
        assert (state.step, state.tensors["weight"].tolist(), state.optimizer) == (3, [3.0, 3.0], {"state": {}})


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    for step in (5, 20, 100):
        assert checkpoints.newest(save(tmp_path, step).parent) == tmp_path / f"checkpoint-{step:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000020", "checkpoint-00000100"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b""), ("run.json", b"{"), ("run.json", None),
        ("tensors.safetensors", b""), ("tensors.safetensors", b"short"), ("tensors.safetensors", None),
        ("optimizer.pt", b""), ("optimizer.pt", b"{"), ("optimizer.pt", None),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = save(tmp_path, 1)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(TrainingError, match="checkpoint-00000001 cannot be read.*Delete it"):
        checkpoints.load(folder, IDENTITY)
