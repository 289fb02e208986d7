"""Backbones without a pipeline: examples that every family accepts, at the token counts asked for, and rows that are timed."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec
from shivelight.backbones.examples import example_call
from shivelight.backbones.presets import PRESETS, read_preset
from shivelight.cost import planned_ratio
from shivelight.evaluation.bare import BareLoop, bare_points, check_memory, timed_rows
from shivelight.evaluation.results import new_results, validate


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loop_runs_the_tokens_and_steps_it_was_asked_for(name: str) -> None:
    model = build(name).transformer
    loop = BareLoop(model, 2, 16, 5, steps=6)
    sl.attach(loop, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    first = loop()
    assert torch.isfinite(first).all() and len(first) == 2
    assert routed_of(loop).shape == (16, 0 if name == "dit" else 5)
    assert routed_of(loop).spending.ratio == pytest.approx(0.5)
    assert torch.equal(loop(), first)


@pytest.mark.parametrize("name", [name for name in PRESETS if not read_preset(name).missing])
def test_a_published_shape_takes_its_example(name: str) -> None:
    preset = read_preset(name)
    model = preset.build(blocks=2)
    spec = find_spec(model)
    call = example_call(model, spec, 1, preset.image_tokens, preset.text_tokens)
    seen: list[torch.Size] = []
    kind, block = spec.block_list(model)[0]
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (dict(zip(kind.arguments, args, strict=False)) | kwargs)[kind.image_argument].shape
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**call | {spec.timestep_argument: torch.zeros(1, device="meta")})
    assert seen == [torch.Size((1, preset.image_tokens, spec.widths(model)[0]))]


def test_rows_are_timed_in_turns_and_hold_the_plan() -> None:
    model = build("flux").transformer
    loop = BareLoop(model, 1, 64, 6, 4)
    points, _ = bare_points(loop, [0.6], [0.5])
    methods = ["tokens", "tokens+reuse", "blocks+reuse", "tokens+blocks+reuse", "blocks"]
    assert [point.method for point in points] == methods
    rows = timed_rows(loop, points, rounds=2, described={"variant": "tiny"})
    assert [row["method"] for row in rows] == ["dense", *methods]
    assert rows[0]["planned_ratio"] == 1.0 and "speedup" not in rows[0]
    for row in rows[1:]:
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["planned_ratio"])
        assert row["planned_ratio"] <= (0.75 if row["method"] == "tokens" else 0.5) and row["variant"] == "tiny"
    results = new_results(seed=0)
    results["rows"] = rows
    validate(results)
    assert not hasattr(model, "shivelight")


def test_the_plan_of_tokens_is_what_they_spend() -> None:
    loop = BareLoop(build("sd3").transformer, 1, 64, 6, 4)
    (point,), _ = bare_points(loop, [0.5], [])
    with point.state():
        loop()
        routed = routed_of(loop)
        schedule = sl.current_schedule(loop, 4)
        wanted = planned_ratio(routed.planner.costs, schedule.keep, routed.routed, 64, 6)
        assert routed.spending.ratio == pytest.approx(wanted) and 0 < schedule.mean_keep <= 0.5
    assert timed_rows(loop, [point], rounds=1)[1]["planned_ratio"] == pytest.approx(wanted)


def test_what_cannot_be_timed_says_why() -> None:
    with pytest.raises(sl.ShivelightError, match=r"The weights of Big take 2000000.0 GB.*--blocks"):
        check_memory(10**15, torch.bfloat16, "cpu", "Big")
    check_memory(10, torch.bfloat16, "cpu", "small")
    sana = BareLoop(build("sana").transformer, 1, 16, 5, 4)
    assert [point.method for point in bare_points(sana, [0.5], [0.5])[0]] == ["blocks+reuse", "blocks"]


@pytest.mark.parametrize("name", ["pixart", "dit"])  # DiT's timestep embedder is inside its first block
def test_a_compiled_loop_times_graphs_of_one_set_and_torchs_own_way_beside_them(name: str) -> None:
    torch._dynamo.reset()
    loop = BareLoop(build(name).transformer, 1, 16, 6, 4)
    points, _ = bare_points(loop, [], [0.6])
    eager = {}
    for point in points:
        with point.state():
            eager[point.name] = loop()
    loop.compile(backend="eager")
    rows = timed_rows(loop, points, rounds=2)
    assert [row["budget"] for row in rows if row["method"] == "dense"] == [{}, {"whole": 1}]
    assert all(row["compiled"] for row in rows)
    assert loop.regions is not None
    graphs = loop.regions.graphs
    for point in points:  # states come and go: the graphs stay
        with point.state():
            torch.testing.assert_close(loop(), eager[point.name], atol=1e-4, rtol=1e-3)
    assert loop.regions.graphs == graphs > 0
    assert not any(module._forward_hooks for module in loop.transformer.modules())
