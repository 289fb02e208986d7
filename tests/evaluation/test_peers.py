"""Peers: diffusers' own caches as operating points, the same as without us, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captioned import captioned
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from peering import STEPS, attributes, bare, block_flops, captions, compared, last_block_gives, options
from torch import Tensor

import shivelight as sl
from shivelight.evaluation.bare import timed_rows
from shivelight.evaluation.peers import (
    PEERS,
    cache_points,
    first_block_cache,
    interval_cache,
    mag_cache,
    peer_points,
    taylor_seer,
)
from shivelight.evaluation.peers.ground import Ground, rests
from shivelight.evaluation.peers.mag_cache import magnitude_ratios
from shivelight.pipelines import draw

CAPTIONS = ["a b", "c"]
MAGNITUDES = [1.0, 1.02, 1.01, 0.99, 1.0, 1.0, 0.98, 0.97]
MADE: list[tuple[Callable[[Any], Any], Any]] = [
    (lambda c: first_block_cache(c, 0.5), FirstBlockCacheConfig(0.5)),
    (
        lambda c: taylor_seer(c, 3, 2),
        TaylorSeerCacheConfig(3, max_order=2, use_lite_mode=True, taylor_factors_dtype=torch.float32),
    ),
    (lambda c: mag_cache(c, 0.05, ratios=MAGNITUDES), MagCacheConfig(0.05, 3, 0.2, STEPS, MAGNITUDES)),
]


@pytest.mark.parametrize(("make", "config"), MADE, ids=["first-block-cache", "taylorseer", "magcache"])
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_cache_draws_what_diffusers_alone_draws_with_it(name: str, make: Any, config: Any) -> None:
    comparison = compared(name)
    dense = comparison.pictures(comparison.dense(), CAPTIONS)
    point = make(comparison)
    cached = comparison.pictures(point, CAPTIONS)
    assert not torch.equal(cached, dense)
    assert comparison.counted_flops(point) < 0.9 * comparison.counted_flops(comparison.dense())
    assert torch.equal(comparison.pictures(comparison.dense(), CAPTIONS), dense)
    alone = captioned(name)
    alone.transformer.enable_cache(config)
    drawn = draw(alone, CAPTIONS, range(2), STEPS, 3.0, output_type="pt", **options(name))
    assert torch.equal(drawn.float().clamp(0, 1), cached)


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit", "sana"])
@pytest.mark.parametrize(
    ("make", "start"), [(first_block_cache, "output"), (mag_cache, "input"), (interval_cache, "input")]
)
def test_a_resting_stack_adds_what_it_last_did_where_diffusers_has_no_caches(name: str, make: Any, start: str) -> None:
    loop = bare(name)
    before, dense = attributes(loop.transformer), loop()
    with last_block_gives(loop, [1, 2, 4, 5, 7], start):
        expected = loop()
    point = make(loop, skip=2 / 3)
    with point.state():
        assert torch.equal(loop(), expected)
        assert torch.equal(loop(), expected), "the second generation depends on the first"
    assert torch.equal(loop(), dense) and not torch.equal(expected, dense)
    assert attributes(loop.transformer) == before


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_taylorseer_forecasts_the_last_projection(name: str) -> None:
    loop = bare(name)
    projection = getattr(loop.transformer, "proj_out_2" if name == "dit" else "proj_out")
    outputs: list[Tensor] = []

    def forecast(module: Any, args: Any, output: Tensor) -> Tensor:
        """Runs at steps 0, 1, 2, 4 and 7; 3, 5 and 6 go on in a straight line."""
        step = len(outputs)
        ends = {3: (1, 2), 5: (2, 4), 6: (2, 4)}.get(step)
        if ends is not None:
            older, newer = ends
            output = outputs[newer] + (outputs[newer] - outputs[older]) / (newer - older) * (step - newer)
        outputs.append(output)
        return output

    handle = projection.register_forward_hook(forecast)
    expected = loop()
    handle.remove()
    point = taylor_seer(loop, 3)
    with point.state():
        torch.testing.assert_close(loop(), expected)
    assert point.plan is not None and point.plan(loop.shape) == 5 / 8


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
@pytest.mark.parametrize("make", [make for make, _ in MADE], ids=["first-block-cache", "taylorseer", "magcache"])
def test_a_picture_does_not_depend_on_the_one_before_nor_on_one_broken_off(name: str, make: Any) -> None:
    comparison, drawn = compared(name), captions(name)
    point, blocks = make(comparison), comparison.backbone.transformer_blocks
    before = attributes(comparison.backbone)
    calls = 0

    def breaks(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("stop")

    first = comparison.pictures(point, drawn[1:])
    assert comparison.counted_flops(point) < 0.9 * comparison.counted_flops(comparison.dense())
    with point.state():
        comparison.call(drawn[:1], STEPS)
        assert torch.equal(comparison.call(drawn[1:], STEPS, 0), first)
        handle = comparison.backbone.register_forward_pre_hook(breaks)
        with pytest.raises(RuntimeError, match="stop"):
            comparison.call(drawn[:1], STEPS)
        handle.remove()
        assert torch.equal(comparison.call(drawn[1:], STEPS, 0), first)
    assert (
        attributes(comparison.backbone) == before and "forward" in blocks[1].__dict__
    )  # the adapter's hooks are still there


def test_magnitudes_are_those_of_the_residual() -> None:
    comparison = compared("sd3")
    added: list[Tensor] = []
    blocks = comparison.backbone.transformer_blocks
    starts: list[Tensor] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, k: starts.append(k["hidden_states"]), with_kwargs=True),
        blocks[-1].register_forward_hook(lambda m, a, o: added.append(o[1] - starts[-1])),
    ]
    comparison.pictures(comparison.dense(), [comparison.any])
    for handle in handles:
        handle.remove()
    sizes = torch.stack(added).norm(dim=-1)
    expected = [1.0, *(sizes[1:] / sizes[:-1]).mean(dim=(1, 2)).tolist()]
    assert magnitude_ratios(Ground(comparison)) == pytest.approx(expected, rel=1e-4)


def test_what_cannot_run_says_why() -> None:
    for where in (compared("flux2"), bare("flux2")):
        points, reasons = peer_points(where, ["first-block-cache", "taylorseer"])
        assert {point.method for point in points} == {"taylorseer-1", "taylorseer-2"}
        assert [reason.startswith("first-block-cache cannot run on Flux2") for reason in reasons] == [True]
    with pytest.raises(sl.ShivelightError, match=r"no peer 'tea'; known are first-block-cache, taylorseer"):
        peer_points(bare("sd3"), ["taylorseer", "tea"])
    names = [point.name for point in cache_points(compared("sd3"))]
    assert len(names) == len(set(names)) == 9


def test_steps_that_rest_are_evenly_spread() -> None:
    for skip, running in (
        (0.25, [0, 1, 2, 4, 5, 6, 8]),
        (0.5, [0, 2, 4, 6, 8]),
        (1 / 3, [0, 1, 3, 4, 6, 7]),
        (0.75, [0, 4, 8]),
    ):
        assert [step for step in range(9) if not rests(step, skip)] == running


@pytest.mark.parametrize("name", ["sd3", "flux", "dit"])
@pytest.mark.parametrize("peer", [name for name in PEERS if "steps" not in name])
def test_what_is_planned_is_what_is_counted(peer: str, name: str) -> None:
    if peer == "cache-dit":
        pytest.importorskip("cache_dit")
    loop = bare(name)
    points, _ = peer_points(loop, [peer])
    dense = block_flops(loop)
    # What finds out which tokens run is counted, and not planned.
    error = {"token-merging": 0.05, "dydit": 0.02}.get(peer, 1e-6)
    for point in points[1:2]:
        assert point.plan is not None
        with point.state():
            loop()
            assert block_flops(loop) / dense == pytest.approx(point.plan(loop.shape), abs=error), point.name


def test_rows_of_a_bare_loop_have_the_plan() -> None:
    loop = bare("dit")
    points = [first_block_cache(loop, skip=0.5), taylor_seer(loop, 4)]
    dense, first, forecast = timed_rows(loop, points, 2)
    assert dense["planned_ratio"] == 1.0 and forecast["planned_ratio"] == 0.5
    assert first["method"] == "first-block-cache" and first["budget"] == {"skip": 0.5}
    assert first["planned_ratio"] == pytest.approx(1 - 0.5 * 3 / 4)
    assert first["efficiency"] == pytest.approx(first["speedup"] * first["planned_ratio"])
