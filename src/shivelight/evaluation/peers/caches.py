"""What the caches that come with diffusers have in common: they are run by its own code, as points of a comparison.

They need a backbone with `enable_cache` whose pipeline opens a `cache_context` (FLUX, Qwen-Image, Wan; not SD3, PixArt or DiT).
Which steps they leave out depends on the picture, so nothing is planned: their FLOPs are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.cache_utils import CacheMixin

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, OperatingPoint


def has_caches(comparison: Comparison) -> bool:
    """Whether the backbone knows diffusers' caches."""
    return isinstance(comparison.backbone, CacheMixin)


def cache_point(comparison: Comparison, method: str, budget: dict[str, float], config: Any) -> OperatingPoint:
    """The dense model with a cache of this config, at the reference number of steps.

    Raises:
        ShivelightError: the backbone has no caches.
    """
    backbone: Any = comparison.backbone
    if not has_caches(comparison):
        raise ShivelightError(
            f"{type(backbone).__name__} has no caches of diffusers' for {method}: it needs a backbone with `enable_cache` whose "
            "pipeline opens a cache_context, such as FLUX's or Qwen-Image's."
        )

    @contextmanager
    def state() -> Iterator[None]:
        with comparison.routed.switched(False):
            backbone.enable_cache(config)
            try:
                yield
            finally:
                backbone.disable_cache()

    return OperatingPoint(method, budget, comparison.setting.steps, state, peer=True)
