"""A latency table, measured on the attached backbone in passes on random input of the shape at hand (`BackboneSpec.example`).

What each block does is dictated; what it takes to decide, gather and write back is in the figures.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from shivelight.calibration.rehearsal import Rehearsed, Standing, is_bare, rehearsal
from shivelight.execution.gates import Decision
from shivelight.execution.latency_table import LatencyTable, TimeCurve, rising
from shivelight.execution.pricing import Load
from shivelight.execution.routed import Routed
from shivelight.measurement.latency import Timings, interleave, synchronize
from shivelight.routing import count_unit

SECONDS = 8.0
# Shares of the image tokens at which blocks are timed, beside one unit, all but one unit, and all.
_SHARES = (0.25, 0.5, 0.75, 0.875)
_FEWEST, _MOST = 3, 25
# A measurement of less is repeated back to back: the first launch of a pass waits for nothing.
_LEAST_SECONDS = 0.02

Progress = Callable[[str], None]


@torch.no_grad()
def measure_table(
    backbone: nn.Module, routed: Routed, load: Load, seconds: float = SECONDS, progress: Progress | None = None
) -> LatencyTable:
    """Time the blocks of an attached backbone, in turns.

    Args:
        backbone: attached, on its device.
        routed: its state.
        load: what passes hold.
        seconds: to take about; each way is timed at least three times.
        progress: told of each timed pass.

    Raises:
        UnsupportedBackboneError: the family's spec has no `example`.
        BudgetError: what is attached cannot run less than everything.
    """
    clock = Standing(load, is_bare(routed))
    device = next(backbone.parameters()).device
    sync = synchronize(device)
    with rehearsal(routed, clock):
        passes = Rehearsed(backbone, routed, load, clock)
        entered = passes.fill()
        together = routed.config.together
        groups = {"all": routed.routed} if together else _by_kind(routed)
        counts = _counts(routed, load.tokens)
        ways = _ways(passes, groups, counts, together)
        asks = routed.gates is not None or (routed.config.tokens is not None and counts)
        if entered is not None and asks:
            ways["routers"] = partial(passes.routers, *entered)
        if entered is not None and routed.stand_ins is not None and len(routed.stand_ins.maps):
            ways["map"] = partial(passes.map, routed.stand_ins.largest(), entered[0])
        took = 0.0
        for run in ways.values():  # kernels are chosen, narrow weights gathered
            began = time.perf_counter()
            run()
            if sync is not None:
                sync()
            took += time.perf_counter() - began
        passes.repeats = min(max(math.ceil(_LEAST_SECONDS * len(ways) / took), 1), 8)
        rounds = min(max(int(seconds / (took * passes.repeats)), _FEWEST), _MOST)
        timings = interleave(ways, rounds, 0, sync, None, progress)
        repeats = passes.repeats
    return _table(routed, load, timings, groups, counts, repeats)


def _by_kind(routed: Routed) -> dict[str, tuple[int, ...]]:
    kinds = dict.fromkeys(routed.kinds[block] for block in routed.routed)
    return {kind: tuple(b for b in routed.routed if routed.kinds[b] == kind) for kind in kinds}


def _counts(routed: Routed, tokens: int) -> tuple[int, ...]:
    """Image tokens below all of them at which blocks are timed."""
    granularity = routed.config.granularity
    if not granularity:
        return ()
    # Compiled blocks round to 32nds of all tokens (`shivelight.compile`).
    unit = count_unit(tokens, granularity) if tokens % 32 else tokens // 32
    counts = {unit, tokens - unit, *(unit * round(share * tokens / unit) for share in _SHARES)}
    return tuple(sorted(count for count in counts if 0 < count < tokens))


def _widths(routed: Routed) -> tuple[float, ...]:
    """Shares of the MLP below all of it."""
    return () if routed.gates is None else routed.gates.config.widths[:-1]


def _half(counts: tuple[int, ...]) -> int:
    return counts[len(counts) // 2] if counts else 0


def _ways(
    passes: Rehearsed, groups: dict[str, tuple[int, ...]], counts: tuple[int, ...], together: bool
) -> dict[str, Callable[[], object]]:
    """Passes to time, by name: in each the blocks of one kind run, and the others do nothing."""
    tokens, routed = passes.load.tokens, passes.routed
    rest = Decision("reuse", 0)
    # Blocks that only rest together cannot pass by: there, resting is what is left when they do not run.
    nothing = rest if together else Decision("skip", 0)
    ways: dict[str, Callable[[], object]] = {
        "dense": lambda: passes(None),
        "never": lambda: passes(lambda block: nothing),
    }
    if not together and routed.config.blocks is not None and routed.config.reuse is not None:
        ways["rest"] = lambda: passes(lambda block: rest)

    def way(blocks: tuple[int, ...], run: Decision) -> Callable[[], object]:
        return lambda: passes(lambda block: run if block in blocks else nothing)

    for kind, blocks in groups.items():
        own = [(k, 1.0) for k in (*counts, tokens)]
        own += [(k, width) for width in _widths(routed) for k in (_half(counts), tokens) if k]
        for k, width in own:
            ways[f"{kind} {k} {width:g}"] = way(blocks, Decision("run", k, width))
    return ways


def _table(
    routed: Routed,
    load: Load,
    timings: Timings,
    groups: dict[str, tuple[int, ...]],
    counts: tuple[int, ...],
    repeats: int,
) -> LatencyTable:
    """What the timings say, parts being differences of passes."""
    runs = {name: torch.tensor(times, dtype=torch.float64) * 1000 / repeats for name, times in timings.total.items()}
    # Relative to the untouched pass of the same round: what slows the machine for a while slows both.
    dense = float(runs["dense"].quantile(0.5))
    ms = {name: dense * float((times / runs["dense"]).quantile(0.5)) for name, times in runs.items()}
    never, least = ms["never"], 1e-6 * ms["never"]
    curves = {}
    for kind in groups:
        own = {
            (k, width): max(ms[f"{kind} {k} {width:g}"] - never, least)
            for k, width in [(k, width) for width in (1.0, *_widths(routed)) for k in (*counts, load.tokens)]
            if f"{kind} {k} {width:g}" in ms
        }
        half, whole = _half(counts), own[load.tokens, 1.0]
        narrow = {
            width: (own[half, width] / own[half, 1.0] if half else 1.0, own[load.tokens, width] / whole)
            for width in _widths(routed)
        }
        curves[kind] = TimeCurve(counts, rising([own[k, 1.0] for k in counts]), whole, narrow, half)
    low, high = (float(runs["dense"].quantile(place)) for place in (0.25, 0.75))
    return LatencyTable(
        load.tokens,
        dense,
        never,
        max(ms.get("rest", never) - never, 0.0) / len(routed.routed),
        ms.get("routers", 0.0),
        curves,
        _places(routed, load, groups),
        (high - low) / dense,
        ms.get("map", 0.0),
    )


def _places(routed: Routed, load: Load, groups: dict[str, tuple[int, ...]]) -> tuple[tuple[str, float], ...]:
    """For each routed block its kind, and its share of the kind's FLOPs."""
    flops = {b: routed.planner.costs[b].flops(load.tokens, load.text_tokens) for b in routed.routed}
    of_block = {
        block: (kind, flops[block] / sum(flops[other] for other in blocks))
        for kind, blocks in groups.items()
        for block in blocks
    }
    return tuple(of_block[block] for block in routed.routed)
