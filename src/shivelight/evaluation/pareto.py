"""The front of quality against latency, and methods compared at equal latency."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One measured setting of a method: its latency and its quality."""

    method: str
    latency_ms: float
    quality: float


def front(points: Iterable[Point], higher_is_better: bool = True) -> list[Point]:
    """The points that no other beats in both latency and quality, fastest first; of equals the first named stays."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency_ms, -sign * p.quality)):
        if not best or sign * point.quality > sign * best[-1].quality:
            best.append(point)
    return best


def quality_at(curve: Sequence[Point], latency_ms: float) -> float | None:
    """A method's quality at a latency, linear between its two nearest settings; None outside what was measured.

    Settings that tie in latency count as their mean.
    """
    by_latency: dict[float, list[float]] = {}
    for point in curve:
        by_latency.setdefault(point.latency_ms, []).append(point.quality)
    known = sorted((latency, sum(q) / len(q)) for latency, q in by_latency.items())
    if latency_ms in by_latency:
        return dict(known)[latency_ms]
    for (left, below), (right, above) in zip(known, known[1:], strict=False):
        if left < latency_ms < right:
            return below + (above - below) * (latency_ms - left) / (right - left)
    return None
