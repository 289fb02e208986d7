"""First Block Cache (ParaAttention), as diffusers has it."""

from contextlib import AbstractContextManager
from typing import Any

from diffusers import FirstBlockCacheConfig

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.caches import cached, check_stack
from shivelight.evaluation.peers.ground import Ground, Where, block_share, resting, rests

METHOD = "first-block-cache"


def first_block_cache(where: Where, threshold: float | None = None, *, skip: float | None = None) -> OperatingPoint:
    """All blocks but the first rest while what that one adds has moved by less than `threshold` of its size, and add what they last
    did.

    Args:
        where: a comparison or a bare loop.
        threshold: diffusers' own.
        skip: instead of a threshold, the share of steps at which they rest, evenly spread, whatever the first one adds.

    Raises:
        ShivelightError: the backbone's blocks are none that diffusers' hooks understand.
    """
    ground = Ground(where)
    check_stack(ground, METHOD)
    if skip is None:
        if threshold is None:
            raise ShivelightError("First Block Cache needs a threshold, or a share of steps to skip.")
        config = FirstBlockCacheConfig(threshold)
        return ground.point(METHOD, {"threshold": threshold}, lambda: cached(ground, config))

    def decide(hooks: list[Any], step: int) -> None:
        for hook in hooks:
            if hasattr(hook, "threshold"):
                hook.threshold = float("inf") if rests(step, skip) else -1.0

    def state() -> AbstractContextManager[Any]:
        return cached(ground, FirstBlockCacheConfig(), decide)

    def plan(shape: tuple[int, int]) -> float:
        others = block_share(ground, range(1, len(ground.blocks)), shape)
        return 1.0 - others * resting(ground.steps, skip) / ground.steps

    return ground.point(METHOD, {"skip": skip}, state, plan)


def first_block_cache_points(ground: Ground) -> list[OperatingPoint]:
    """Three thresholds; three shares of steps where weights are random."""
    if ground.bare:
        return [first_block_cache(ground.where, skip=skip) for skip in (0.25, 0.5, 0.75)]
    return [first_block_cache(ground.where, threshold) for threshold in (0.05, 0.1, 0.2)]
