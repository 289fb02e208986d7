"""Peers: other people's ways to make the same pipeline faster, as operating points of a `Comparison`; one file each."""

from collections.abc import Sequence

from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.evaluation.peers.caches import has_caches
from shivelight.evaluation.peers.first_block_cache import first_block_cache
from shivelight.evaluation.peers.taylor_seer import taylor_seer

__all__ = ["cache_points", "first_block_cache", "taylor_seer"]


def cache_points(
    comparison: Comparison, thresholds: Sequence[float] = (0.05, 0.1, 0.2), intervals: Sequence[int] = (2, 3, 4)
) -> list[OperatingPoint]:
    """First Block Cache at these thresholds and TaylorSeer, of first and second order, at these intervals; none where the backbone
    has no caches."""
    if not has_caches(comparison):
        return []
    points = [first_block_cache(comparison, threshold) for threshold in thresholds]
    return points + [taylor_seer(comparison, interval, order) for order in (1, 2) for interval in intervals]
