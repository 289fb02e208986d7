"""First Block Cache (ParaAttention), as diffusers has it."""

from diffusers import FirstBlockCacheConfig

from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.evaluation.peers.caches import cache_point


def first_block_cache(comparison: Comparison, threshold: float) -> OperatingPoint:
    """All blocks but the first rest while what that one adds has moved by less than `threshold` of its size, and add what they last
    did."""
    return cache_point(comparison, "first-block-cache", {"threshold": threshold}, FirstBlockCacheConfig(threshold))
