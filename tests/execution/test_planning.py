import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight import BudgetError
from shivelight.cost import BlockCost, step_flops
from shivelight.execution.planning import Budget, Planner, Request
from shivelight.routing import RatioPolicy, uniform_schedule

COSTS = [
    BlockCost(120, 60, 30, 8, 8),
    BlockCost(120, 60, 30, 8, 8),
    BlockCost(90, 60, 30, 8, 0),
    BlockCost(90, 10, 30, 8, 0),
]
TOKENS, TEXT = 64, 5


def shaped_policy(seed: int = 0, spread: float = 1.0) -> RatioPolicy:
    generator = torch.Generator().manual_seed(seed)
    policy = RatioPolicy(3, target=0.7, hidden=16)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return policy


def steps(count: int) -> tuple[float, ...]:
    return tuple(torch.linspace(1000, 20, count).tolist())


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan, math.inf, None, "half", True + 1])
def test_a_budget_outside_0_to_1_is_refused(value: object) -> None:
    with pytest.raises(BudgetError, match="keep is .*give a number in"):
        Budget("keep", value)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.floats(0.02, 1.0), st.integers(0, 50), st.floats(0, 3))
def test_a_keep_budget_is_met_from_below_within_one_token(count: int, keep: float, seed: int, spread: float) -> None:
    schedule = Planner(COSTS, (1, 2, 3)).schedule(
        shaped_policy(seed, spread), Request(Budget("keep", keep), steps(count), TOKENS, TEXT)
    )
    entries = TOKENS * count * 3
    assert keep * entries - 1 < schedule.total <= keep * entries * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.floats(0.1, 1.0), st.integers(0, 50))
def test_coarse_counts_meet_a_keep_budget_from_below_within_one_unit(count: int, keep: float, seed: int) -> None:
    planner = Planner(COSTS, (1, 2, 3), granularity=8)
    schedule = planner.schedule(shaped_policy(seed), Request(Budget("keep", keep), steps(count), 256, TEXT))
    assert all(k % 8 == 0 and 8 <= k <= 256 for row in schedule.keep for k in row)
    assert keep * 256 * 3 * count - 8 < schedule.total <= keep * 256 * 3 * count * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.floats(0.4, 1.0), st.integers(0, 50))
def test_coarse_counts_meet_a_compute_budget_from_below_within_one_unit(count: int, share: float, seed: int) -> None:
    planner = Planner(COSTS, (1, 2, 3), granularity=8)
    schedule = planner.schedule(shaped_policy(seed), Request(Budget("compute", share), steps(count), 256, TEXT))
    assert all(k % 8 == 0 and 8 <= k <= 256 for row in schedule.keep for k in row)
    dense = step_flops(COSTS, [256] * 4, TEXT) * count
    spent = sum(step_flops(COSTS, (256, *row), TEXT) for row in schedule.keep)
    dearest = max(COSTS[i].flops(256, TEXT) - COSTS[i].flops(248, TEXT) for i in (1, 2, 3))
    assert share * dense - dearest < spent <= share * dense * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.floats(0.35, 1.0), st.integers(0, 50), st.floats(0, 3))
def test_a_compute_budget_is_met_from_below_within_one_token(
    count: int, share: float, seed: int, spread: float
) -> None:
    planner = Planner(COSTS, (1, 2, 3))
    request = Request(Budget("compute", share), steps(count), TOKENS, TEXT)
    schedule = planner.schedule(shaped_policy(seed, spread), request)
    dense = step_flops(COSTS, [TOKENS] * 4, TEXT) * count
    spent = sum(step_flops(COSTS, (TOKENS, *row), TEXT) for row in schedule.keep)
    assert spent <= share * dense
    assert planner.planned_ratio(schedule, request) == spent / dense
    for row in schedule.keep:
        for cost, kept in zip(COSTS[1:], row, strict=True):
            assert kept == TOKENS or spent + cost.flops(kept + 1, TEXT) - cost.flops(kept, TEXT) > share * dense


@pytest.mark.parametrize("text", [0, 5, 333])
def test_an_unreachable_compute_budget_names_the_nearest_and_that_one_is_reachable(text: int) -> None:
    planner = Planner(COSTS, (1, 2, 3))
    with pytest.raises(BudgetError, match="never routed") as caught:
        planner.schedule(None, Request(Budget("compute", 0.01), steps(3), TOKENS, text))
    nearest = caught.value.nearest
    assert nearest is not None and str(nearest) in str(caught.value)
    request = Request(Budget("compute", nearest), steps(3), TOKENS, text)
    assert planner.planned_ratio(planner.schedule(None, request), request) <= nearest
    with pytest.raises(BudgetError):
        planner.schedule(None, Request(Budget("compute", nearest - 2e-4), steps(3), TOKENS, text))


def test_the_policy_gives_the_shape_and_none_means_flat() -> None:
    planner, policy = Planner(COSTS, (1, 2, 3)), shaped_policy()
    shaped = planner.schedule(policy, Request(Budget("keep", 0.5), steps(6), TOKENS, TEXT))
    order = policy(torch.tensor(steps(6))).flatten().argsort()
    assert bool((torch.tensor(shaped.keep).flatten()[order].diff() >= -1).all()) and len({*sum(shaped.keep, ())}) > 3
    assert planner.schedule(None, Request(Budget("keep", 0.5), steps(6), TOKENS, TEXT)) == uniform_schedule(
        6, 3, TOKENS, 0.5
    )


def test_keep_one_runs_everything_whatever_the_policy_holds() -> None:
    for kind in ("keep", "compute"):
        schedule = Planner(COSTS, (1, 2, 3)).schedule(
            shaped_policy(), Request(Budget(kind, 1.0), steps(3), TOKENS, TEXT)
        )
        assert set(sum(schedule.keep, ())) == {TOKENS}


def test_a_solved_schedule_is_kept_until_the_policy_changes() -> None:
    planner, policy = Planner(COSTS, (1, 2, 3)), shaped_policy()
    first = planner.schedule(policy, Request(Budget("keep", 0.5), steps(4), TOKENS, TEXT))
    assert planner.schedule(policy, Request(Budget("keep", 0.5), steps(4), TOKENS, TEXT)) is first
    others = [
        (Budget("keep", 0.4), steps(4), TOKENS),
        (Budget("keep", 0.5), steps(5), TOKENS),
        (Budget("keep", 0.5), steps(4), 32),
    ]
    assert all(planner.schedule(policy, Request(*other, TEXT)) != first for other in others)
    with torch.no_grad():
        policy.layer_out.mul_(-2)
    planner.forget()
    assert planner.schedule(policy, Request(Budget("keep", 0.5), steps(4), TOKENS, TEXT)) != first
