"""Deltas tuned through the generation as it will be walked: what runs after a rest learns to mend what the rest has left.

A routed generation starts from the noise of a dense one and goes by the pipeline's own call, with gradients. Before each run its
latents should be those of the dense one at that step: the loss is their mean square difference, and gradients end there, so that
a pass costs the memory of one run. Data are prompts alone. What stands in at rest (`fit_stand_ins`) stays as it was fitted.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from shivelight.adapter import backbone_of, routed_of
from shivelight.adapter_files import save_adapter
from shivelight.budgets import set_budget
from shivelight.config import DeltaConfig, RestPlan
from shivelight.errors import TrainingError
from shivelight.execution.compiled import Regions
from shivelight.execution.routed import Routed
from shivelight.pipelines import draw
from shivelight.training import checkpoints
from shivelight.training.deltas import LiveDeltas
from shivelight.training.discriminator import Discriminator
from shivelight.training.trajectories import Trajectories
from shivelight.training.walk import CheckpointedRegions, Walk, recording, watched

Generate = Callable[[Callable[..., Any], Sequence[int]], None]


@dataclass(frozen=True)
class TuneConfig:
    """How deltas are tuned.

    Attributes:
        steps: of sampling, which are those of use later.
        computes: budgets that are walked in turns; one that is named twice is walked twice as often. At 1 nothing rests.
        guidance: scale; the pipeline's default for None.
        iterations: optimiser steps.
        batch: trajectories of each.
        trajectories: dense generations to learn from, of the prompts in turn; kept on disk. Few of them are learned by heart.
        rank: of the deltas, whose alpha it is too; of deltas that are there already, theirs stays.
        lr: peak learning rate (AdamW), reached in `warmup` iterations and let fall to 0.
        warmup: iterations.
        max_grad_norm: gradients are clipped to it.
        mixed_precision: "bf16" runs what autocast allows in it, while deltas and optimiser stay fp32.
        adversarial: weight of not being told apart from dense generations (`training/discriminator.py`): the length of its
            gradient at the last latents, over that of the mean square's. 0 leaves it out.
        discriminator_lr: peak learning rate of what tells them apart.
        checkpointing: blocks run a second time in the backward pass, for memory.
        seed: of the first trajectory's noise; keep it apart from those that judge.
        checkpoint_every: iterations.
    """

    steps: int
    computes: tuple[float, ...]
    guidance: float | None = None
    iterations: int = 500
    batch: int = 16
    trajectories: int = 4000
    rank: int = 16
    lr: float = 5e-4
    warmup: int = 20
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "bf16"
    adversarial: float = 0.0
    discriminator_lr: float = 1e-3
    checkpointing: bool = False
    seed: int = 6_000_000
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        least = {"steps": 2, "iterations": 1, "batch": 1, "trajectories": 1, "rank": 1, "checkpoint_every": 1}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                raise TrainingError(f"{name} is {getattr(self, name)}; give at least {fewest}.")
        if not self.computes or not all(0 < compute <= 1 for compute in self.computes):
            raise TrainingError(f"computes is {self.computes}; give shares of the dense FLOPs, such as (0.5,).")
        if not (0 < self.lr < math.inf and 0 < self.discriminator_lr < math.inf and self.max_grad_norm > 0):
            raise TrainingError("lr, discriminator_lr and max_grad_norm are positive numbers.")
        if not (0 <= self.adversarial < math.inf and self.warmup >= 0):
            raise TrainingError("adversarial and warmup are at least 0.")


class Tuner:
    """Tunes deltas for a pipeline on which blocks rest together. `run` leaves them folded in.

    Args:
        pipe: with `training_free(axis="blocks")` attached, with or without fitted stand-ins; with deltas, these are tuned on.
        prompts: of what is usually drawn.
        config: settings of the run.
        out: folder of trajectories, checkpoints, log and the adapter; a run there is gone on with.
        generate: (call, numbers of trajectories) -> None: runs their generations by `call`, which is the pipeline's, each from
            noise of its own; in the place of prompts, where a call needs more than those.
        dense: folder of the dense generations, `out`/trajectories by default; runs of one model and the same prompts may share it.
        options: further arguments of the pipeline call.

    Raises:
        TrainingError: nothing rests together on this pipeline, or it cannot be tuned as it is (float16; offloaded, with a
            discriminator).
    """

    # How generations are followed.
    walks: type[Walk] = Walk

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        config: TuneConfig,
        out: Path,
        *,
        generate: Generate | None = None,
        dense: Path | None = None,
        **options: Any,
    ) -> None:
        self.pipe, self.config, self.out = pipe, config, out
        self._generate = generate or self._draw
        self.prompts, self.options = list(prompts), {"output_type": "latent"} | options
        self.routed: Routed = routed_of(pipe)
        self.backbone: Any = backbone_of(pipe)
        if not self.prompts and generate is None:
            raise TrainingError("There are no prompts to learn from.")
        if self.routed.clock.pipeline is None or not self.routed.config.together:
            raise TrainingError(
                "Deltas are tuned where all blocks run or rest together, and nothing is attached to the pipeline that does so. "
                'Attach RoutingConfig.training_free(compute=1.0, axis="blocks") to it first.'
            )
        weights = next(self.backbone.parameters())
        if weights.dtype == torch.float16:
            raise TrainingError(
                "Gradients at a float16 backbone's latents are too small for its numbers. Load the pipeline in bfloat16 or float32."
            )
        if config.adversarial and weights.device != self._device:
            raise TrainingError(
                f"The backbone lies on {weights.device} between the pipeline's calls, where a discriminator asks it. Move the "
                f"pipeline to {self._device} instead of offloading it, or tune with adversarial=0."
            )
        self._dense_identity = self._identify_dense()
        out.mkdir(parents=True, exist_ok=True)
        self.trajectories = Trajectories(dense or out / "trajectories", self._dense_identity)
        self.step = 0
        self._discriminator: Discriminator | None = None
        self.history: list[dict[str, float]] = []

    @property
    def done(self) -> int:
        """Iterations of the newest checkpoint."""
        found = checkpoints.newest(self.out)
        return 0 if found is None else int(found.name.rpartition("-")[2])

    def run(self, on_step: Callable[[dict[str, float]], None] | None = None, until: int | None = None) -> Path:
        """Tune to the end (or up to iteration `until`), going on from the newest checkpoint in `out`; returns the adapter's folder.

        Args:
            on_step: called after each iteration with its log record.
            until: stop early, as an interruption would; a checkpoint is written.
        """
        self.record_dense()
        last = min(self.config.iterations, until or self.config.iterations)
        routed, backbone = self.routed, self.backbone
        regions, budget = routed.regions, routed.budget
        tuned, known, plans = routed.deltas, routed.config.deltas, self._plans()
        deltas = replace(known or DeltaConfig(self.config.rank, float(self.config.rank)), plans=plans)
        routed.set_deltas(backbone, {})
        with _frozen(self.pipe), torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            live = LiveDeltas(backbone, routed.spec, deltas, tuned)
            parameters, rates = dict(live.named_parameters()), [self.config.lr]
            optimizer = torch.optim.AdamW(parameters.values(), self.config.lr, (0.9, 0.99), weight_decay=0.0)
            routed.regions = CheckpointedRegions() if self.config.checkpointing else Regions()
            try:
                if self.config.adversarial:
                    self._discriminator = Discriminator(backbone, routed, live, self.pipe.scheduler)
                    heads = dict(self._discriminator.named_parameters(prefix="discriminator"))
                    optimizer.add_param_group({"params": list(heads.values()), "betas": (0.0, 0.99)})
                    parameters, rates = parameters | heads, [*rates, self.config.discriminator_lr]
                self._resume(parameters, optimizer)
                while self.step < last:
                    self._log(self._iterate(optimizer, rates), on_step)
                    if self.step % self.config.checkpoint_every == 0 or self.step == last:
                        self._save(parameters, optimizer)
                tuned, known = live.extract(), deltas
            except KeyboardInterrupt:
                self._save(parameters, optimizer)
                raise
            finally:
                live.remove()
                self._discriminator = None
                routed.regions, routed.budget = regions, budget
                routed.reset()
                routed.set_deltas(backbone, tuned, known)
        if self.step < self.config.iterations:
            return self.out
        tail = self.history[-50:]
        training = {"command": "tune", "prompts": len(self.prompts), **asdict(self.config)}
        training["loss"] = sum(record["loss"] for record in tail) / len(tail)
        save_adapter(self.pipe, self.out / "adapter", training)
        return self.out / "adapter"

    def _log(self, record: dict[str, float], on_step: Callable[[dict[str, float]], None] | None) -> None:
        self.history.append(record)
        checkpoints.append_log(self.out / "losses.jsonl", record)
        if on_step is not None:
            on_step(record)

    def record_dense(self, told: Callable[[], None] | None = None) -> None:
        """Generate what trajectories are not there yet; `told` is called for each that is."""
        count, batch = self.config.trajectories, self.config.batch
        with self.routed.switched(False):
            for first in range(0, count, batch):
                chosen = range(first, min(first + batch, count))
                seen: list[Tensor] = []
                # All of a batch, or none: alone, one would differ in its last bits.
                if not all(place in self.trajectories for place in chosen):
                    with watched(self.pipe.scheduler, partial(_keep, seen)):
                        self._generate(self.pipe, chosen)
                    for row, place in enumerate(chosen):
                        self.trajectories.put(place, torch.stack([latents[row] for latents in seen]))
                if told is not None:
                    for _ in chosen:
                        told()

    def _draw(self, call: Callable[..., Any], chosen: Sequence[int]) -> None:
        captions = [self.prompts[place % len(self.prompts)] for place in chosen]
        seeds = [self.config.seed + place for place in chosen]
        draw(self.pipe, captions, seeds, self.config.steps, self.config.guidance, call=call, **self.options)

    def _iterate(self, optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> dict[str, float]:
        """One optimiser step at these peak rates of its groups; returns what is logged."""
        began, config = time.perf_counter(), self.config
        generator = torch.Generator().manual_seed(config.seed + self.step)
        chosen = torch.randint(config.trajectories, (config.batch,), generator=generator).tolist()
        compute = config.computes[self.step % len(config.computes)]
        set_budget(self.pipe, compute=compute)
        walk = self.walks(self.routed, self.pipe.scheduler, self._wanted(chosen), self._discriminator is not None)
        listening = nullcontext() if self._discriminator is None else self._discriminator.listening()
        with torch.enable_grad(), self._autocast(), watched(self.pipe.scheduler, walk), listening:
            self._generate(recording(self.pipe), chosen)
        told = {} if self._discriminator is None else self._oppose(self._discriminator, walk, generator)
        loss = sum(walk.losses)
        if not walk.losses or not math.isfinite(loss):
            raise TrainingError(self._unfit(f"The loss became {loss}"))
        left = 1 - self.step / config.iterations
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(left, (self.step + 1) / max(1, config.warmup))
        norms = [float(clip_grad_norm_(group["params"], config.max_grad_norm)) for group in optimizer.param_groups]
        if not all(math.isfinite(norm) for norm in norms):
            raise TrainingError(self._unfit(f"Gradients became {norms}"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        return {"step": self.step, "compute": compute, "loss": loss, "last": walk.losses[-1], "grad_norm": norms[0], **told,
                "seconds": seconds}  # fmt: skip

    def _unfit(self, what: str) -> str:
        return (
            f"{what} in iteration {self.step}. Start anew in another output folder with a lower learning rate (`dense`: the dense "
            f"generations in {self.trajectories.folder} serve again), or check the backbone's precision."
        )

    @property
    def _device(self) -> torch.device:
        """Where the pipeline computes, wherever its weights lie in between."""
        return torch.device(getattr(self.pipe, "_execution_device", None) or next(self.backbone.parameters()).device)

    def _autocast(self) -> AbstractContextManager[Any]:
        return (
            torch.autocast(self._device.type, torch.bfloat16)
            if self.config.mixed_precision == "bf16"
            else nullcontext()
        )

    def _oppose(self, discriminator: Discriminator, walk: Walk, generator: torch.Generator) -> dict[str, float]:
        """Go backward from the end of a walk: towards the dense one's latents, and to where it is not told apart."""
        assert walk.end is not None
        wanted = walk.wanted[-1].to(walk.end.device)
        with self._autocast():
            verdict = discriminator.judge(walk.end, wanted, generator)
        missed = 2 * (walk.end.detach().float() - wanted) / wanted.numel()
        slope = missed + self.config.adversarial * missed.norm() * verdict.gradient
        walk.end.backward(slope.to(walk.end.dtype))
        return {"told_apart": verdict.told_apart}

    def _plans(self) -> tuple[RestPlan, ...]:
        """The generations that are walked: deltas are in force under no others."""
        found: list[RestPlan] = []
        budget = self.routed.budget

        def see(latents: Tensor) -> Tensor:
            plan = self.routed.rests  # known while a generation goes on
            if not any(plan.like(other) for other in found):
                found.append(plan)
            return latents

        try:
            for compute in dict.fromkeys(self.config.computes):
                set_budget(self.pipe, compute=compute)
                with torch.no_grad(), watched(self.pipe.scheduler, see):
                    self._generate(recording(self.pipe), [0])
        finally:
            self.routed.budget = budget
            self.routed.reset()
        return tuple(found)

    def _wanted(self, chosen: Sequence[int]) -> Tensor:
        """Latents [T, B, ...] of dense generations after each model call of those that are walked."""
        return self.trajectories.get(chosen)

    def _identify_dense(self) -> dict[str, Any]:
        """What dense generations depend on: settings of the training may change, and they stay."""
        config = self.config
        with self.routed.switched(False):  # deltas that are there are no part of it
            weights = checkpoints.weights_fingerprint(self.backbone)
        return {
            "dense": {"steps": config.steps, "guidance": config.guidance, "seed": config.seed},
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "backbone": f"{type(self.backbone).__name__} {weights}",
            "options": {name: repr(value) for name, value in self.options.items()},
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = asdict(self.config) | {"computes": list(self.config.computes)}
        del settings["checkpoint_every"], settings["checkpointing"]
        if not self.config.adversarial:
            del settings["adversarial"], settings["discriminator_lr"]
        routing = replace(self.routed.config, deltas=None, compute=None, keep=1.0).to_dict()
        return self._dense_identity | {"tune": settings, "routing": routing}

    def _save(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        checkpoints.save(self.out, self.step, tensors, optimizer.state_dict(), self._identity())

    def _resume(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        step = checkpoints.resume(self.out, self._identity(), parameters, optimizer)
        if step is None:
            return
        self.step = step
        self.history = checkpoints.truncate_log(self.out / "losses.jsonl", self.step, write=True)


def _keep(seen: list[Tensor], latents: Tensor) -> Tensor:
    seen.append(latents.float())
    return latents


@contextmanager
def _frozen(pipe: Any) -> Iterator[None]:
    """No parameter of the pipeline's parts asks for gradients."""
    parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, nn.Module)]
    asked = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
