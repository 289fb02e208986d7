"""Blocks as compiled graphs: the same results, a bounded number of graphs, and none compiled later than the first generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import close, free, gated, kept
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.compiled import Regions


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def pictures(pipe: Any, *samples: int, **options: Any) -> Tensor:
    return FAMILIES["sd3"](pipe, *samples or (0,), steps=3, **options)


def uncompiled(pipe: Any, *samples: int, **options: Any) -> Tensor:
    """As the compiled backbone would draw without graphs: the schedule is the same."""
    routed = routed_of(pipe)
    regions, routed.regions = routed.regions, Regions()
    try:
        return pictures(pipe, *samples, **options)
    finally:
        routed.regions = regions


def reusing(pipe: Any) -> Any:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.8))
    return routed_of(pipe)


WAYS = {
    "tokens": kept,
    "tokens that reuse": reusing,
    "blocks": free,
    "gates": lambda pipe: gated(pipe, widths=(0.5, 1.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_prompts_and_seeds_bring_no_new_graph(way: str) -> None:
    pipe = build("sd3")
    routed = WAYS[way](pipe)
    sl.compile(pipe, backend="eager", lengths="static")
    first = pictures(pipe, 0, 1)
    graphs = routed.regions.graphs
    assert graphs
    close(first, uncompiled(pipe, 0, 1))
    close(pictures(pipe, 2, 1), uncompiled(pipe, 2, 1))
    pictures(pipe, 1, 0)
    assert routed.regions.graphs == graphs


@pytest.mark.slow
def test_another_batch_resolution_and_budget_are_right_after_compilation() -> None:
    pipe = build("sd3")
    reusing(pipe)
    sl.compile(pipe, backend="eager", lengths="static")
    pictures(pipe, 0)
    close(pictures(pipe, 0, 1, 2), uncompiled(pipe, 0, 1, 2))
    close(pictures(pipe, 0, height=24, width=32), uncompiled(pipe, 0, height=24, width=32))
    sl.set_budget(pipe, compute=0.6)
    close(pictures(pipe, 0), uncompiled(pipe, 0))


def test_a_lora_loaded_after_compilation_counts() -> None:
    from peft import LoraConfig

    pipe = build("sd3")
    reusing(pipe)
    sl.compile(pipe, backend="eager", lengths="static")
    before = pictures(pipe, 0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    changed = pictures(pipe, 0)
    assert not torch.allclose(changed, before, atol=1e-3)
    close(changed, uncompiled(pipe, 0))


@pytest.mark.slow
def test_one_graph_of_any_length_serves_all_numbers_of_tokens() -> None:
    counts = {}
    for lengths in ("static", "dynamic"):
        torch._dynamo.reset()
        pipe = build("sd3")
        routed = kept(pipe)
        sl.compile(pipe, backend="eager", lengths=lengths)
        close(pictures(pipe, 0), uncompiled(pipe, 0))
        assert routed.distinct_counts() > 4
        counts[lengths] = routed.regions.graphs
    assert counts["dynamic"] < counts["static"]


def test_auto_measures_lengths_only_where_there_are_many() -> None:
    pipe = build("sd3")
    routed = kept(pipe)
    sl.compile(pipe, backend="eager")
    assert routed.regions.chosen == "auto"
    pictures(pipe, 0)
    assert routed.regions.chosen in ("static", "dynamic")
    assert routed.regions.measured_ms.keys() == {"static", "dynamic"}
    assert "measured on a block" in sl.summary(pipe)
    few = reusing(pipe)
    sl.compile(pipe, backend="eager")
    pictures(pipe, 0)
    assert few.regions.chosen == "auto" and not few.regions.measured_ms


def test_dense_is_compiled_too_and_unrouted_blocks_with_it() -> None:
    pipe = build("sd3")
    expected = pictures(pipe, 0)
    routed = kept(pipe)
    sl.compile(pipe, backend="eager")
    with sl.dense(pipe):
        close(pictures(pipe, 0), expected)
    assert set(routed.regions._form_of) == set(pipe.transformer.transformer_blocks)
    assert all("all" in key for key in routed.regions._compiled)
    sl.detach(pipe)
    assert not any("_diffusers_hook" in block.__dict__ for block in pipe.transformer.transformer_blocks)
    assert torch.equal(pictures(pipe, 0), expected)


def test_gradients_run_uncompiled() -> None:
    pipe = build("sd3")
    routed = kept(pipe)
    sl.compile(pipe, backend="eager")
    with torch.enable_grad():
        routed.regions.run(("key",), lambda value: value * 2, torch.ones(2))
    assert not routed.regions._compiled


def test_what_is_no_single_graph_is_an_error_with_the_remedy() -> None:
    pipe = build("sd3")
    kept(pipe)
    layer = pipe.transformer.transformer_blocks[1].ff.net[0]
    forward = layer.forward

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    layer.forward = broken
    sl.compile(pipe, backend="eager")
    with pytest.raises(sl.ShivelightError, match="fullgraph=False"):
        pictures(pipe, 0)
    sl.compile(pipe, backend="eager", fullgraph=False)
    close(pictures(pipe, 0), uncompiled(pipe, 0))


def test_compile_refuses_what_it_cannot_do() -> None:
    pipe = build("sd3")
    with pytest.raises(sl.AdapterError, match="Nothing is attached"):
        sl.compile(pipe)
    kept(pipe)
    with pytest.raises(sl.ShivelightError, match="'auto', 'static', 'dynamic'"):
        sl.compile(pipe, lengths="bucket")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(sl.ShivelightError, match="as a whole"):
        sl.compile(pipe)
