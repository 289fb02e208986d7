"""The latency table of a backbone: measured milliseconds of its blocks, and what a pass is predicted to take. Pure functions.

A pass is taken to be the sum of its parts: what is never routed, and each routed block by itself. Figures of a kind of block
come from passes in which all of them do the same, through the hooks, so that routers, gather and write-back are in them.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing sequence nearest to this one (least squares): neighbours in the wrong order get their mean.

    >>> rising([1.0, 3.0, 2.0, 4.0])
    (1.0, 2.5, 2.5, 4.0)
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (low, few), (high, more) = pools[-2:]
            pools[-2:] = [((low * few + high * more) / (few + more), few + more)]
    return tuple(mean for mean, count in pools for _ in range(count))


@dataclass(frozen=True)
class TimeCurve:
    """Milliseconds that the routed blocks of one kind add to a pass, all of them together, if they run on so many tokens.

    Attributes:
        counts: image tokens at which it was measured, ascending, all below N; none where no tokens are routed.
        ms: at each of them, never falling.
        whole_ms: on all N tokens, where nothing is ranked, gathered and written back.
        narrow: by share of the MLP's channels, the time over that of the whole width: at the count `half`, and on all tokens.
        half: the middle count at which narrow blocks were measured; 0 where no tokens are routed.
    """

    counts: tuple[int, ...]
    ms: tuple[float, ...]
    whole_ms: float
    narrow: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    half: int = 0

    def at(self, kept: int, tokens: int, mlp_width: float = 1.0) -> float:
        """At `kept` of N = `tokens` tokens, linear between the measured counts and level beyond them."""
        whole = kept >= tokens or not self.counts
        ms = self.whole_ms if whole else self._between(kept)
        if mlp_width == 1.0 or mlp_width not in self.narrow:  # an MLP that cannot be narrowed runs whole
            return ms
        half, full = self.narrow[mlp_width]
        if whole or not self.half:
            return ms * full
        place = min(max((kept - self.half) / (tokens - self.half), 0.0), 1.0)
        return ms * (half + (full - half) * place)

    def _between(self, kept: int) -> float:
        if kept <= self.counts[0]:
            return self.ms[0]
        if kept >= self.counts[-1]:
            return self.ms[-1]
        after = bisect_left(self.counts, kept)
        low, high = self.counts[after - 1 : after + 1]
        share = (kept - low) / (high - low)
        return self.ms[after - 1] * (1 - share) + self.ms[after] * share


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of one pass of a backbone, by what its routed blocks do.

    Attributes:
        tokens: N, image tokens.
        dense_ms: of a pass of the untouched model.
        never_ms: of a pass without its routed blocks.
        rest_ms: of one routed block that adds its last residual; 0 where it just passes by.
        router_ms: of all routers of a pass, which is part of the blocks' times.
        curves: by kind of block.
        places: for each routed block, its kind and the share of the kind's time that is its own (by FLOPs).
        spread: interquartile range of the untouched pass over its median.
        map_ms: of the largest map that stands in for all blocks at rest; 0 where none was fitted.
    """

    tokens: int
    dense_ms: float
    never_ms: float
    rest_ms: float
    router_ms: float
    curves: Mapping[str, TimeCurve]
    places: tuple[tuple[str, float], ...]
    spread: float
    map_ms: float = 0.0

    def __hash__(self) -> int:
        return hash((self.tokens, self.dense_ms, self.never_ms))

    def run_ms(self, place: int, kept: int, mlp_width: float = 1.0) -> float:
        """What the routed block at this place adds to a pass where it runs."""
        kind, share = self.places[place]
        return share * self.curves[kind].at(kept, self.tokens, mlp_width)

    def pass_ms(self, kept: Sequence[int]) -> float:
        """A pass whose routed blocks run on so many tokens; 0 for one that rests."""
        blocks = (self.run_ms(place, k) if k else self.rest_ms for place, k in enumerate(kept))
        return self.never_ms + math.fsum(blocks)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` reads it back."""
        curves = {
            kind: asdict(curve) | {"narrow": [[width, *ratios] for width, ratios in curve.narrow.items()]}
            for kind, curve in self.curves.items()
        }
        return asdict(replace(self, curves={})) | {"curves": curves}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LatencyTable":
        """The table written by `to_dict`; `ValueError` if it is none, or holds what no clock shows."""
        try:
            curves = {
                str(kind): TimeCurve(
                    tuple(int(count) for count in entry["counts"]),
                    rising([float(ms) for ms in entry["ms"]]),
                    float(entry["whole_ms"]),
                    {float(width): (float(half), float(full)) for width, half, full in entry["narrow"]},
                    int(entry["half"]),
                )
                for kind, entry in data["curves"].items()
            }
            places = tuple((str(kind), float(share)) for kind, share in data["places"])
            names = ("dense_ms", "never_ms", "rest_ms", "router_ms", "map_ms", "spread")
            single = {name: float(data[name]) for name in names}
            table = cls(int(data["tokens"]), curves=curves, places=places, **single)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a latency table: {error!r}") from error
        times = [*single.values(), *(ms for curve in curves.values() for ms in (*curve.ms, curve.whole_ms))]
        if not all(0 <= ms < math.inf for ms in times) or not table.dense_ms > 0 or not table.never_ms > 0:
            raise ValueError(f"not a latency table: times {times}")
        if any(kind not in curves for kind, _ in places) or any(len(c.counts) != len(c.ms) for c in curves.values()):
            raise ValueError("not a latency table: places and curves do not fit together")
        return table

    def __str__(self) -> str:
        names = {kind: f"{sum(own == kind for own, _ in self.places)} x {kind}" for kind in self.curves}
        width = max(map(len, [*names.values(), "without routed blocks"]))
        lines = [
            f"one pass, {self.tokens} image tokens, milliseconds (medians; spread {self.spread:.1%})",
            f"  {'dense':<{width}}  {self.dense_ms:9.3f}",
            f"  {'without routed blocks':<{width}}  {self.never_ms:9.3f}",
        ]
        if self.rest_ms:
            lines.append(f"  {'a block at rest':<{width}}  {self.rest_ms:9.3f}")
        if self.map_ms:
            lines.append(f"  {'the map at rest':<{width}}  {self.map_ms:9.3f}")
        if self.router_ms:
            lines.append(f"  {'all routers':<{width}}  {self.router_ms:9.3f}  (within the blocks' times)")
        for kind, curve in self.curves.items():
            lines.append(f"  {names[kind]:<{width}}  {curve.whole_ms:9.3f}  on all tokens")
            lines += [
                f"  {'':<{width}}  {ms:9.3f}  on {k} tokens"
                for k, ms in reversed([*zip(curve.counts, curve.ms, strict=True)])
            ]
            lines += [
                f"  {'':<{width}}  {curve.whole_ms * full:9.3f}  on all tokens, MLP width {share:g}"
                for share, (_, full) in sorted(curve.narrow.items(), reverse=True)
            ]
        return "\n".join(lines)
