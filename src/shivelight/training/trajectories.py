"""Dense generations that deltas are tuned towards, kept on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shivelight.errors import TrainingError
from shivelight.files import replacing
from shivelight.training.checkpoints import difference


class Trajectories:
    """Latents of dense generations after each of their model calls, one file for each.

    Args:
        folder: of the files.
        identity: of what they were made by; others are refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        told, known = json.dumps(identity, sort_keys=True), folder / "run.json"
        if known.exists() and known.read_text() != told:
            said = difference(json.loads(known.read_text()), json.loads(told))
            raise TrainingError(
                f"The trajectories in {folder} were made with other settings ({said}). Use the same ones to go on, or another "
                "output folder."
            )
        with replacing(known) as unfinished:
            unfinished.write_text(told)

    def __contains__(self, place: int) -> bool:
        return self._path(place).exists()

    def put(self, place: int, latents: Tensor) -> None:
        """Keep one: latents [T, ...] after each call."""
        with replacing(self._path(place)) as unfinished:
            save_file({"latents": latents.cpu().contiguous()}, unfinished)

    def get(self, chosen: Sequence[int]) -> Tensor:
        """Latents [T, B, ...] of some."""
        try:
            return torch.stack([load_file(self._path(place))["latents"] for place in chosen], dim=1)
        except (OSError, SafetensorError, KeyError) as error:
            raise TrainingError(
                f"A trajectory in {self.folder} cannot be read: {error}. Delete the folder; it is made anew."
            ) from error

    def _path(self, place: int) -> Path:
        return self.folder / f"{place:06d}.safetensors"
