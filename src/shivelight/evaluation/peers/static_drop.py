"""Static block drop: a fixed set of blocks is left out at every step.

Which ones: those that turn what passes through them least in one dense generation (block influence, Men et al. 2024, arXiv
2403.03853, eq. 1), never the first or the last. With random weights, evenly spread ones.

    BI(i) = 1 - mean over tokens of  x_i . x_{i+1} / (|x_i| |x_{i+1}|)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Where, block_share, blocks_run
from shivelight.execution.call import BlockCall

METHOD = "static-drop"


def static_drop(where: Where, drop: int, blocks: Sequence[int] | None = None) -> OperatingPoint:
    """So many blocks are left out.

    Args:
        where: a comparison or a bare loop.
        drop: how many.
        blocks: which; by influence (see above) where not given.

    Raises:
        ShivelightError: there are not so many between the first and the last.
    """
    ground = Ground(where)
    inner = len(ground.blocks) - 2
    if blocks is None and not 1 <= drop <= inner:
        raise ground.refuse(
            METHOD, f"{drop} of its {max(inner, 0)} blocks between the first and the last cannot be left out"
        )
    chosen = tuple(sorted(_order(ground)[:drop] if blocks is None else blocks))
    if len(chosen) != drop:
        raise ShivelightError(f"{METHOD} of {drop} blocks was given {len(chosen)}: {list(chosen)}.")

    def pass_by(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        return call.image, call.text

    def state() -> Any:
        return blocks_run(ground, dict.fromkeys(chosen, pass_by), Passes(ground))

    return ground.point(METHOD, {"drop": drop}, state, lambda shape: 1.0 - block_share(ground, chosen, shape))


def _order(ground: Ground) -> list[int]:
    """The inner blocks, the first to go first."""
    inner = range(1, len(ground.blocks) - 1)
    if ground.bare:
        return spread(list(inner))
    influence = block_influence(ground)
    return sorted(inner, key=lambda index: influence[index])


def spread(items: list[int]) -> list[int]:
    """An order in which every beginning lies evenly among all: the middle, then the middles of the halves, and so on.

    >>> spread([1, 2, 3, 4, 5, 6, 7])
    [4, 2, 6, 1, 3, 5, 7]
    """
    ordered, parts = [], [items]
    while parts:
        halves = []
        for part in parts:
            if part:
                middle = len(part) // 2
                ordered.append(part[middle])
                halves += [part[:middle], part[middle + 1 :]]
        parts = halves
    return ordered


def block_influence(ground: Ground) -> list[float]:
    """Of each block, over the tokens of all steps of one dense generation."""
    totals = [[0.0, 0.0] for _ in ground.blocks]

    def block(index: int) -> Any:
        def run(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            image, text = call.split(forward(**call.arguments))
            cosine = torch.nn.functional.cosine_similarity(call.image.float(), image.float(), dim=-1)
            totals[index][0] += float(cosine.sum())
            totals[index][1] += cosine.numel()
            return image, text

        return run

    with ground.dense(), blocks_run(ground, {index: block(index) for index in range(len(totals))}, Passes(ground)):
        ground.generate()
    return [1.0 - total / count for total, count in totals]


def static_drop_points(ground: Ground) -> list[OperatingPoint]:
    """About an eighth, a quarter and three eighths of the blocks."""
    count = len(ground.blocks)
    drops = sorted({max(1, round(share * count)) for share in (0.125, 0.25, 0.375)})
    if count < 3:
        raise ground.refuse(METHOD, f"it has {count} blocks")
    order = _order(ground)
    return [static_drop(ground.where, drop, order[:drop]) for drop in drops if drop <= count - 2]
