"""Fewer steps, placed: the dense schedule with some of its noise levels left out, instead of a shorter schedule's own.

Where Euler's method solves a flow model, a step at which all blocks rest and their last output stands in is a longer step of the
one before: up to what the head makes of the time, the velocity is the same. So this is what resting has to be ahead of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from shivelight.config import Reuse
from shivelight.errors import ShivelightError
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Where
from shivelight.execution.stale import run_steps

METHOD = "fewer-steps-placed"


def placed_steps(where: Where, runs: Sequence[int]) -> OperatingPoint:
    """The dense model at these steps of the reference's schedule, numbered from 0, which must be among them.

    Raises:
        ShivelightError: a bare loop, or a scheduler that is not Euler's for flow models.
    """
    ground = Ground(where)
    if isinstance(where, BareLoop):
        raise ground.refuse(METHOD, "with random weights it says no more than fewer-steps")
    scheduler = where.pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        kind = type(scheduler).__name__
        raise ground.refuse(METHOD, f"it leaves out steps of Euler's method for flow models, not of {kind}")
    if list(runs) != sorted({0, *runs}) or runs[-1] >= ground.steps:
        raise ShivelightError(f"runs is {tuple(runs)}; give ascending steps below {ground.steps}, the first of them 0.")
    point = ground.point(METHOD, {}, lambda: only(scheduler, ground.steps, runs), lambda shape: 1.0)
    return replace(point, steps=len(runs))


def placed_steps_points(ground: Ground) -> list[OperatingPoint]:
    """Three quarters, half and a quarter of the steps, where blocks that rest together would run."""
    counts = {round(share * ground.steps) for share in (0.75, 0.5, 0.25)}
    growth = Reuse().spacing(ground.steps)
    return [
        placed_steps(ground.where, run_steps(count, ground.steps, ground.steps, growth))
        for count in sorted(counts, reverse=True)
        if 1 < count < ground.steps
    ]


@contextmanager
def only(scheduler: Any, steps: int, runs: Sequence[int]) -> Iterator[None]:
    """Schedules of `len(runs)` steps are those of `steps` without the others; any other number is as it was."""
    own = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        if num_inference_steps != len(runs):
            own(num_inference_steps, *args, **kwargs)
            return
        own(steps, *args, **kwargs)
        chosen = torch.tensor(list(runs), device=scheduler.timesteps.device)
        scheduler.timesteps = scheduler.timesteps[chosen]
        scheduler.sigmas = torch.cat([scheduler.sigmas[chosen.to(scheduler.sigmas.device)], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = len(runs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
