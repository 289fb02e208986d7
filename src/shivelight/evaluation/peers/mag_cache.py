"""MagCache (arXiv 2506.09045), as diffusers has it: whole steps are left out by a curve of the residual's size, measured once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from diffusers import MagCacheConfig
from diffusers.hooks.hooks import StateManager

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.caches import cached, check_stack
from shivelight.evaluation.peers.ground import Ground, Where, resting, rests, unchanged

METHOD = "magcache"
_MOST = 3


def mag_cache(
    where: Where, threshold: float | None = None, *, skip: float | None = None, ratios: list[float] | None = None
) -> OperatingPoint:
    """All blocks rest, and add what they last did, while the error that a curve of sizes foretells stays below `threshold`.

    Args:
        where: a comparison or a bare loop.
        threshold: diffusers' own; at most 3 steps in a row are left out, and none of the first fifth.
        skip: instead of a threshold, the share of steps that are left out, evenly spread.
        ratios: the curve, of each call how large the residual is beside that of the one before; measured (`magnitude_ratios`)
            where it is not given.

    Raises:
        ShivelightError: the backbone's blocks are none that diffusers' hooks understand.
    """
    ground = Ground(where)
    check_stack(ground, METHOD)
    if skip is None:
        if threshold is None:
            raise ShivelightError("MagCache needs a threshold, or a share of steps to skip.")
        curve = magnitude_ratios(ground) if ratios is None else ratios
        config = MagCacheConfig(
            threshold=threshold, max_skip_steps=_MOST, num_inference_steps=len(curve), mag_ratios=list(curve)
        )
        return ground.point(METHOD, {"threshold": threshold}, lambda: cached(ground, config))

    def state() -> AbstractContextManager[Any]:
        own = MagCacheConfig(0.0, ground.steps, 0.0, ground.steps, [1.0] * ground.steps)

        def decide(hooks: list[Any], step: int) -> None:
            own.threshold = float("inf") if rests(step, skip) else -1.0

        return cached(ground, own, decide)

    return ground.point(METHOD, {"skip": skip}, state, lambda shape: 1.0 - resting(ground.steps, skip) / ground.steps)


def magnitude_ratios(ground: Ground) -> list[float]:
    """The curve of one dense generation, by diffusers' own calibration; of the conditional branch where it is a call of its own."""
    # diffusers prints and forgets the curve when it has seen as many calls as it was told of.
    config = MagCacheConfig(calibrate=True, num_inference_steps=10**9)
    curves: dict[str, list[float]] = {}

    def note(hooks: list[Any], step: int) -> None:
        for manager in (m for hook in hooks for m in vars(hook).values() if isinstance(m, StateManager)):
            curves.update({name: state.calibration_ratios for name, state in manager._state_cache.items()})

    with ground.dense(), unchanged(ground.backbone), cached(ground, config, note):
        ground.generate()
    return next(iter(curves.values()))


def mag_cache_points(ground: Ground) -> list[OperatingPoint]:
    """Three thresholds on one measured curve; three shares of steps where weights are random."""
    check_stack(ground, METHOD)
    if ground.bare:
        return [mag_cache(ground.where, skip=skip) for skip in (0.25, 0.5, 0.75)]
    ratios = magnitude_ratios(ground)
    return [mag_cache(ground.where, threshold, ratios=ratios) for threshold in (0.03, 0.06, 0.12)]
