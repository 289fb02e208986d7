"""TaylorSeer (arXiv 2503.06923), in diffusers' lite form."""

import torch
from diffusers import TaylorSeerCacheConfig

from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.evaluation.peers.caches import cache_point


def taylor_seer(comparison: Comparison, interval: int, order: int = 1) -> OperatingPoint:
    """At every `interval`-th step the backbone runs; in between its output is forecast by a Taylor series of this order."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
    return cache_point(comparison, f"taylorseer-{order}", {"interval": interval}, config)
