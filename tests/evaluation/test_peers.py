"""Peers: diffusers' own caches as operating points, the same as without us, and gone without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captioned import captioned
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

import shivelight as sl
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.peers import cache_points, first_block_cache, taylor_seer
from shivelight.pipelines import draw

CAPTIONS = ["a b", "c"]
OPTIONS = {"height": 32, "width": 32, "max_sequence_length": 16}


def compared(name: str) -> Comparison:
    pipe = captioned(name)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    return Comparison(pipe, Setting(8, 3.0, 0, 2, OPTIONS))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda c: first_block_cache(c, 0.5), FirstBlockCacheConfig(0.5)),
        (
            lambda c: taylor_seer(c, 3, 2),
            TaylorSeerCacheConfig(3, max_order=2, use_lite_mode=True, taylor_factors_dtype=torch.float32),
        ),
    ],
)
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_cache_draws_what_diffusers_alone_draws_with_it(name: str, make: Any, config: Any) -> None:
    comparison = compared(name)
    dense = comparison.pictures(comparison.dense(), CAPTIONS)
    point = make(comparison)
    cached = comparison.pictures(point, CAPTIONS)
    assert not torch.equal(cached, dense)
    assert comparison.counted_flops(point) < 0.9 * comparison.counted_flops(comparison.dense())
    assert comparison.planned(point) is None
    assert torch.equal(comparison.pictures(comparison.dense(), CAPTIONS), dense)
    alone = captioned(name)
    alone.transformer.enable_cache(config)
    drawn = draw(alone, CAPTIONS, range(2), 8, 3.0, output_type="pt", **OPTIONS)
    assert torch.equal(drawn.float().clamp(0, 1), cached)


def test_where_there_are_no_caches_there_are_no_points() -> None:
    comparison = compared("pixart")
    assert cache_points(comparison) == []
    with pytest.raises(sl.ShivelightError, match="PixArtTransformer2DModel has no caches"):
        first_block_cache(comparison, 0.1)
    names = [point.name for point in cache_points(compared("flux"))]
    assert len(names) == len(set(names)) == 9
