"""Peers: other people's ways to make the same pipeline faster, as operating points of a comparison or a bare loop; a file each."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.cache_dit import cache_dit, cache_dit_points
from shivelight.evaluation.peers.diffcr import DiffcrGates
from shivelight.evaluation.peers.dydit import DyditGates, dydit, dydit_points
from shivelight.evaluation.peers.fewer_steps import fewer_steps, fewer_steps_points
from shivelight.evaluation.peers.first_block_cache import first_block_cache, first_block_cache_points
from shivelight.evaluation.peers.ground import Ground, Where
from shivelight.evaluation.peers.interval_cache import interval_cache, interval_cache_points
from shivelight.evaluation.peers.mag_cache import mag_cache, mag_cache_points
from shivelight.evaluation.peers.placed_steps import placed_steps, placed_steps_points
from shivelight.evaluation.peers.static_drop import static_drop, static_drop_points
from shivelight.evaluation.peers.taylor_seer import taylor_seer, taylor_seer_points
from shivelight.evaluation.peers.token_merging import token_merging, token_merging_points
from shivelight.evaluation.peers.trained import TrainedGates, trained_point

__all__ = [
    "PEERS",
    "TRAINED",
    "cache_dit",
    "cache_points",
    "check_names",
    "dydit",
    "fewer_steps",
    "first_block_cache",
    "interval_cache",
    "mag_cache",
    "peer_points",
    "placed_steps",
    "static_drop",
    "taylor_seer",
    "token_merging",
    "trained_point",
]

# By their names on the command line: a ground -> the points at which a peer is usually run.
PEERS: dict[str, Callable[[Ground], list[OperatingPoint]]] = {
    "first-block-cache": first_block_cache_points,
    "taylorseer": taylor_seer_points,
    "magcache": mag_cache_points,
    "cache-dit": cache_dit_points,
    "token-merging": token_merging_points,
    "dydit": dydit_points,
    "interval-cache": interval_cache_points,
    "static-drop": static_drop_points,
    "fewer-steps": fewer_steps_points,
    "placed-steps": placed_steps_points,
}
# Those that are trained, by the names in their folders.
TRAINED: dict[str, type[TrainedGates]] = {gates.method: gates for gates in (DyditGates, DiffcrGates)}


def check_names(names: Sequence[str]) -> None:
    """Raises where one of them is no peer.

    Raises:
        ShivelightError: lists those that are known.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ShivelightError(f"There is no peer {unknown[0]!r}; known are {', '.join(PEERS)}.")


def peer_points(where: Where, names: Sequence[str]) -> tuple[list[OperatingPoint], list[str]]:
    """The usual operating points of some peers, and why, of those that cannot run here.

    Args:
        where: a comparison, or a bare loop: there, what depends on data is set to a share of what it leaves out.
        names: keys of `PEERS`.
    """
    check_names(names)
    ground, points, reasons = Ground(where), [], []
    for name in dict.fromkeys(names):
        try:
            points += PEERS[name](ground)
        except ShivelightError as error:
            reasons.append(str(error))
    return points, reasons


def cache_points(
    where: Where, thresholds: Sequence[float] = (0.05, 0.1, 0.2), intervals: Sequence[int] = (2, 3, 4)
) -> list[OperatingPoint]:
    """First Block Cache at these thresholds and TaylorSeer, of first and second order, at these intervals; without what cannot run
    on the backbone."""
    points = []
    with suppress(ShivelightError):
        points += [first_block_cache(where, threshold) for threshold in thresholds]
    with suppress(ShivelightError):
        points += [taylor_seer(where, interval, order) for order in (1, 2) for interval in intervals]
    return points
