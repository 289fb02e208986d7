"""Budgets of time: the search for the share of FLOPs, and what a plan is predicted to take, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from gating import gated
from hypothesis import given
from hypothesis import strategies as st

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.errors import BudgetError
from shivelight.execution.latency_table import LatencyTable, TimeCurve
from shivelight.execution.planning import Budget
from shivelight.execution.pricing import Load, equivalent, most_compute, predicted_ms
from shivelight.execution.stale import run_steps
from shivelight.execution.stand_ins import StandInMaps, known_values

LOAD = Load(64, 7, 1, "single")
STEPS = tuple(1000.0 - 100 * step for step in range(8))


def linear_table(routed, rest_ms: float = 0.0, never_ms: float = 2.0) -> LatencyTable:  # noqa: ANN001
    """A block on k tokens takes k / 8 ms, whichever it is; on all of them 10."""
    count = len(routed.routed)
    curve = TimeCurve((8, 56), (1.0 * count, 7.0 * count), 10.0 * count, {0.5: (0.5, 0.5)}, 32)
    return LatencyTable(
        64, 2.0337 + 10 * count, never_ms, rest_ms, 0.0, {"all": curve}, (("all", 1 / count),) * count, 0.01
    )


@given(st.floats(0.1, 200), st.floats(0.02, 0.6), st.floats(0.5, 2.0))
def test_the_search_finds_the_most_that_fits(target: float, least: float, power: float) -> None:
    def predict(compute: float) -> float:
        if compute < least:
            raise BudgetError("too little", nearest=least)
        return 100 * compute**power

    found = most_compute(predict, target)
    reachable = math.ceil(least * 10_000) / 10_000
    if target >= 100:
        assert found.compute == 1.0
    elif target < 100 * reachable**power * (1 - 1e-12):
        assert found.compute is None
        assert found.ms == pytest.approx(100 * reachable**power), "the nearest is the least that can be reached"
    elif found.compute is not None:
        assert found.ms == predict(found.compute) <= target
        assert found.ms >= target * (1 - 1e-3) or predict(found.compute + 1e-4) > target


def test_a_search_over_steps_takes_the_one_below() -> None:
    # As whole steps of a generation: 8 of them, each an eighth of the time.
    found = most_compute(lambda compute: math.floor(compute * 8) / 8, 0.7)
    assert found.ms == 5 / 8 and 5 / 8 <= found.compute < 6 / 8


def test_a_budget_that_fails_for_another_reason_says_so() -> None:
    def predict(compute: float) -> float:
        if compute == 1.0:
            return 2.0
        raise BudgetError("no statistics of the routers")

    with pytest.raises(BudgetError, match="no statistics"):
        most_compute(predict, 1.0)


def test_tokens_are_predicted_by_their_schedule(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    table, budget = linear_table(routed), Budget("keep", 0.5)
    request = routed.request(STEPS, 64, 7, budget)
    kept = routed.schedule(request).keep
    expected = sum(2.0 + sum(min(max(k, 8), 56) / 8 for k in row) for row in kept) / len(STEPS)
    assert predicted_ms(routed, table, request, budget) == pytest.approx(expected)


def test_intervals_are_predicted_by_the_steps_that_run(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks", warmup=0.0))
    routed = routed_of(pipe)
    table, budget = linear_table(routed), Budget("compute", 0.5)
    predicted = predicted_ms(routed, table, routed.request(STEPS, 64, 7, budget), budget)
    assert predicted == pytest.approx((4 * 42.0 + 4 * 2.0) / 8)


def test_a_step_in_part_takes_the_time_of_its_tokens(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks", partial=True))
    routed = routed_of(pipe)
    table, budget = linear_table(routed), Budget("compute", 0.56)
    request = routed.request(STEPS, 64, 7, budget)
    tokens = routed.stale.plan(request, budget, routed.schedule(request).keep).tokens
    count = len(routed.routed)
    expected = (4 * (2.0 + 10 * count) + 3 * 2.0 + 2.0 + count * min(max(tokens, 8), 56) / 8) / 8
    assert 8 <= tokens < 56
    assert predicted_ms(routed, table, request, budget) == pytest.approx(expected)


def test_a_step_in_part_takes_the_time_of_its_last_blocks(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks", partial="rear"))
    routed = routed_of(pipe)
    table, budget = linear_table(routed), Budget("compute", 0.56)
    request = routed.request(STEPS, 64, 7, budget)
    rear = routed.stale.plan(request, budget, routed.schedule(request).keep).rests.rear
    count = len(routed.routed)
    assert 0 < rear < count
    assert predicted_ms(routed, table, request, budget) == pytest.approx(
        (4 * (2.0 + 10 * count) + 4 * 2.0 + 10 * rear) / 8
    )


def test_maps_at_rest_take_their_time(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    routed = routed_of(pipe)
    plan = sl.RestPlan(8, tuple(run_steps(4, 8, 100, routed.config.reuse.spacing(8))))
    routed.set_stand_ins(StandInMaps(sl.StandIns(2, (plan,)), 32))
    table, budget = replace(linear_table(routed), map_ms=3.0), Budget("compute", 0.62)
    count = len(routed.routed)
    # A map of K values has K + 1 products; the table has the time of the largest.
    sizes = [known_values(plan, step) + 1 for step in range(8) if step not in plan.runs]
    expected = (4 * (2.0 + 10 * count) + 4 * 2.0 + 3.0 * sum(sizes) / max(sizes)) / 8
    assert predicted_ms(routed, table, routed.request(STEPS, 64, 7, budget), budget) == pytest.approx(expected)
    without = Budget("compute", 0.5)  # which does not pay for them
    assert predicted_ms(routed, table, routed.request(STEPS, 64, 7, without), without) == pytest.approx(
        2.0 + 10 * count / 2
    )


def test_gates_are_predicted_by_their_expected_runs(pipe) -> None:  # noqa: ANN001
    routed = gated(pipe)
    budget = Budget("compute", 0.7)
    request = routed.request(STEPS, 64, 7, budget)
    kept = routed.schedule(request).keep
    plan = routed.gates.plan(request, budget, kept)
    planner = routed.gates.gate_planner(request, budget, kept)
    # Where a block's time is its FLOPs, and nothing is left but that, the expected time is the expected FLOPs.
    flops = {
        b: [routed.planner.costs[b].flops(64, 7, width) for width in routed.gates.config.widths] for b in (1, 2, 3)
    }
    curves = {
        str(b): TimeCurve(
            (),
            (),
            flops[b][-1],
            {w: (1.0, f / flops[b][-1]) for w, f in zip(routed.gates.config.widths, flops[b], strict=True)},
        )
        for b in flops
    }
    table = LatencyTable(64, 1e9, 5.0, 0.0, 0.0, curves, tuple((str(b), 1.0) for b in flops), 0.0)
    expected = 5.0 + float(planner.cost_by_step(plan.dial.shift).sum()) / len(STEPS)
    assert predicted_ms(routed, table, request, budget) == pytest.approx(expected)
    assert expected == pytest.approx(5.0 + plan.cost / len(STEPS))


@pytest.mark.parametrize("asked", [1.2, 1.5, 2.5])
def test_a_speedup_is_met_from_below_in_time(pipe, asked: float) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    table = linear_table(routed)
    budget = equivalent(routed, table, Budget("speedup", asked), STEPS, LOAD)
    took = predicted_ms(routed, table, routed.request(STEPS, 64, 7, budget), budget)
    assert asked <= table.dense_ms / took < asked * 1.03
    ms = 8 * table.dense_ms / asked
    assert equivalent(routed, table, Budget("latency_ms", ms), STEPS, LOAD).value == pytest.approx(
        budget.value, abs=1e-3
    )


def test_what_cannot_be_reached_names_the_nearest_which_can(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    table = linear_table(routed)
    for kind, value in (("speedup", 50.0), ("latency_ms", 1.0)):
        with pytest.raises(BudgetError, match=rf"{kind}={value} cannot be reached.*The nearest is {kind}=") as caught:
            equivalent(routed, table, Budget(kind, value), STEPS, LOAD)
        nearest = caught.value.nearest
        assert nearest is not None and f"{kind}={nearest}" in str(caught.value)
        assert equivalent(routed, table, Budget(kind, nearest), STEPS, LOAD).kind == "compute"


def test_guidance_by_separate_calls_doubles_the_time_of_a_step(pipe) -> None:  # noqa: ANN001
    sl.attach(pipe)
    routed = routed_of(pipe)
    pipe._guidance_scale = 4.0
    table, both = linear_table(routed), Load(64, 7, 1, "cond")
    once = equivalent(routed, table, Budget("latency_ms", 200.0), STEPS, LOAD)
    assert equivalent(routed, table, Budget("latency_ms", 400.0), STEPS, both).value == pytest.approx(
        once.value, abs=1e-3
    )
