"""The caches that come with diffusers, run by its own code: First Block Cache and TaylorSeer.

They need a backbone with `enable_cache` whose pipeline opens a `cache_context` (FLUX, Qwen-Image, Wan; not SD3, PixArt or DiT).
Which steps they leave out depends on the picture, so nothing is planned: their FLOPs are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, OperatingPoint

_NEED = "it needs a backbone of diffusers with `enable_cache` whose pipeline opens a cache_context, such as FLUX's or Qwen-Image's"


def first_block_cache(comparison: Comparison, threshold: float) -> OperatingPoint:
    """First Block Cache (ParaAttention): all blocks but the first rest while what that one adds has moved by less than `threshold`
    of its size, and add what they last did."""
    return _point(comparison, "first-block-cache", {"threshold": threshold}, FirstBlockCacheConfig(threshold))


def taylor_seer(comparison: Comparison, interval: int, order: int = 1) -> OperatingPoint:
    """TaylorSeer (arXiv 2503.06923) in diffusers' lite form: at every `interval`-th step the backbone runs, in between its output
    is forecast by a Taylor series of this order."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
    return _point(comparison, f"taylorseer-{order}", {"interval": interval}, config)


def cache_points(
    comparison: Comparison, thresholds: Sequence[float] = (0.05, 0.1, 0.2), intervals: Sequence[int] = (2, 3, 4)
) -> list[OperatingPoint]:
    """First Block Cache at these thresholds and TaylorSeer, of first and second order, at these intervals; none where the backbone
    has no caches."""
    if not isinstance(comparison.backbone, CacheMixin):
        return []
    points = [first_block_cache(comparison, threshold) for threshold in thresholds]
    return points + [taylor_seer(comparison, interval, order) for order in (1, 2) for interval in intervals]


def _point(comparison: Comparison, method: str, budget: dict[str, float], config: Any) -> OperatingPoint:
    backbone: Any = comparison.backbone
    if not isinstance(backbone, CacheMixin):
        raise ShivelightError(f"{type(backbone).__name__} has no caches of diffusers' for {method}: {_NEED}.")

    @contextmanager
    def state() -> Iterator[None]:
        with comparison.routed.switched(False):
            backbone.enable_cache(config)
            try:
                yield
            finally:
                backbone.disable_cache()

    return OperatingPoint(method, budget, comparison.setting.steps, state, peer=True)
