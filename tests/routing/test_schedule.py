import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.errors import AdapterError, BudgetError
from shivelight.routing.schedule import Schedule, schedule_from_logits, schedule_within_cost, uniform_schedule


def draw_logits(steps: int, blocks: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    return spread * torch.randn(steps, blocks, generator=torch.Generator().manual_seed(seed))


def transformer_cost(block: int, kept: int) -> float:
    return float((1 + block % 3) * kept * 1000 + kept * kept)  # linear layers and quadratic attention


def total_cost(schedule: Schedule) -> float:
    return math.fsum(transformer_cost(block, kept) for row in schedule.keep for block, kept in enumerate(row))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 300), st.integers(1, 1000), st.integers(0, 99),
    st.sampled_from([0.0, 1.0, 30.0]),
)  # fmt: skip
def test_the_total_is_exact_for_any_policy(
    steps: int, blocks: int, tokens: int, thousandths: int, seed: int, spread: float
) -> None:
    entries = steps * blocks
    exact = math.floor(Fraction(thousandths, 1000) * tokens * entries)
    logits = draw_logits(steps, blocks, seed, spread)
    if exact < entries:
        with pytest.raises(BudgetError, match="nearest") as caught:
            schedule_from_logits(logits, tokens, thousandths / 1000)
        assert caught.value.nearest is not None
        assert schedule_from_logits(logits, tokens, caught.value.nearest).total == entries
        return
    schedule = schedule_from_logits(logits, tokens, thousandths / 1000)
    assert (schedule.steps, schedule.blocks, schedule.total) == (steps, blocks, exact)
    assert schedule.mean_keep <= thousandths / 1000 * (1 + 1e-9)


def test_a_schedule_has_the_policys_shape() -> None:
    logits = draw_logits(10, 6, seed=0)
    schedule = schedule_from_logits(logits, 256, 0.6)
    kept = torch.tensor(schedule.keep, dtype=torch.float64).flatten()
    order = logits.flatten().argsort()
    assert bool((kept[order].diff() >= 0).all())
    # Every count is within one token of N sigmoid(logit + anchor) for one anchor.
    inside = (kept > 2) & (kept < 254)
    low = torch.logit((kept[inside] - 1) / 256) - logits.flatten()[inside]
    high = torch.logit((kept[inside] + 1) / 256) - logits.flatten()[inside]
    assert low.max() < high.min()


@pytest.mark.parametrize("keep", [0.6, 0.613, 0.5, 0.999, 1.0])
def test_flat_logits_give_the_uniform_schedule(keep: float) -> None:
    uniform = uniform_schedule(25, 7, 256, keep)
    assert schedule_from_logits(torch.full((25, 7), 0.3), 256, keep) == uniform
    kept = torch.tensor(uniform.keep)
    assert kept.max() - kept.min() <= 1
    assert uniform.total == math.floor(Fraction(str(keep)) * 256 * 175)
    # Leftovers are spread out, over steps and over blocks.
    steps_mean, blocks_mean = kept.double().mean(1), kept.double().mean(0)
    assert steps_mean.max() - steps_mean.min() < 0.45 and blocks_mean.max() - blocks_mean.min() < 0.2


def test_remainders_that_differ_by_rounding_only_are_spread_out_too() -> None:
    logits = 0.3 + 1e-14 * torch.randn(25, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert schedule_from_logits(logits, 256, 0.613) == uniform_schedule(25, 7, 256, 0.613)


def test_keep_one_keeps_all() -> None:
    assert set(sum(schedule_from_logits(draw_logits(3, 4, 0), 100, 1.0).keep, ())) == {100}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 64), st.floats(0.001, 1.1), st.integers(0, 99))
def test_a_cost_budget_is_kept_and_used_up(steps: int, blocks: int, tokens: int, share: float, seed: int) -> None:
    def everywhere(kept: int) -> float:
        return steps * math.fsum(transformer_cost(block, kept) for block in range(blocks))

    budget = share * everywhere(tokens)
    logits = draw_logits(steps, blocks, seed)
    if everywhere(1) > budget:
        with pytest.raises(BudgetError, match="cannot be reached") as caught:
            schedule_within_cost(logits, tokens, transformer_cost, budget)
        assert caught.value.nearest == everywhere(1)
        return
    schedule = schedule_within_cost(logits, tokens, transformer_cost, budget)
    spent = total_cost(schedule)
    assert spent <= budget
    for row in schedule.keep:
        for block, kept in enumerate(row):
            one_more = transformer_cost(block, min(kept + 1, tokens)) - transformer_cost(block, kept)
            assert kept == tokens or spent + one_more > budget


def test_a_cheap_block_takes_what_a_dear_one_cannot() -> None:
    # 999 units are left when one more token of block 1 no longer fits: block 0 takes 30 of them, one round each.
    schedule = schedule_within_cost(torch.zeros(1, 2), 64, lambda block, kept: kept * (1, 1000)[block], 20_999.0)
    assert schedule.keep == ((64, 20),)


def test_a_larger_cost_budget_buys_more_everywhere() -> None:
    logits = draw_logits(8, 5, seed=2)
    dense = 8 * sum(transformer_cost(block, 128) for block in range(5))
    counts = [
        torch.tensor(schedule_within_cost(logits, 128, transformer_cost, share * dense).keep)
        for share in (0.3, 0.5, 0.7, 1.0)
    ]
    assert all(bool((more > fewer).all()) for fewer, more in zip(counts, counts[1:], strict=False))
    assert bool((counts[-1] == 128).all())


def test_a_schedule_survives_json() -> None:
    schedule = schedule_from_logits(draw_logits(3, 4, 0), 64, 0.55)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.row(1) == schedule.keep[1]


@pytest.mark.parametrize("data", [{}, {"tokens": 4}, {"tokens": 4, "keep": [["x"]]}, {"tokens": 4, "keep": 3}])
def test_a_broken_stored_schedule_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match="stored schedule"):
        Schedule.from_dict(data)


@pytest.mark.parametrize("keep", [(), ((),), ((1, 2), (1,)), ((0, 2),), ((1, 9),)])
def test_a_malformed_schedule_is_refused(keep: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(BudgetError):
        Schedule(keep, tokens=8)


def test_bad_budgets_and_logits_are_refused() -> None:
    for keep in (0.0, -1.0, 1.2, math.nan):
        with pytest.raises(BudgetError, match=str(keep)):
            uniform_schedule(2, 2, 16, keep)
    with pytest.raises(AdapterError, match="NaN"):
        schedule_from_logits(torch.tensor([[0.0, math.nan]]), 16, 0.5)
    with pytest.raises(BudgetError, match="steps, blocks"):
        schedule_from_logits(torch.zeros(4), 16, 0.5)
    with pytest.raises(BudgetError, match="cannot be reached"):
        schedule_within_cost(torch.zeros(1, 1), 16, transformer_cost, math.nan)


def test_a_schedule_prints_its_size_and_at_most_a_dozen_rows() -> None:
    lines = str(uniform_schedule(50, 7, 256, 0.6)).splitlines()
    assert lines[0] == "50 steps x 7 blocks, 256 tokens, mean keep 0.6000"
    assert len(lines) == 13 and lines[-1].startswith("  step  49:")
