"""Trains the gates of a peer and DoRA deltas of the backbone, with the data, draws, teacher and losses of our own adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shivelight.config import DeltaConfig, RoutingConfig
from shivelight.errors import TrainingError
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.peers.ground import Ground, blocks_run
from shivelight.evaluation.peers.ground import Passes as Followed
from shivelight.evaluation.peers.trained import TrainedGates, save_gates
from shivelight.execution.call import BlockCall
from shivelight.training.cache import LatentCache
from shivelight.training.draws import Draw
from shivelight.training.lessons import Lessons, compared_blocks
from shivelight.training.losses import BudgetLoss
from shivelight.training.passes import Batch, Passes
from shivelight.training.session import TeacherRecord
from shivelight.training.stages import StageName, TrainingConfig
from shivelight.training.trainer import Trainer


class PeerTrainer(Trainer):
    """The trainer of the dense baseline, whose student's passes have a peer's gates in force.

    Args:
        pipe: as of `Trainer`.
        kind: of the gates.
        target: share that they are held to.
        deltas: rank and alpha.
        config: of the run; joint steps alone.
        cache: latents and conditions.
        out: folder of checkpoints, log and, in `adapter`, of what is trained.
        accelerator: device and precision.
    """

    def __init__(
        self,
        pipe: Any,
        kind: type[TrainedGates],
        target: float,
        deltas: DeltaConfig,
        config: TrainingConfig,
        cache: LatentCache,
        out: Path,
        accelerator: Accelerator | None = None,
    ) -> None:
        if config.preview_every:
            raise TrainingError("Previews of a peer would be drawn without its gates: give preview_every=0.")
        self.gates: TrainedGates | None = None
        super().__init__(pipe, RoutingConfig(None, deltas=deltas), config, cache, out, accelerator)
        self.ground = Ground(Comparison(pipe, Setting()))
        self.gates = kind(self.ground, target).to(self.accelerator.device)
        for module in self.gates.modules():
            if isinstance(module, BudgetLoss):
                module.reduce = self.accelerator.reduce
        self.passes = _GatedPasses(self.ground, self.gates, self.passes)
        self.lessons = _BoundLessons(self.gates, self.passes, self.lessons)
        rate = getattr(config, kind.rate)
        self.optimizer.add_param_group(
            {"params": list(self.gates.parameters()), "lr": rate, "peak": rate, "kind": "gates"}
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the gates too."""
        own = {} if self.gates is None else {f"gates.{name}": value for name, value in self.gates.named_parameters()}
        return super().named_parameters() | own

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages of the gates too."""
        own = {} if self.gates is None else {f"gates.{name}": value for name, value in self.gates.named_buffers()}
        return super().state_tensors() | own

    def finish(self) -> Path:
        """The deltas and the gates in one folder."""
        folder = super().finish()
        assert self.gates is not None
        if self.accelerator.is_main_process:
            save_gates(self.gates.eval(), folder)
        return folder

    def _identity(self) -> dict[str, Any]:
        assert self.gates is not None
        return super()._identity() | {"peer": self.gates.method, "target": self.gates.target}


class _GatedPasses(Passes):
    """Passes of the student have the gates in force."""

    def __init__(self, ground: Ground, gates: TrainedGates, plain: Passes) -> None:
        super().__init__(
            plain.backbone, plain.routed, plain.deltas, plain.denoiser, plain.cache, plain.draws, plain.accelerator
        )
        self.ground, self.gates = ground, gates

    @torch.no_grad()
    def teacher(self, batch: Batch, observer: Any) -> Tensor:
        """The dense model's output, and those of the blocks that are compared."""
        runs = {index: self.gates.noting(index, _whole) for index in self.gates.features_at}
        with blocks_run(self.ground, runs, Followed(self.ground)):
            wanted = super().teacher(batch, observer)
        observer.features = dict(self.gates.features)
        return wanted

    def predict(self, batch: Batch) -> Tensor:
        """The backbone's prediction; the teacher's is without gates, as it is without routing."""
        if not self.routed.enabled:
            return super().predict(batch)
        if self.backbone.training and getattr(self.backbone, "is_gradient_checkpointing", False):
            raise TrainingError("Gradient checkpointing would run the blocks again without the gates: switch it off.")
        with self.gates.state(self.ground):
            return super().predict(batch)


def _whole(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
    return call.split(forward(**call.arguments))


class _BoundLessons(Lessons):
    """The loss that holds the gates to their target is added."""

    def __init__(self, gates: TrainedGates, passes: Passes, plain: Lessons) -> None:
        super().__init__(plain.config, plain.routed, passes, plain.draws, plain.loss, plain.accelerator)
        self.gates = gates
        # A dense student has no routed blocks, of which our own adapters compare these.
        self.features_at = gates.features_at = compared_blocks(plain.config, len(plain.routed.planner.costs))

    def _missed(
        self, batch: Batch, teacher: TeacherRecord, wanted: Tensor, prediction: Tensor, features: dict[int, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super()._missed(batch, teacher, wanted, prediction, self.gates.features)

    def micro_batch(self, stage: StageName, draw: Draw, step: int, fit: bool = False) -> dict[str, Tensor]:
        """Also the share that is held."""
        self.gates.generator = draw.generator  # a function of the step, so that a resumed run is the uninterrupted one
        losses = super().micro_batch(stage, draw, step, fit)
        loss, share = self.gates.bound()
        return losses | {"total": losses["total"] + self.gates.weight * loss, "share": share}
