"""Fewer steps: the peer that costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Where

METHOD = "fewer-steps"


def fewer_steps(where: Where, steps: int) -> OperatingPoint:
    """The dense model with so many steps."""
    if not isinstance(where, BareLoop):
        return where.dense(steps)

    @contextmanager
    def state() -> Iterator[None]:
        before, where.steps = where.steps, steps
        try:
            yield
        finally:
            where.steps = before

    return OperatingPoint(METHOD, {}, steps, state)


def fewer_steps_points(ground: Ground) -> list[OperatingPoint]:
    """Three quarters, half and a quarter of the steps."""
    counts = {round(share * ground.steps) for share in (0.75, 0.5, 0.25)}
    return [fewer_steps(ground.where, steps) for steps in sorted(counts, reverse=True) if 0 < steps < ground.steps]
