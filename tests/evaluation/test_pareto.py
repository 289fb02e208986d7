import pytest
from hypothesis import given
from hypothesis import strategies as st

from shivelight.evaluation.pareto import Point, front, quality_at

points = st.lists(
    st.builds(Point, st.just("m"), st.integers(1, 9).map(float), st.integers(0, 9).map(float)), min_size=1, max_size=12
)


@given(points, st.booleans())
def test_the_front_is_exactly_what_nothing_beats(cloud, higher):
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(
            q.latency_ms <= p.latency_ms
            and sign * q.quality >= sign * p.quality
            and (q.latency_ms, q.quality) != (p.latency_ms, p.quality)
            for q in cloud
        )

    expected = {(p.latency_ms, p.quality) for p in cloud if not beaten(p)}
    best = front(cloud, higher_is_better=higher)
    assert {(p.latency_ms, p.quality) for p in best} == expected
    assert len(best) == len(expected)
    assert [p.latency_ms for p in best] == sorted(p.latency_ms for p in best)


def test_quality_is_linear_between_settings_and_unknown_outside():
    curve = [Point("fewer-steps", 30.0, 28.0), Point("fewer-steps", 10.0, 20.0), Point("fewer-steps", 20.0, 26.0)]
    assert quality_at(curve, 10.0) == 20.0
    assert quality_at(curve, 15.0) == pytest.approx(23.0)
    assert quality_at(curve, 27.5) == pytest.approx(27.5)
    assert quality_at(curve, 9.9) is None
    assert quality_at(curve, 30.1) is None
    assert quality_at([], 10.0) is None


def test_equal_latencies_count_as_their_mean():
    curve = [Point("a", 10.0, 20.0), Point("a", 10.0, 22.0), Point("a", 20.0, 31.0)]
    assert quality_at(curve, 10.0) == 21.0
    assert quality_at(curve, 15.0) == 26.0
