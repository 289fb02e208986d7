"""The latency table: curves between knots, sums of parts, a file that reads back, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shivelight.execution.latency_table import LatencyTable, TimeCurve, rising

times = st.floats(0.01, 100, allow_nan=False)
knots = st.dictionaries(st.integers(1, 255), times, min_size=1, max_size=8).map(lambda found: sorted(found.items()))


def table(**changes: Any) -> LatencyTable:
    values: dict[str, Any] = {
        "tokens": 64,
        "dense_ms": 50.0,
        "never_ms": 10.0,
        "rest_ms": 0.5,
        "router_ms": 1.0,
        "curves": {
            "double": TimeCurve((16, 48), (8.0, 16.0), 24.0, {0.5: (0.75, 0.5)}, 32),
            "single": TimeCurve((), (), 12.0),
        },
        "places": (("double", 0.25), ("double", 0.75), ("single", 1.0)),
        "spread": 0.02,
    }
    return LatencyTable(**(values | changes))


@given(st.lists(times, max_size=12))
def test_what_rises_has_the_same_sum_and_what_rose_before_stays(values: list[float]) -> None:
    risen = rising(values)
    assert all(low <= high for low, high in zip(risen, risen[1:], strict=False))
    assert math.fsum(risen) == pytest.approx(math.fsum(values))
    assert rising(sorted(values)) == pytest.approx(tuple(sorted(values)))


@given(knots, st.floats(0.01, 100))
def test_a_curve_never_falls_and_is_exact_at_its_knots(found: list[tuple[int, float]], whole: float) -> None:
    counts, ms = tuple(count for count, _ in found), rising([time for _, time in found])
    curve = TimeCurve(counts, ms, whole)
    assert all(curve.at(count, 256) == time for count, time in zip(counts, ms, strict=True))
    values = [curve.at(count, 256) for count in range(1, 256)]
    assert all(low <= high + 1e-9 for low, high in zip(values, values[1:], strict=False))
    assert curve.at(256, 256) == whole


def test_between_knots_a_curve_is_linear_and_narrow_blocks_take_their_share() -> None:
    curve = table().curves["double"]
    assert curve.at(24, 64) == 10.0 and curve.at(8, 64) == 8.0 and curve.at(60, 64) == 16.0
    assert curve.at(64, 64, 0.5) == 12.0
    assert curve.at(32, 64, 0.5) == 12.0 * 0.75
    assert curve.at(48, 64, 0.5) == 16.0 * (0.75 + 0.5) / 2
    assert curve.at(48, 64, 0.25) == 16.0, "a width that was not measured runs whole"


def test_a_pass_is_the_sum_of_its_parts() -> None:
    assert table().pass_ms([64, 64, 64]) == 10.0 + 24.0 + 12.0
    assert table().pass_ms([24, 0, 0]) == 10.0 + 0.25 * 10.0 + 2 * 0.5


def test_a_table_reads_back_from_json_and_shows_its_figures() -> None:
    assert LatencyTable.from_dict(json.loads(json.dumps(table().to_dict()))) == table()
    said = str(table())
    for figure in ("50.000", "10.000", "24.000  on all tokens", "2 x double", "8.000  on 16 tokens", "MLP width 0.5"):
        assert figure in said


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_ms": math.nan},
        {"dense_ms": 0.0},
        {"never_ms": -1.0},
        {"places": [["triple", 1.0]]},
        {"curves": []},
        {"tokens": None},
    ],
)
def test_what_is_no_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.from_dict(table().to_dict() | changes)
