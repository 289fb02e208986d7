"""Peers: other people's ways to make the same pipeline faster, as operating points of a `Comparison`."""

from shivelight.evaluation.peers.caches import cache_points, first_block_cache, taylor_seer

__all__ = ["cache_points", "first_block_cache", "taylor_seer"]
