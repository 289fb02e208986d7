"""Comparisons on the tiny pipeline: what is the same for all methods, what differs, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import install, prepare, routed_of
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cost import step_flops
from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, KeptTokens, OperatingPoint, Setting, take_clock
from shivelight.evaluation.standard import (
    adapter_points,
    references,
    token_points,
    training_free_points,
    with_fewer_steps,
)
from shivelight.execution.folding import Delta
from shivelight.measurement.latency import Timings, interleave

STEPS = 3


@pytest.fixture
def comparison(pipe) -> Comparison:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig(deltas=sl.DeltaConfig(rank=2, alpha=2.0)))
    linear = pipe.transformer.transformer_blocks[1].ff.net[2]
    norm = linear.weight.norm(dim=1)
    delta = Delta(torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2), norm)
    routed_of(pipe).set_deltas(pipe.transformer, {"transformer_blocks.1.ff.net.2": delta})
    options = {"max_sequence_length": 16, "height": 32, "width": 32}
    return Comparison(pipe, Setting(STEPS, 3.0, 0, 2, options))


def every_point(comparison: Comparison) -> list[OperatingPoint]:
    free = [comparison.training_free(axis, compute=0.6) for axis in ("tokens", "blocks", "both")]
    return [*references(comparison, None), *token_points(comparison, [0.6]), *free]


def test_every_state_is_left_as_it_was_found(comparison: Comparison) -> None:
    routed = comparison.routed
    config, budget = routed.config, routed.budget
    for point in every_point(comparison):
        with point.state():
            pass
        assert comparison.routed is routed
        assert (routed.config, routed.budget, routed.enabled, routed.folded.active) == (config, budget, True, True)


def test_methods_differ_only_in_which_tokens_run(comparison: Comparison) -> None:
    points = {p.method: p for p in [*references(comparison, None), *token_points(comparison, [0.6])]}
    flops = {name: comparison.counted_flops(point) for name, point in points.items()}
    assert flops["random"] == flops["norm"] < flops["dense"]
    pictures = {name: comparison.pictures(point, ["a b", "c d", "e"]) for name, point in points.items()}
    names = list(pictures)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if {one, other} != {"tokens", "fixed"}:  # a fresh policy is flat
                assert not torch.equal(pictures[one], pictures[other]), (one, other)


def test_training_free_routing_runs_on_the_backbone_s_own_weights(comparison: Comparison) -> None:
    captions = ["a b", "c d"]
    found = {axis: comparison.training_free(axis, compute=0.7) for axis in ("tokens", "blocks")}
    ours = {axis: comparison.pictures(point, captions) for axis, point in found.items()}
    assert comparison.routed.folded.active and comparison.routed.config.reuse is None
    for axis, point in found.items():
        sl.attach(comparison.pipe, sl.RoutingConfig.training_free(compute=0.7, axis=axis))  # takes the deltas off
        assert torch.equal(comparison.call(captions, STEPS), ours[axis])
        assert point.method == ("training-free" if axis == "tokens" else "training-free-blocks")


def test_baselines_may_spend_what_routing_plans_to_spend(comparison: Comparison) -> None:
    with torch.no_grad():
        comparison.routed.policy.layer_embedding.copy_(torch.randn(comparison.routed.policy.layer_embedding.shape))
        comparison.routed.policy.layer_out.fill_(0.3)
    planned = {p.method: comparison.planned(p) for p in token_points(comparison, [0.6])}
    assert comparison.routed.shape[1] == 32  # the text of this pipeline, not the 333 tokens that a summary assumes
    assert planned["fixed"] == planned["random"] == planned["norm"]
    assert planned["tokens"] - 0.02 < planned["fixed"] <= planned["tokens"]


def test_caption_i_starts_from_the_noise_of_seed_plus_i(comparison: Comparison) -> None:
    """However captions are batched (here two at a time), and whatever the comparison's seed."""
    captions, setting = ["a b", "c d", "e"], replace(comparison.setting, seed=7)
    comparison.setting = setting
    whole = comparison.pictures(comparison.dense(), captions)
    for place, caption in enumerate(captions):
        with sl.dense(comparison.pipe):
            alone = comparison.pipe(
                caption, num_inference_steps=STEPS, guidance_scale=setting.guidance, output_type="pt",
                generator=torch.Generator().manual_seed(7 + place), **setting.options,
            ).images  # fmt: skip
        torch.testing.assert_close(whole[place : place + 1], alone, atol=1e-4, rtol=1e-4)


def test_counted_flops_are_the_backbone_s_alone(comparison: Comparison) -> None:
    counted = comparison.counted_flops(comparison.dense())
    math = sdpa_kernel(SDPBackend.MATH)  # fused attention is not counted on a CPU
    with comparison.dense().state(), math, FlopCounterMode(display=False) as everything:
        comparison.call(["a"], STEPS)
    assert 0 < counted < everything.get_total_flops()
    tokens, text = comparison.routed.shape[0], 32
    blocks = 2 * STEPS * step_flops(comparison.routed.planner.costs, [tokens] * 4, text)
    assert 1 < counted / blocks < 1.2  # the plan's blocks, and the few products around them
    fewer = comparison.counted_flops(comparison.dense(STEPS - 1))
    assert fewer / counted == pytest.approx((STEPS - 1) / STEPS)
    assert comparison.planned(comparison.dense(STEPS - 1)) == pytest.approx((STEPS - 1) / STEPS)
    routed = comparison.tokens(0.5)  # a fresh policy is flat: every step costs the same
    fewer_routed = comparison.planned(replace(routed, steps=STEPS - 1))
    assert fewer_routed / comparison.planned(routed) == pytest.approx((STEPS - 1) / STEPS)


def test_kept_tokens_are_those_of_the_schedule(comparison: Comparison) -> None:
    sl.set_budget(comparison.pipe, keep=0.5)
    with KeptTokens(comparison.routed).watching() as kept:
        comparison.call(["a"], STEPS)
    maps = kept.array()
    schedule = sl.current_schedule(comparison.pipe, STEPS)
    assert maps.shape == (STEPS, 3, 8, 8)
    assert maps.flatten(2).sum(-1).tolist() == [list(row) for row in schedule.keep]
    assert comparison.routed.observer is None


def test_rows_hold_what_was_measured_and_nothing_else(comparison: Comparison) -> None:
    points = [comparison.dense(), comparison.tokens(0.5), comparison.dense(2)]
    timings = comparison.time(points, 3)
    pictures = {p.name: comparison.pictures(p, ["a", "b"]) for p in points}
    dense, tokens, fewer = comparison.rows(points, timings, pictures)
    assert dense["method"] == "dense" and dense["speedup"] == 1.0 and "psnr_to_dense" not in dense
    assert tokens["budget"] == {"keep": 0.5} and tokens["planned_ratio"] < 1.0
    assert tokens["efficiency"] == pytest.approx(tokens["speedup"] * tokens["planned_ratio"])
    assert fewer["method"] == "fewer-steps" and fewer["steps"] == 2
    assert "kid" not in tokens and "peak_memory_mb" not in tokens
    assert "caption_agreement" not in dense and "agreement_to_dense" not in tokens


def test_rows_of_embedded_captions_have_their_agreement(comparison: Comparison) -> None:
    points, captions = [comparison.dense(), comparison.tokens(0.5)], ["tulip on white", "rose on blue dots"]
    pictures = {p.name: comparison.pictures(p, captions) for p in points}
    dense, tokens = comparison.rows(points, comparison.time(points, 1), pictures, captions=captions)
    assert {"caption_agreement", "named"} <= dense.keys() and "agreement_to_dense" not in dense
    assert tokens["agreement_to_dense"] == pytest.approx(tokens["caption_agreement"] - dense["caption_agreement"])
    assert {"caption_agreement", "agreement_to_dense", "named", "named_to_dense"} <= tokens["ci95"].keys()


def test_fewer_steps_stand_in_every_comparison(comparison: Comparison) -> None:
    points = with_fewer_steps(comparison, [comparison.dense(), comparison.tokens(0.5)])
    peers = [point for point in points if point.method == "fewer-steps"]
    assert peers and all(0 < point.steps < STEPS for point in peers)


class Timed(Comparison):
    """A comparison on a machine where routing is exactly `speedup` times faster than dense."""

    speedup = 1.0

    def time(self, points: Sequence[OperatingPoint], *_: object, **__: object) -> Timings:  # type: ignore[override]
        return Timings({point.name: [1.0 if point.method == "dense" else 1 / self.speedup] * 3 for point in points})


@pytest.mark.parametrize(("speedup", "counts"), [(1.0, {7}), (0.5, {7}), (2.0, {7, 5}), (5.0, {7, 2})])
def test_fewer_steps_fit_into_the_measured_time_and_into_the_plan(
    comparison: Comparison, speedup: float, counts: set[int]
) -> None:
    timed = Timed(comparison.pipe, replace(comparison.setting, steps=10))
    timed.speedup = speedup
    point = timed.tokens(0.6)
    assert 6.5 < 10 * timed.planned(point) < 7.5
    assert {peer.steps for peer in timed.fewer_steps([point])} == counts


def test_two_points_of_one_name_are_refused(comparison: Comparison) -> None:
    with pytest.raises(ShivelightError, match="have the name .dense 3 steps."):
        comparison.time([comparison.dense(), comparison.dense()], 3)


def test_the_finetuned_weights_are_folded_from_the_backbone_s_own(comparison: Comparison, tmp_path) -> None:  # noqa: ANN001
    """Not from those of the adapter that is attached while they are read."""
    pipe, name = comparison.pipe, "transformer_blocks.1.ff.net.2"
    own = comparison.routed.folded.originals()[name].clone()
    folder = sl.save_adapter(pipe, tmp_path / "other")
    with comparison.finetuned(read_deltas(pipe, folder)).state():
        assert not comparison.routed.enabled
        tuned = pipe.transformer.get_submodule(name).weight.clone()
    assert torch.equal(tuned, pipe.transformer.get_submodule(name).weight) and not torch.equal(tuned, own)
    with sl.dense(pipe):  # and they are taken out again
        assert torch.equal(pipe.transformer.get_submodule(name).weight, own)


@pytest.mark.parametrize("tokens", [False, True])
def test_points_of_block_routers_share_one_adapter_and_leave_no_trace(pipe, tokens: bool) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    routing = sl.TokenRouting() if tokens else None
    sl.attach(pipe, sl.RoutingConfig(routing, sl.BlockRouting(start="random", token_stride=1)))
    routed = routed_of(pipe)
    routed.gates.records.add(torch.rand(64) * 1000, torch.randn(64, 3), torch.randn(64, 3, 4))
    comparison = Comparison(pipe, Setting(STEPS, 3.0, 0, 2, {"max_sequence_length": 16, "height": 32, "width": 32}))
    config, budget = routed.config, routed.budget
    points = [comparison.dense(), *adapter_points(comparison, None, compute=0.6)]
    name = "tokens+blocks" if tokens else "blocks"
    assert [p.method for p in points] == [
        "dense",
        name,
        f"{name}+reuse",
        *(f"{name}-{d}" for d in ("static", "step", "cap")),
    ]
    planned = {point.method: comparison.planned(point) for point in points}
    assert all(plan <= 0.6 for method, plan in planned.items() if method != "dense")
    dense = comparison.counted_flops(points[0])
    counted = {point.method: comparison.counted_flops(point) / dense for point in points[1:]}
    assert counted[f"{name}-static"] == pytest.approx(planned[f"{name}-static"], abs=0.06)  # embeddings are counted too
    assert counted[f"{name}-cap"] <= 0.66
    assert comparison.realised == {}
    captions = ["a b", "c d", "e f"]
    pictures = {point.method: comparison.pictures(point, captions) for point in points}
    assert points[0].name not in comparison.realised  # dense
    with points[1].state():  # over all batches, of which the last holds one caption
        spent = [(comparison.call(captions[first : first + 2], STEPS, first), routed.spending)[1] for first in (0, 2)]
    whole = sum(part.flops for part in spent) / sum(part.dense for part in spent)
    assert comparison.realised[points[1].name] == pytest.approx(whole)
    counted_here = comparison.counted_flops(points[1], captions) / dense
    assert counted_here == pytest.approx(whole, abs=0.06)
    assert not torch.equal(pictures[name], pictures[f"{name}-static"])
    assert (routed.config, routed.budget, routed.gates.config) == (config, budget, config.blocks)


def test_another_adapter_stands_in_the_same_table_and_leaves_no_trace(comparison: Comparison, tmp_path: Path) -> None:
    pipe, routed, captions = comparison.pipe, comparison.routed, ["a b", "c d"]
    mine = comparison.pictures(comparison.tokens(0.6), captions)
    adapter = prepare_other(pipe, tmp_path)
    (other,) = adapter_points(comparison, adapter, keep=0.6)
    assert other.method == "tokens"
    other = replace(other, method="other")
    theirs = comparison.pictures(other, captions)
    assert comparison.routed is routed and routed.enabled and routed.folded.active
    assert torch.equal(comparison.pictures(comparison.tokens(0.6), captions), mine)
    assert torch.equal(comparison.pictures(other, captions), theirs) and not torch.equal(theirs, mine)
    assert comparison.planned(other) == pytest.approx(comparison.planned(comparison.tokens(0.6)), abs=0.02)
    timings = comparison.time([comparison.dense(), other], 1, warmup=0)
    assert timings.inner[other.name][0] > 0 and comparison.routed is routed
    sl.load_adapter(pipe, tmp_path / "other")
    sl.set_budget(pipe, keep=0.6)
    assert torch.equal(comparison.call(captions, STEPS), theirs)


def prepare_other(pipe, folder: Path) -> tuple:  # noqa: ANN001
    """An adapter of other routers and of no deltas, written and read."""
    attached = routed_of(pipe)
    torch.manual_seed(5)
    written = prepare(pipe, sl.RoutingConfig(sl.TokenRouting(bottleneck=8)))
    install(pipe, written, {})
    sl.save_adapter(pipe, folder / "other")
    install(pipe, attached, attached.deltas)
    attached.enable(True)
    return read_adapter(pipe, folder / "other")


def test_what_a_state_costs_is_not_timed() -> None:
    @contextmanager
    def slow() -> Iterator[None]:
        time.sleep(0.05)
        yield
        time.sleep(0.05)

    timings = interleave({"a": lambda: None, "b": lambda: None}, 1, 0, states={"a": slow})
    assert timings.total["a"][0] < 0.04


def test_an_adapter_is_named_after_what_it_routes_and_whether_it_reuses(pipe) -> None:  # noqa: ANN001
    reuse, blocks = sl.Reuse(), sl.BlockRouting()
    sl.attach(pipe, sl.RoutingConfig())
    comparison = Comparison(pipe, Setting(STEPS))
    for config, names in (
        (sl.RoutingConfig(), ["tokens"]),
        (sl.RoutingConfig(sl.TokenRouting(sees_drift=True), reuse=reuse), ["tokens+reuse"]),
        (sl.RoutingConfig(None, blocks), ["blocks", "blocks+reuse"]),
        (sl.RoutingConfig(blocks=blocks), ["tokens+blocks", "tokens+blocks+reuse"]),
        (sl.RoutingConfig(sl.TokenRouting(sees_drift=True), blocks, reuse=reuse), ["tokens+blocks+reuse"]),
    ):
        found = adapter_points(comparison, (prepare(pipe, config), {}), ablations=False, compute=0.7)
        assert [point.method for point in found] == names
        assert all(point.budget == {"compute": 0.7} for point in found)


def test_every_round_times_another_caption_and_all_methods_the_same(comparison: Comparison) -> None:
    seen: list[str] = []
    call = comparison.call
    comparison.call = lambda captions, steps: (seen.extend(captions), call(captions, steps))[1]  # type: ignore[method-assign]
    comparison.time([comparison.dense(), comparison.tokens(0.5)], 2, warmup=1, captions=["a", "b"])
    assert seen == ["a", "a", "b", "b", "a", "a"]


def test_an_adapter_without_routing_is_not_one_of_the_adapters(comparison: Comparison) -> None:
    tuned = prepare(comparison.pipe, sl.RoutingConfig(None, deltas=sl.DeltaConfig(rank=2)))
    with pytest.raises(ShivelightError, match="--finetuned"):
        adapter_points(comparison, (tuned, {}), compute=0.7)


def test_what_cannot_serve_a_budget_without_training_is_left_out_and_said(comparison: Comparison) -> None:
    points, reasons = training_free_points(comparison, compute=0.35)
    # A third of the steps is what 3 steps can run whole; tokens need a step that runs them all, and more.
    assert [point.method for point in points] == ["training-free-blocks"]
    assert len(reasons) == 2 and "training-free-both compute 0.35" in reasons[1]
    assert all("nearest" in reason for reason in reasons)
    points, reasons = training_free_points(comparison, compute=0.9)
    assert [point.method for point in points] == ["training-free", "training-free-blocks", "training-free-both"]
    assert reasons == []


def test_the_plan_of_what_is_attached_is_known_before_anything_was_drawn(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.8, axis="blocks"))
    options = {"max_sequence_length": 16, "height": 32, "width": 32}
    comparison = Comparison(pipe, Setting(STEPS, 3.0, 0, 2, options))
    planned = comparison.planned(comparison.routed_point("training-free-blocks", compute=0.8))
    assert planned == pytest.approx(2 / 3) and routed_of(pipe).budget.value == 0.8


def test_a_row_takes_anothers_clock_and_nothing_else() -> None:
    row = {
        "latency_ms": {"median": 2.0},
        "speedup": 1.0,
        "kid": 0.5,
        "ci95": {"speedup": [1.0, 1.0], "kid": [0.4, 0.6]},
    }
    other = {
        "latency_ms": {"median": 1.0},
        "speedup": 2.0,
        "kid": 0.1,
        "ci95": {"speedup": [1.9, 2.1], "kid": [0.0, 0.2]},
    }
    take_clock(row, other)
    assert row == other | {"kid": 0.5, "ci95": {"speedup": [1.9, 2.1], "kid": [0.4, 0.6]}}
