"""torch.compile around a routed backbone, or around its blocks: the same pictures as without."""

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, close, free, gated, kept, widths_of
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of

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
