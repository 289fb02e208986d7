"""The trainer: student and teacher are one backbone; routers, policy and deltas learn; budgets are met by solving.

A step is `groups` micro-batches, each drawn by `draws.py`.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from shivelight.adapter import attach, backbone_of, detach, routed_of
from shivelight.adapter_files import save_adapter
from shivelight.config import RoutingConfig
from shivelight.errors import TrainingError
from shivelight.training import checkpoints
from shivelight.training.cache import LatentCache
from shivelight.training.deltas import LiveDeltas
from shivelight.training.denoisers import Denoiser, denoiser_for
from shivelight.training.draws import Draws
from shivelight.training.lessons import Lessons
from shivelight.training.passes import Passes
from shivelight.training.ranking import rank_channels
from shivelight.training.stages import StageName, TrainingConfig


class Trainer:
    """Trains an adapter for a pipeline. Attaches to it; `run` leaves it attached with the trained adapter.

    Args:
        pipe: a diffusers pipeline, or any object with `transformer` and `scheduler`.
        routing: what to train. `tokens=None` with deltas is the dense fine-tuned baseline: the same losses, no routing.
        config: settings of the run.
        cache: latents and conditions.
        out: folder of checkpoints, log and the final adapter.
        accelerator: device, precision and processes; made here if None.
        denoiser: how the family adds noise and calls its backbone; the registered one of its spec if None.
    """

    def __init__(
        self,
        pipe: Any,
        routing: RoutingConfig,
        config: TrainingConfig,
        cache: LatentCache,
        out: Path,
        accelerator: Accelerator | None = None,
        denoiser: Denoiser | None = None,
    ) -> None:
        if routing.tokens is not None and routing.tokens.scores != "learned":
            raise TrainingError(f"scores={routing.tokens.scores!r} have nothing to train; use scores='learned'.")
        if config.gate_signal == "damage" and (not routing.closed_reuse or routing.deltas is not None):
            raise TrainingError(
                "gate_signal='damage' measures what it costs to reuse the residuals of the backbone's own blocks: give "
                "BlockRouting(closed='reuse') and no deltas."
            )
        if routing.blocks is not None and len(routing.blocks.widths) > 1 and config.gate_signal == "damage":
            raise TrainingError("gate_signal='damage' says nothing about widths; give BlockRouting(widths=(1.0,)).")
        if routing.blocks is not None and not routing.blocks.learned:
            raise TrainingError(f"router={routing.blocks.router!r} has nothing to train; use router='lean'.")
        if config.caption_drop and cache.empty is None:
            raise TrainingError(
                f"caption_drop is {config.caption_drop}, and the cache holds no empty caption to drop captions to: give "
                "caption_drop=0, or write the cache with `empty`."
            )
        if config.preview_every and not (callable(pipe) and cache.captions):
            raise TrainingError("Preview grids need a pipeline that can be called, and captions: give preview_every=0.")
        self.pipe, self.config, self.cache, self.out = pipe, config, cache, out
        self.denoiser = denoiser or denoiser_for(pipe)
        self.accelerator = accelerator or Accelerator()
        self.backbone: Any = backbone_of(pipe).to(self.accelerator.device).requires_grad_(False).eval()
        self.deltas: LiveDeltas | None = None
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            attach(pipe, routing)
            self.routed = routed_of(pipe).float()
            if routing.deltas is not None and config.joint_steps:
                self.deltas = LiveDeltas(self.backbone, self.routed.spec, routing.deltas, {})
        processes = self.accelerator.num_processes, self.accelerator.process_index
        self.draws = Draws(config, len(cache), self.denoiser.shift(cache.shape), processes, self._shift_to_run)
        self.passes = Passes(
            self.backbone, self.routed, self.deltas, self.denoiser, cache, self.draws, self.accelerator
        )
        self.lessons = Lessons(config, self.routed, self.passes, self.draws, self.denoiser.loss, self.accelerator)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains in some stage, by its name in an adapter file."""
        named = dict(self.routed.named_parameters())
        return named | (dict(self.deltas.named_parameters()) if self.deltas is not None else {})

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all that trains, the averages of the budget losses and of the curvatures, routers' records
        and channel orders."""
        return {**self.named_parameters(), **self.lessons.state_tensors(), **dict(self.routed.named_buffers())}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rates = {
            "router": self.config.lr_router,
            "gates": self.config.lr_router,
            # A gate's logit must cross its threshold in hundreds of steps; a trunk that learned as fast would die.
            "heads": self.config.lr_gates,
            "policy": self.config.lr_policy,
            "deltas": self.config.lr_deltas,
        }
        members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for name, parameter in self.named_parameters().items():
            kind = name.split(".")[0]
            members["heads" if kind == "gates" and "_head." in name else kind].append(parameter)
        return [
            {"params": parameters, "lr": rates[kind], "peak": rates[kind], "kind": kind}
            for kind, parameters in members.items()
            if parameters
        ]

    def run(self, on_step: Callable[[dict[str, float]], None] | None = None, until: int | None = None) -> Path:
        """Train to the end (or up to step `until`), going on from the newest checkpoint in `out`; returns the adapter's folder.

        Args:
            on_step: called after each step with its log record.
            until: stop early, as an interruption would; a checkpoint is written.
        """
        self._resume()
        last = min(self.config.total_steps, until or self.config.total_steps)
        log = self.out / "losses.jsonl"
        try:
            while self.step < last:
                record = self.train_step()
                self.history.append(record)
                if self.accelerator.is_main_process:
                    checkpoints.append_log(log, record)
                self.accelerator.log(record, step=self.step)
                if on_step is not None:
                    on_step(record)
                if self.step % self.config.checkpoint_every == 0 and self.step < last:
                    self.save_checkpoint()
                if self.config.preview_every and self.step % self.config.preview_every == 0:
                    self.preview(self.out / f"preview-{self.step:06d}.png")
        except KeyboardInterrupt:
            self.save_checkpoint()
            raise
        self.save_checkpoint()
        return self.finish() if self.step >= self.config.total_steps else self.out

    def finish(self) -> Path:
        """Calibrate the gates, take the live deltas out, fold them, and write the adapter."""
        self._calibrate()
        trained = self.deltas.extract() if self.deltas is not None else {}
        if self.deltas is not None:
            self.deltas.remove()
        self.routed.planner.forget()
        self.routed.set_deltas(self.backbone, trained)
        self.routed.eval().requires_grad_(False)
        folder = self.out / "adapter"
        if self.accelerator.is_main_process:
            tail = self.history[-50:]
            losses = {"loss": sum(r["loss"] for r in tail) / len(tail)} if tail else {}
            save_adapter(self.pipe, folder, training={"config": self.config.to_dict(), "steps": self.step, **losses})
        self.accelerator.wait_for_everyone()
        return folder

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what is logged."""
        began = time.perf_counter()
        config = self.config
        stage, _, _ = config.stage(self.step)
        self._train_only(stage)
        self.routed.train()
        totals: dict[str, float] = {}
        for group, draw in enumerate(self.draws.at(self.step)):
            # Fresh deltas change nothing, so until they train nothing is spent on them.
            untouched = nullcontext() if stage == "joint" else self.passes.without_deltas()
            try:
                with untouched:
                    losses = self.lessons.micro_batch(stage, draw, self.step, fit=group == 0)
                    loss = losses.pop("total")
                    self._refuse_broken(stage, loss, losses)
                    if loss.requires_grad:
                        self.accelerator.backward(loss / config.groups)
            finally:  # only now: gradient checkpointing runs the blocks once more in the backward pass
                self.routed.session = self.routed.gate_session = None
            for name, value in ({"loss": loss} | losses).items():
                totals[name] = totals.get(name, 0.0) + value.item() / config.groups
        norm = self._apply_gradients()
        self.step += 1
        means = self._mean_over_processes(totals)
        return {"step": self.step, **means, "grad_norm": norm, "seconds": time.perf_counter() - began}

    def _refuse_broken(self, stage: StageName, loss: Tensor, losses: dict[str, Tensor]) -> None:
        if bool(torch.isfinite(loss)):
            return
        parts = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        raise TrainingError(
            f"The loss became {loss.item()} at step {self.step} ({stage} stage; {parts}). Go on from the last checkpoint "
            "with lower learning rates, or check the images and the backbone's precision."
        )

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Fill the records with what the trained routers say, at timesteps and budgets spread evenly: those of training were
        made by routers that still changed."""
        gates = self.routed.gates
        if gates is None or not self.config.calibration_batches:
            return
        draws = self.draws.calibration()
        gates.records.clear()
        for draw in draws:
            try:
                self.lessons.micro_batch("joint", draw, self.step)
            finally:
                self.routed.session = self.routed.gate_session = None

    def _rank_channels(self) -> None:
        """Order the MLPs' hidden channels by what they are worth to the dense model, on a few batches of the data."""
        gates, blocks = self.routed.gates, self.routed.config.blocks
        if gates is None or blocks is None or len(blocks.widths) == 1 or not self.config.rank_batches:
            return
        modules, mlps = self.routed.spec.block_list(self.backbone), self.routed.spec.mlps(self.backbone)

        def loss(batch: int) -> Tensor:
            drawn = self.passes.batch(self.draws.at(batch)[batch % self.config.groups])
            return self.passes.data_loss(self.passes.predict(drawn), drawn)

        with self.routed.switched(False), self.passes.without_deltas():
            orders = rank_channels(
                {block: modules[block][1] for block in self.routed.routed}, mlps, loss, self.config.rank_batches
            )
        # Every process saw its own share of the data; one order must hold for all.
        shared = {block: broadcast(order.to(self.accelerator.device)) for block, order in orders.items()}
        gates.set_orders(self.backbone, shared)

    def _shift_to_run(self, share: float, age: int) -> float:
        """Shift of the dial at which this share of the gates is open, what they reuse being this many steps old; 0 without
        gates."""
        gates, blocks = self.routed.gates, self.routed.config.blocks
        if gates is None or blocks is None:
            return 0.0
        return gates.records.shift_to_run(share, blocks.threshold, gates.raised(age))

    def _train_only(self, stage: StageName) -> None:
        """Stage 1 trains the routers, stage 2 the policy too, stage 3 everything."""
        trained = {
            "router": ("router", "gates", "heads"),
            "policy": ("router", "gates", "heads", "policy"),
            "joint": ("router", "gates", "heads", "policy", "deltas"),
        }[stage]
        factor = self.config.rate_factor(self.step)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["kind"] in trained)
            group["lr"] = group["peak"] * factor

    def _apply_gradients(self) -> float:
        """Mean gradients over processes, clip, step; returns the norm."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        if self.accelerator.num_processes > 1 and parameters:
            # One small exchange a step. A data-parallel wrapper would break on the parameters that a stage leaves out.
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
            pieces = self.accelerator.reduce(flat, reduction="mean").split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter).clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _mean_over_processes(self, totals: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return totals
        flat = torch.tensor(list(totals.values()), device=self.accelerator.device)
        return dict(zip(totals, self.accelerator.reduce(flat, reduction="mean").tolist(), strict=True))

    def save_checkpoint(self) -> None:
        """Everything that the next step depends on, written whole or not at all."""
        if self.accelerator.is_main_process:
            tensors = {name: p.detach() for name, p in self.state_tensors().items()}
            checkpoints.save(self.out, self.step, tensors, self.optimizer.state_dict(), self._identity())
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        step = checkpoints.resume(self.out, self._identity(), self.state_tensors(), self.optimizer)
        if step is None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._rank_channels()
            return
        if self.routed.gates is not None:
            self.routed.gates.set_orders(self.backbone, {})
        self.step = step
        self.history = checkpoints.truncate_log(
            self.out / "losses.jsonl", self.step, write=self.accelerator.is_main_process
        )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: settings that change what a step does."""
        settings = self.config.to_dict()
        for name in ("checkpoint_every", "preview_every"):
            settings.pop(name)
        return {
            "training": json.loads(json.dumps(settings)),
            "routing": self.routed.config.to_dict(),
            "processes": self.accelerator.num_processes,
            "samples": len(self.cache),
            **self.denoiser.identity(),
        }

    @torch.no_grad()
    def preview(self, path: Path, keep: float = 0.6, count: int = 4) -> None:
        """A grid of the first captions, dense above routed, same seeds."""
        if not self.accelerator.is_main_process:
            return
        from shivelight.training.preview import save_grid

        self.routed.eval()
        captions = self.cache.captions[:count]
        save_grid(self.pipe, self.routed, self.passes.without_deltas, captions, path, keep, **self.cache.options)

    def close(self) -> None:
        """Leave the pipeline as it was before the trainer came."""
        if self.deltas is not None:
            self.deltas.remove()
        detach(self.pipe)
