"""DBCache through its own package: what it does at rest, and that nothing of it stays."""

from __future__ import annotations

import sys

import pytest
import torch
from peering import attributes, bare, captions, compared, last_block_gives

import shivelight as sl
from shivelight.evaluation.peers import cache_dit, peer_points


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_at_rest_the_first_block_runs_and_the_others_add_what_they_last_did(name: str) -> None:
    pytest.importorskip("cache_dit")
    loop = bare(name)
    before, dense = attributes(loop.transformer), loop()
    with last_block_gives(loop, [1, 2, 4, 5, 7], "output"):
        expected = loop()
    with cache_dit(loop, skip=2 / 3).state():
        torch.testing.assert_close(loop(), expected)
        torch.testing.assert_close(loop(), expected)
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before


@pytest.mark.parametrize("name", ["sd3", "dit", "qwen-image"])
def test_a_pipeline_is_as_it_was(name: str) -> None:
    pytest.importorskip("cache_dit")
    comparison, drawn = compared(name), captions(name)
    pipe, cls = comparison.pipe, type(comparison.pipe)
    dense, forward = comparison.pictures(comparison.dense(), drawn), comparison.backbone.__dict__["forward"]
    before, call, of_pipe = attributes(comparison.backbone), cls.__call__, set(pipe.__dict__)
    point = cache_dit(comparison, 10.0)
    cached = comparison.pictures(point, drawn)
    assert comparison.counted_flops(point) < 0.8 * comparison.counted_flops(comparison.dense())
    assert torch.equal(comparison.pictures(point, drawn), cached) and not torch.equal(cached, dense)
    assert comparison.planned(point) is None
    assert torch.equal(comparison.pictures(comparison.dense(), drawn), dense)
    assert attributes(comparison.backbone) == before and cls.__call__ is call and set(pipe.__dict__) == of_pipe
    assert comparison.backbone.__dict__["forward"] is forward and not hasattr(cls, "_is_cached")
    sl.detach(pipe)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    points, reasons = peer_points(bare("dit"), ["cache-dit"])
    assert not points and len(reasons) == 1 and "pip install 'shivelight[peers]'" in reasons[0]
