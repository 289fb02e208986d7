"""Measuring on a real backbone: what is told is what runs, nothing is left behind, and budgets of time use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from gating import gated

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.calibration import measure_table
from shivelight.calibration.rehearsal import Rehearsed, Standing, rehearsal
from shivelight.errors import BudgetError
from shivelight.execution.gates import Decision
from shivelight.execution.latency_table import LatencyTable, TimeCurve
from shivelight.execution.pricing import Load
from shivelight.execution.reuse import OfBlock

LOAD = Load(64, 7, 2, "both")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIVELIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Known:
    """A stopwatch that knows its table."""

    def __init__(self, routed: Any) -> None:
        count, self.asked = len(routed.routed), []
        curve = TimeCurve((2, 62), (0.3 * count, 9.3 * count), 10.0 * count)
        self.table = LatencyTable(64, 12.0 * count, 1.0, 0.0, 0.0, {"a": curve}, (("a", 1 / count),) * count, 0.0)

    def __call__(self, load: Load, measure: bool) -> LatencyTable:
        self.asked.append((load, measure))
        return self.table


@torch.no_grad()
def test_told_passes_run_what_they_are_told(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig(blocks=sl.BlockRouting(router="age", widths=(1.0,)), reuse=sl.Reuse()))
    routed = routed_of(pipe)
    clock, seen = Standing(LOAD, bare=False), {}
    with rehearsal(routed, clock):
        passes = Rehearsed(pipe.transformer, routed, LOAD, clock)
        x, _ = passes.fill()
        assert x.shape == (2, 64, 32)
        told = {1: Decision("run", 20), 2: Decision("reuse", 0), 3: Decision("skip", 0)}
        decide = routed.decide
        routed.decide = lambda block, *rest: seen.setdefault(block, decide(block, *rest))
        passes(told.__getitem__)
        del routed.decide
        assert seen == {block: (decision,) for block, decision in told.items()}
        passes(None)
        assert not routed.enabled
    assert routed.enabled and routed.forced is None and not routed.shape_seen and routed.budget.everything
    assert routed.residuals.megabytes == 0.0 and routed.context.generation == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_timed_through_its_own_example(name: str) -> None:
    pipe = build(name)
    no_tokens = bool(FAMILIES[name].tokens and sl.backbones.find_spec(pipe.transformer).no_tokens)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7, axis="blocks") if no_tokens else sl.RoutingConfig())
    routed = routed_of(pipe)
    text = 0 if name == "dit" else 5
    table = measure_table(pipe.transformer, routed, Load(16, text, 2, "single"), seconds=0)
    assert len(table.places) == len(routed.routed)
    for kind in table.curves:
        assert sum(share for own, share in table.places if own == kind) == pytest.approx(1.0)
    assert no_tokens or all(curve.counts[-1] < 16 for curve in table.curves.values())
    assert table.dense_ms > 0


def test_widths_and_rest_are_timed_where_there_are_any(pipe) -> None:  # noqa: ANN001
    routed = gated(pipe, reuse=sl.Reuse(), tokens=True)
    said: list[str] = []
    table = measure_table(pipe.transformer, routed, LOAD, seconds=0, progress=said.append)
    assert {"dense", "never", "rest", "routers", "transformer_blocks 64 1", "transformer_blocks 48 0.25"} <= set(said)
    (curve,) = table.curves.values()
    assert set(curve.narrow) == {0.25, 0.5, 0.75} and curve.half == 48
    assert table.router_ms > 0


def test_a_map_at_rest_is_timed(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    assert measure_table(pipe.transformer, routed_of(pipe), LOAD, seconds=0).map_ms == 0
    sl.fit_stand_ins(pipe, ["a", "b"], steps=4, computes=(0.5,), rank=4, guidance=1.0, max_sequence_length=16)
    said: list[str] = []
    table = measure_table(pipe.transformer, routed_of(pipe), LOAD, seconds=0, progress=said.append)
    assert "map" in said and table.map_ms > 0 and "the map at rest" in str(table)
    assert LatencyTable.from_dict(table.to_dict()) == table


def test_some_tokens_of_a_step_at_rest_are_timed(pipe, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks", partial=True))
    routed, known = routed_of(pipe), set()
    completes = OfBlock.completes
    monkeypatch.setattr(
        OfBlock, "completes", lambda self, names: known.add(completes(self, names)) or completes(self, names)
    )
    said: list[str] = []
    table = measure_table(pipe.transformer, routed, LOAD, seconds=0, progress=said.append)
    assert {"dense", "never", "all 2 1", "all 32 1", "all 64 1"} <= set(said) and "routers" not in said
    assert table.curves["all"].counts[-1] == 62 and routed.config.granularity == 8
    assert known == {False, True}  # the tokens that run attend to the others, once these are known


def test_what_cannot_leave_anything_out_is_refused(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig(None, deltas=sl.DeltaConfig()))
    with pytest.raises(BudgetError, match="no routing"):
        sl.calibrate(pipe)
    with pytest.raises(BudgetError, match="always runs everything"):
        sl.set_budget(pipe, speedup=1.5)


@pytest.mark.parametrize(("kind", "value"), [("speedup", 0.9), ("speedup", "x"), ("latency_ms", 0), ("latency_ms", -1)])
def test_times_that_are_none_are_refused(pipe, kind: str, value: Any) -> None:  # noqa: ANN001
    sl.attach(pipe)
    with pytest.raises(BudgetError, match=f"{kind} is "):
        sl.set_budget(pipe, **{kind: value})


def test_one_budget_at_a_time(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe)
    with pytest.raises(BudgetError, match="exactly one"):
        sl.set_budget(pipe, speedup=1.5, compute=0.5)
    with pytest.raises(BudgetError, match="cap=True"):
        sl.set_budget(pipe, speedup=1.5, cap=True)


def test_a_speedup_is_settled_when_a_generation_begins(pipe, sample) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    sl.set_budget(pipe, speedup=1.5)
    routed.settling.stopwatch = known = Known(routed)
    assert "known once a picture was made" in sl.summary(pipe) and sl.planned_ratio(pipe) is None
    with pytest.raises(BudgetError, match="known once a picture was made"):
        sl.current_schedule(pipe)
    first = sample(pipe, ["a"])
    settled = routed.settling.settlement[1]
    assert settled.kind == "compute" and 0.5 < settled.value < 0.95
    assert known.asked[0] == (Load(64, 32, 2, "both"), True) and len(known.asked) == 1, "once a generation"
    spent = routed.spending.ratio
    assert spent <= settled.value
    assert f"speedup = 1.5 (compute = {settled.value})" in sl.summary(pipe)
    sl.set_budget(pipe, compute=settled.value)
    assert torch.equal(sample(pipe, ["a"]), first) and routed.spending.ratio == spent
    # More steps take more time: the same milliseconds buy fewer FLOPs.
    ms = 4 * known.table.dense_ms / 1.5
    sl.set_budget(pipe, latency_ms=ms)
    sample(pipe, ["a"])
    assert routed.spending.ratio == pytest.approx(spent, abs=0.01)
    sample(pipe, ["a"], steps=6)
    assert routed.spending.ratio < 0.9 * spent


def test_a_time_out_of_reach_is_said_when_the_generation_begins(pipe, sample) -> None:  # noqa: ANN001
    sl.attach(pipe)
    sl.set_budget(pipe, speedup=500)
    routed_of(pipe).settling.stopwatch = Known(routed_of(pipe))
    with pytest.raises(BudgetError, match="speedup=500 cannot be reached.*The nearest is") as caught:
        sample(pipe, ["a"])
    sl.set_budget(pipe, speedup=caught.value.nearest)
    assert torch.isfinite(sample(pipe, ["a"])).all()


def test_measuring_is_no_part_of_what_a_generation_spent(pipe, sample) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7, axis="blocks"))
    sample(pipe, ["a"])
    routed = routed_of(pipe)
    spent, flops, acted = routed.spending, routed.spending.flops, dict(routed.spending.actions)
    measure_table(pipe.transformer, routed, Load(64, 32, 2, "both"), 0.01)
    assert routed.spending is spent and (spent.flops, spent.actions) == (flops, acted)


@pytest.mark.parametrize("axis", ["tokens", "blocks", "both"])
def test_measured_on_the_spot_the_picture_is_that_of_its_budget(pipe, sample, axis, folder: Path) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7, axis=axis))
    sl.set_budget(pipe, speedup=1.01)
    routed = routed_of(pipe)
    try:
        first = sample(pipe, ["a"], steps=6)
    except BudgetError as error:  # so small a model may not gain at all
        assert "The nearest is" in str(error)
        return
    assert len(list(folder.rglob("*.json"))) == 1
    sl.set_budget(pipe, compute=routed.settling.settlement[1].value)
    spent = routed.spending.ratio
    assert torch.equal(sample(pipe, ["a"], steps=6), first), "measuring leaves no trace in the generation"
    assert routed.spending.ratio == spent


def test_a_bare_transformer_has_a_budget_of_its_passes(pipe) -> None:  # noqa: ANN001
    from tiny import tiny_inputs

    sl.attach(pipe.transformer)
    routed = routed_of(pipe.transformer)
    sl.set_budget(pipe.transformer, latency_ms=20.0)
    routed.settling.stopwatch = Known(routed)
    with torch.no_grad():
        pipe.transformer(**tiny_inputs(2, 500.0))
    assert routed.in_force.kind == "compute" and routed.in_force.value < 0.8


def test_speedup_1_runs_everything_without_a_table(pipe, sample) -> None:  # noqa: ANN001
    dense = sample(pipe, ["a"])
    sl.attach(pipe)
    sl.set_budget(pipe, speedup=1.0)
    assert torch.equal(sample(pipe, ["a"]), dense)
    assert routed_of(pipe).settling.load is not None and sl.planned_ratio(pipe) == 1.0


def test_calibrate_measures_the_shape_it_is_asked_for(pipe, folder: Path) -> None:  # noqa: ANN001
    sl.attach(pipe)
    table = sl.calibrate(pipe, tokens=16, text_tokens=4, samples=1, guided=False, seconds=0)
    assert table.tokens == 16 and "16 image tokens" in str(table)
    assert sl.calibrate(pipe, tokens=16, text_tokens=4, samples=1, guided=False) == table, "kept"
    assert len(list(folder.rglob("*.json"))) == 1
