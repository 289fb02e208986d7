"""Peers that need training: gates of their own beside DoRA deltas of the backbone, made by `training.py` and kept in a folder.

The folder is an adapter of deltas alone, as the dense baseline's is, with the gates' weights and their settings beside it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shivelight.adapter_files import read_deltas
from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.evaluation.peers.ground import BlockForward, Ground, Plan
from shivelight.execution.call import BlockCall
from shivelight.files import replacing

WEIGHTS, SETTINGS = "gates.safetensors", "peer.json"


class TrainedGates(nn.Module, ABC):
    """What a peer decides by. In training mode a pass has gradients, and notes what it costs; in eval mode it leaves out.

    Args:
        ground: the backbone.
        target: share that is held, in (0, 1].

    Attributes:
        method: the peer's name.
        rate: the learning rate of `TrainingConfig` that they have.
        weight: of the bound beside the other losses.
        generator: of the noise of training, on the CPU; torch's own if None.
        features_at: blocks whose outputs are kept.
        features: those of the last pass, per block [B, N, D].
    """

    method: ClassVar[str]
    rate: ClassVar[str] = "lr_router"
    weight: ClassVar[float] = 1.0

    def __init__(self, ground: Ground, target: float) -> None:
        super().__init__()
        if not 0.0 < target <= 1.0:
            raise ShivelightError(f"The target of {self.method} is {target}; give a share in (0, 1].")
        self.target = target
        self.generator: torch.Generator | None = None
        self.features_at: tuple[int, ...] = ()
        self.features: dict[int, Tensor] = {}

    @abstractmethod
    def state(self, ground: Ground) -> AbstractContextManager[Any]:
        """The backbone with this in force."""

    @abstractmethod
    def bound(self) -> tuple[Tensor, Tensor]:
        """Of the last pass: (the loss that holds the target, the share that is held to it)."""

    @abstractmethod
    def plan(self, ground: Ground, generate: Callable[[], None]) -> Plan:
        """Share of the blocks' FLOPs; `generate` draws one sample with this in force, which tells timesteps, and what hangs on
        data."""

    def noting(self, index: int, run: BlockForward) -> BlockForward:
        """A block's run, whose output is kept where it is compared."""

        def noted(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            image, text = run(module, call, forward)
            if index in self.features_at:
                self.features[index] = image
            return image, text

        return noted


def scores_of(router: nn.Module, x: Tensor) -> Tensor:
    """What a router says of x [..., D], in fp32 under autocast too: of bf16 scores many are equal."""
    with torch.autocast(x.device.type, enabled=False):
        return router(x.float())


def save_gates(gates: TrainedGates, folder: Path) -> None:
    """Put gates beside the deltas in a folder."""
    with replacing(folder / WEIGHTS) as unfinished:
        save_file({name: value.detach().contiguous() for name, value in gates.state_dict().items()}, unfinished)
    with replacing(folder / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps({"method": gates.method, "target": gates.target}, indent=2) + "\n")


def trained_point(
    comparison: Comparison, folder: str | Path, kinds: Mapping[str, type[TrainedGates]]
) -> OperatingPoint:
    """A peer as it was trained. Weights that it has sliced are kept: the backbone's own must stay as they are.

    Args:
        comparison: on the backbone that it was trained for.
        folder: of the deltas and the gates.
        kinds: gates by the name of their peer.

    Raises:
        ShivelightError: the folder is none of a trained peer, or of another backbone.
    """
    ground, folder = Ground(comparison), Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        weights = load_file(folder / WEIGHTS)
        gates = kinds[settings["method"]](ground, settings["target"])
        gates.load_state_dict(weights)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ShivelightError(
            f"{folder} holds no trained peer of {type(ground.backbone).__name__} ({type(error).__name__}: {error}); "
            "recipes/train_peers.py makes one."
        ) from error
    gates.eval().requires_grad_(False).to(ground.backbone.device)
    tuned = comparison.finetuned(read_deltas(comparison.pipe, folder))

    @contextmanager
    def state() -> Any:
        with tuned.state(), gates.state(ground):
            yield

    def generate() -> None:
        with state():
            ground.generate()

    return ground.point(gates.method, {"target": gates.target}, state, gates.plan(ground, generate))
