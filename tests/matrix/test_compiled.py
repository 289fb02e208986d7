"""Routed backbones, compiled by us, by diffusers or by torch as a whole: the same pictures as without."""

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, close, free, gated, kept, widths_of
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.compiled import Regions

pytestmark = pytest.mark.slow  # tracing the hooks of a tiny model takes half a minute


def pictures(pipe: Any, name: str) -> Tensor:
    return FAMILIES[name](pipe, 0, steps=3)


def learned(pipe: Any, name: str) -> Any:
    return kept(pipe) if name in TOKENS else gated(pipe, widths=widths_of(name))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["blocks", "learned"])
def test_a_compiled_backbone_draws_the_same_pictures(name: str, way: str) -> None:
    pipe = build(name)
    attach = free if way == "blocks" else lambda pipe: learned(pipe, name)
    attach(pipe)
    expected = pictures(pipe, name)
    ratio = routed_of(pipe).spending.ratio
    sl.detach(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    attach(pipe)
    close(pictures(pipe, name), expected)
    assert routed_of(pipe).spending.ratio == pytest.approx(ratio)


def routed_so(pipe: Any, name: str, way: str) -> Any:
    """A backbone on which samples decide for themselves, or tokens are left out, with residuals or without."""
    if way == "gates":
        return gated(pipe, widths=widths_of(name))
    if name not in TOKENS:
        pytest.skip("its tokens cannot be routed")
    if way == "tokens":
        return kept(pipe)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7))
    return routed_of(pipe)


@pytest.mark.parametrize("way", ["gates", "tokens", "tokens that reuse"])
def test_our_graphs_draw_the_same_pictures_and_their_number_settles(name: str, way: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    routed = routed_so(pipe, name, way)
    sl.compile(pipe, backend="eager")
    compiled = call(pipe, 0, 1, 2, steps=4)
    regions, routed.regions = routed.regions, Regions()
    close(compiled, call(pipe, 0, 1, 2, steps=4))
    routed.regions = regions
    batches = ((1,), (2, 0, 1), (2,), (0, 1), (1, 2), (2, 1, 0))
    for samples in batches:
        call(pipe, *samples, steps=4)
    settled = regions.graphs
    for samples in batches:
        call(pipe, *reversed(samples), steps=4)
    assert 0 < regions.graphs == settled


def test_compiled_blocks_draw_the_same_pictures(name: str) -> None:
    pipe = build(name)
    if not getattr(pipe.transformer, "_repeated_blocks", None):
        pytest.skip(f"diffusers' {type(pipe.transformer).__name__} names no repeated blocks")
    learned(pipe, name)
    expected = pictures(pipe, name)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    close(pictures(pipe, name), expected)
    with sl.dense(pipe):
        close(pictures(pipe, name), pictures(build(name), name))
