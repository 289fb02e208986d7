"""Values that are computed now and then: forecasts in closed form, and against a row-by-row simulation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.execution.series import NEVER, Series


def test_what_changes_evenly_is_forecast_exactly_as_the_horizon_grows() -> None:
    start, slope = torch.randn(2, 1, 3, 4, dtype=torch.float64).unbind()
    series = Series(start, horizon=1e9)
    for step in (2, 5):
        series.update(start + slope * step, step)
    for step in (5, 6, 8):
        torch.testing.assert_close(series.expected(step), start + slope * step)
    # No further than one interval ahead.
    torch.testing.assert_close(series.expected(20), start + slope * 8)


@pytest.mark.parametrize(("interval", "share"), [(1, 0.8), (2, 0.6), (4, 0.2), (5, 0.0), (9, 0.0)])
def test_the_further_runs_lie_apart_the_less_is_forecast(interval: int, share: float) -> None:
    first, second = torch.randn(2, 1, 2, 3).unbind()
    series = Series(first, horizon=5.0)
    series.update(first, 1)
    assert torch.equal(series.expected(3), first)  # once alone has not changed yet
    series.update(second, 1 + interval)
    torch.testing.assert_close(series.expected(1 + 2 * interval), second + share * (second - first))


def test_without_a_horizon_it_stays_as_it_was_and_takes_half_the_memory() -> None:
    x = torch.randn(2, 3, 4)
    plain, forecast = Series(x), Series(x, 5.0)
    plain.update(x, 0)
    plain.update(2 * x, 1)
    assert torch.equal(plain.expected(2), 2 * x) and plain.before is None
    assert forecast.bytes == 2 * plain.bytes == 2 * (2 * 3 * 4 * 4 + 2 * 3 * 4)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000), st.floats(1.0, 12.0), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1)
)
def test_rows_follow_a_row_by_row_simulation(seed: int, horizon: float, runs: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, rows = 2, 5
    series, step = Series(torch.zeros(batch, rows, 2), horizon), 0
    seen: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = {}
    for k, wait in runs:
        step += wait
        indices = None if k == rows else torch.rand(batch, rows, generator=generator).argsort(1)[:, :k].sort(1).values
        value = torch.randn(batch, k, 2, generator=generator)
        series.update(value, step, indices)
        for sample in range(batch):
            for place, row in enumerate(range(rows) if indices is None else indices[sample].tolist()):
                seen.setdefault((sample, row), []).append((step, value[sample, place].clone()))
    part = series.take(torch.tensor([1]))
    for now in (step, step + 1, step + 4):
        expected = series.expected(now)
        torch.testing.assert_close(part.expected(now), expected[1:])
        for sample in range(batch):
            for row in range(rows):
                history = seen.get((sample, row), [])
                if len(history) < 2:
                    wanted = history[0][1] if history else torch.zeros(2)
                else:
                    (before, old), (at, last) = history[-2:]
                    interval = at - before
                    share = max(0.0, 1 - interval / horizon) * min(1.0, (now - at) / interval)
                    wanted = last + share * (last - old)
                torch.testing.assert_close(expected[sample, row], wanted, atol=1e-5, rtol=1e-4)


def test_what_was_taken_out_is_put_back() -> None:
    series = Series(torch.zeros(3, 2, 2), 4.0)
    samples = torch.tensor([2, 0])
    part = series.take(samples)
    part.update(torch.ones(2, 2, 2), 1)
    part.update(torch.full((2, 2, 2), 2.0), 2)
    assert series.last.abs().sum() == 0 and (series.at == NEVER).all()  # copies
    series.put(samples, part)
    assert series.at.tolist() == [[2, 2], [NEVER, NEVER], [2, 2]]
    assert series.stale(3, 1).tolist() == [[False, False], [True, True], [False, False]]
    assert series.expected(3)[0, 0, 0] == 2.75 and series.expected(3)[1].abs().sum() == 0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000), st.floats(1.0, 12.0), st.lists(st.integers(1, 4), max_size=4), st.booleans(), st.booleans()
)
def test_rows_that_agree_are_told_what_each_would_be(
    seed: int, horizon: float, waits: list[int], half: bool, apart: bool
) -> None:
    """One number for all rows says what their own numbers say, after any run of some of them."""
    generator = torch.Generator().manual_seed(seed)
    series, step = Series(torch.zeros(2, 4, 3), horizon), 0

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if half:
        series.update(draw(2, 2, 3), step, torch.tensor([[0, 2], [1, 3]]))
    if apart:
        part = series.take(torch.tensor([1]))
        part.update(draw(1, 4, 3), step)
        series.put(torch.tensor([1]), part)
    for wait in waits:
        step += wait
        series.update(draw(2, 4, 3), step)
    own = series.take(torch.tensor([0, 1]))
    own._when = None, None
    for now in (step, step + 1, step + 5):
        torch.testing.assert_close(series.expected(now), own.expected(now), atol=1e-5, rtol=1e-5)
        for most in (0, 3):
            told, each = series.stale(now, most), own.stale(now, most)
            assert isinstance(each, torch.Tensor)
            assert bool((each == told).all()), (told, each)
    assert isinstance(series.stale(step, 1), bool) == (bool(waits) or not (half or apart))


def test_a_forecast_of_rows_that_agree_is_one_operation() -> None:
    series = Series(torch.zeros(2, 4, 3), 8.0)
    for step in (0, 2):
        series.update(torch.randn(2, 4, 3), step)
    with torch.profiler.profile() as profile:
        series.expected(3)
    assert [event.key for event in profile.key_averages()] == ["aten::lerp"]


def test_a_series_may_remember_without_a_forecast() -> None:
    x = torch.ones(2, 3, 4)
    series = Series(x, remembers=True)
    assert series.values() == []
    series.update(x, 0)
    assert [value is x for value in series.values()] == [True]
    series.update(2 * x, 3)
    assert torch.equal(series.expected(4), 2 * x)
    assert torch.equal(series.values()[0], 2 * x) and torch.equal(series.values()[1], x)
    assert series.take(torch.tensor([1])).values()[1].shape == (1, 3, 4)
