"""How near shapes are to others, pair by pair: IoU of occupancy grids, and Chamfer distance of their surfaces.

Lengths are in units of the cube [-1, 1]^3, whose side is 2: a cell of a grid of resolution R has the side 2 / R.
"""

import torch
from torch import Tensor

from shivelight.errors import DataError


def iou(grids: Tensor, references: Tensor) -> Tensor:
    """Full cells in common over full cells of either, of each pair of bool grids [n, R, R, R] -> float [n]; 1 where both are
    empty."""
    _check(grids, references)
    common = (grids & references).flatten(1).sum(1)
    either = (grids | references).flatten(1).sum(1)
    return torch.where(either == 0, 1.0, common / either.clamp(min=1))


def boundary_points(grid: Tensor) -> Tensor:
    """The middles float [P, 3] of all faces between a full cell of a bool grid [R, R, R] and an empty one or the outside."""
    size = grid.shape[-1]
    padded = torch.nn.functional.pad(grid, (1, 1) * 3)
    points = []
    for axis in range(3):
        # Face i along the axis lies between cells i - 1 and i.
        inner = [slice(1, -1)] * 3
        inner[axis] = slice(None)
        along = padded[tuple(inner)]
        index = (along.narrow(axis, 0, size + 1) != along.narrow(axis, 1, size + 1)).nonzero().float()
        offset = torch.full((3,), 0.5)
        offset[axis] = 0.0
        points.append((index + offset) * 2 / size - 1)
    return torch.cat(points)


def chamfer(grids: Tensor, references: Tensor) -> Tensor:
    """Chamfer distance of the surfaces of each pair of bool grids [n, R, R, R] -> float [n], in units of the cube.

    Half of the mean distance (not squared) from the points of one surface to the nearest of the other, plus half of the mean
    the other way. The points are `boundary_points`, so the surfaces are those of the cells. Infinite where only one of the two
    grids is empty, 0 where both are.
    """
    _check(grids, references)
    return torch.stack([_chamfer(*pair) for pair in zip(grids, references, strict=True)])


def _chamfer(grid: Tensor, reference: Tensor) -> Tensor:
    ours, theirs = boundary_points(grid), boundary_points(reference)
    if not len(ours) or not len(theirs):
        return torch.tensor(0.0 if len(ours) == len(theirs) else torch.inf)
    # Exact differences: the matrix product that cdist uses for many points loses half of the digits near 0.
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances.amin(1).mean() + distances.amin(0).mean()) / 2


def _check(grids: Tensor, references: Tensor) -> None:
    if (
        grids.shape != references.shape
        or grids.ndim != 4
        or grids.dtype != torch.bool
        or references.dtype != torch.bool
    ):
        raise DataError(
            f"shapes are compared pair by pair as bool grids [n, R, R, R]: got {grids.dtype} {tuple(grids.shape)} and "
            f"{references.dtype} {tuple(references.shape)}; decode both at the same resolution, and compare logits with 0"
        )
