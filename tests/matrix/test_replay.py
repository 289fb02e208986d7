"""Generations recorded once and replayed, with every family: the same pictures as without, of other prompts and seeds too."""

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, free, kept
from taping import taped

import shivelight as sl


def routed_so(pipe: Any, name: str, way: str) -> None:
    if "tokens" in way and name not in TOKENS:
        pytest.skip("its tokens cannot be routed")
    if way == "tokens":
        kept(pipe)
    elif way == "blocks":
        free(pipe)
    else:
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7))


@pytest.mark.parametrize("way", ["dense", "tokens", "blocks", "tokens that reuse"])
def test_replayed_generations_draw_the_same_pictures(name: str, way: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    if way == "dense":
        free(pipe)
    else:
        routed_so(pipe, name, way)
    with sl.dense(pipe) if way == "dense" else torch.no_grad():
        expected = {sample: call(pipe, sample, steps=6) for sample in (0, 1, 2)}
        routed = taped(pipe)
        spent = []
        for sample in (0, 1, 2, 0):
            assert torch.equal(call(pipe, sample, steps=6), expected[sample])
            spent.append(routed.spending.ratio)
    assert "6 passes" in str(routed.replays) or "12 passes" in str(routed.replays)
    assert len(set(spent)) == 1
