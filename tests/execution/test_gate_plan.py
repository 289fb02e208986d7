"""Budgets of block routing: where the thresholds stand, what a generation then costs, and the hard cap."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from gating import gated, watch
from tiny import tiny_inputs, walk

import shivelight as sl
from shivelight.cost import step_flops
from shivelight.execution.gates import Cap
from shivelight.execution.planning import Budget


@pytest.mark.parametrize("reuse", [None, sl.Reuse(margin=0.1, max_reuses=2)])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("compute", [0.8, 0.5])
def test_static_gates_read_no_router_and_their_cost_is_known_before(
    pipe: StableDiffusion3Pipeline, reuse: sl.Reuse | None, tokens: bool, compute: float
) -> None:
    routed = gated(pipe, reuse, tokens, decide="static")
    walk(pipe, tiny_inputs(1), 5)  # the length of the text is known from here on
    routed.read_gates = None
    sl.set_budget(pipe, compute=compute)
    planned = sl.planned_ratio(pipe, 5)
    walk(pipe, tiny_inputs(2), 5)
    assert planned == pytest.approx(routed.spending.ratio, rel=1e-9)
    assert compute - 0.12 < planned <= compute


def test_a_compute_budget_is_met_on_average(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe)
    walk(pipe, tiny_inputs(1), 6)
    for compute in (0.85, 0.7, 0.5):
        sl.set_budget(pipe, compute=compute)
        assert compute - 0.06 < sl.planned_ratio(pipe, 6) <= compute
        walk(pipe, tiny_inputs(4), 6)  # what the records were made of, so nearly the expectation itself
        assert abs(routed.spending.ratio - compute) < 0.2
    sl.set_budget(pipe, compute=1.0)
    assert sl.planned_ratio(pipe, 6) == 1.0


def test_a_hard_cap_is_never_exceeded_by_any_sample_and_late_steps_still_run(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe)
    walk(pipe, tiny_inputs(1), 8)
    with torch.no_grad():  # routers that now say far more than they did when the records were made
        for block in routed.routed:
            routed.gates.router.routers[str(block)].gate_head.bias += 2.0
    steps, samples, compute = 8, 3, 0.6
    seen = watch(routed)
    sl.set_budget(pipe, compute=compute)
    walk(pipe, tiny_inputs(samples, seed=5), steps)
    assert routed.spending.ratio > compute  # on average only, by records that no longer hold
    sl.set_budget(pipe, compute=compute, cap=True)
    walk(pipe, tiny_inputs(samples, seed=5), steps)
    costs = routed.planner.costs
    dense = steps * step_flops(costs, [64] * 4, 7)
    for sample in range(samples):
        spent = steps * costs[0].flops(64, 7) + sum(
            costs[block].flops(64, 7, parts[sample].width)
            for (_, block), parts in seen.items()
            if parts[sample].action == "run"
        )
        assert 0.4 * dense < spent <= compute * dense
        late = [seen[step, block][sample] for step in (6, 7) for block in routed.routed]
        assert any(part.action == "run" for part in late)


def test_the_cap_steers_by_what_is_left() -> None:
    cap = Cap(10.0, [-1.0, 0.0, 1.0], [[4.0, 8.0, 12.0], [2.0, 4.0, 6.0]])
    assert cap.shift(0, 0, 2) == [0.0, 0.0]
    assert cap.spend(0, 0, 1, 2, 7.0)
    assert cap.shift(0, 0, 2) == [0.0, 0.0]  # settled for this step
    assert cap.shift(0, 1, 2) == [1.0, -1.0]
    # Half of the last step's 4 is kept for it.
    assert not cap.spend(0, 1, 1, 2, 3.1) and not cap.spend(0, 0, 1, 2, 1.1)
    assert cap.spend(0, 0, 1, 2, 1.0) and cap.spend(0, 1, 1, 2, 2.0)
    # Another batch in mid-generation: nobody gets more than the dearest had left.
    assert not cap.spend(0, 1, 0, 3, 0.1)
    assert cap.shift(1, 1, 1) == [1.0]  # a pass of its own


def test_budgets_that_an_adapter_cannot_keep_are_refused(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig())
    for options in ({"threshold": 0.5}, {"compute": 0.5, "cap": True}):
        with pytest.raises(sl.BudgetError, match="no block routers"):
            sl.set_budget(pipe, **options)
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    with pytest.raises(sl.BudgetError, match="no statistics.*threshold="):
        sl.set_budget(pipe, compute=0.5)
    with pytest.raises(sl.BudgetError, match="routes no tokens"):
        sl.set_budget(pipe, keep=0.5)
    with pytest.raises(sl.BudgetError, match="cap=True bounds compute"):
        sl.set_budget(pipe, keep=1.0, cap=True)
    with pytest.raises(sl.BudgetError, match="chooses the threshold"):
        sl.set_budget(pipe, compute=0.5, threshold=0.5)
    for threshold in (0.0, 1.0, -1, float("nan"), "half"):
        with pytest.raises(sl.BudgetError, match="probability in"):
            sl.set_budget(pipe, threshold=threshold)
    gated(pipe)
    with pytest.raises(sl.BudgetError, match="compute=0.1 cannot be reached") as caught:
        sl.set_budget(pipe, compute=0.1)
    sl.set_budget(pipe, compute=caught.value.nearest)


def test_an_mlp_that_cannot_be_narrowed_is_planned_and_counted_whole(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, decide="static")
    walk(pipe, tiny_inputs(1), 5)
    sl.set_budget(pipe, compute=0.6)
    free_plan = sl.planned_ratio(pipe, 5)
    for block in pipe.transformer.transformer_blocks[1:]:
        block.ff.net[2].forward = block.ff.net[2].forward  # as a layer-wise hook leaves it
    routed.gates.clear()
    seen = watch(routed)
    planned = sl.planned_ratio(pipe, 5)
    walk(pipe, tiny_inputs(2), 5)
    assert {part.width for parts in seen.values() for part in parts if part.action == "run"} == {1.0}
    assert planned == pytest.approx(routed.spending.ratio, rel=1e-9) and planned <= 0.6
    assert free_plan <= 0.6


def test_the_first_step_of_step_mode_is_in_the_plan(pipe: StableDiffusion3Pipeline) -> None:
    for decide, first in (("step", 1.0), ("block", 0.0)):
        routed = gated(pipe, decide=decide)
        walk(pipe, tiny_inputs(1), 4)
        request = routed.request((900.0, 600.0, 300.0), 64, 7)
        planner = routed.gates.gate_planner(request, Budget("compute", 0.6), routed.schedule(request).keep)
        whole = sum(routed.planner.costs[block].flops(64, 7) for block in routed.routed)
        assert planner.cost_by_step(-60.0).tolist() == [first * whole, 0.0, 0.0]


def test_a_variant_of_the_token_ratios_has_a_plan_of_its_own(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, tokens=True, decide="static")
    with torch.no_grad():
        routed.policy.layer_out.normal_()
    walk(pipe, tiny_inputs(1), 5)
    sl.set_budget(pipe, compute=0.6)
    for variant in ({}, {"ratios": "fixed"}):
        with routed.variant(**variant):
            planned = sl.planned_ratio(pipe, 5)
            walk(pipe, tiny_inputs(2), 5)
            assert routed.spending.ratio == pytest.approx(planned, rel=1e-9) and planned <= 0.6


def test_an_unknown_cost_is_said_to_be_unknown(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    sl.set_budget(pipe, threshold=0.5)
    assert sl.planned_ratio(pipe) is None and "unknown (no statistics" in sl.summary(pipe)


@pytest.mark.parametrize("decide", ["block", "static"])
def test_the_expectation_is_of_records_made_at_that_dial(pipe: StableDiffusion3Pipeline, decide: Any) -> None:
    """Routers that open later blocks once earlier ones close: what they say depends on the dial."""
    routed = gated(pipe, widths=(1.0,), decide=decide)
    times = torch.linspace(0, 1000, 64)
    routed.gates.records.clear()
    for shift, logit in ((-4.0, 6.0), (0.0, 1.0), (4.0, -6.0)):
        records = torch.full((64, 3), logit)
        routed.gates.records.add(times, records, torch.zeros(64, 3, 1), torch.full((64,), shift))
    walk(pipe, tiny_inputs(1), 4)
    request = routed.request(tuple(pipe.scheduler.timesteps[:4].tolist()), 64, 7, Budget("compute", 0.9))
    planner = routed.gates.gate_planner(request, Budget("compute", 0.9), [[64] * 3] * 4)
    whole = float(planner.prices.sum())
    for shift, share in ((-4.0, 1.0), (0.0, 1.0), (4.0, 0.0)):  # far from each other's records
        assert float(planner.cost_by_step(shift).sum()) == pytest.approx(share * whole, rel=2e-3, abs=2e-3 * whole)
    plan = planner.solve(0.5 * whole)
    assert float(planner.cost_by_step(plan.dial.shift).sum()) <= 0.5 * whole


def test_budgets_are_met_however_large_the_logits(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, widths=(1.0,))
    routed.gates.records.clear()
    logits = 500.0 + 50.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    routed.gates.records.add(torch.linspace(0, 1000, 64), logits, torch.zeros(64, 3, 1))
    walk(pipe, tiny_inputs(1), 4)
    for compute in (0.8, 0.5):
        sl.set_budget(pipe, compute=compute)
        assert compute - 0.1 < sl.planned_ratio(pipe, 4) <= compute
