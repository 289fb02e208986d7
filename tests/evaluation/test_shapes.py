"""Distances between shapes whose values can be worked out by hand."""

import pytest
import torch

from shivelight.errors import DataError
from shivelight.evaluation.shapes import boundary_points, chamfer, iou


def box(low: tuple[int, int, int], high: tuple[int, int, int], size: int = 16) -> torch.Tensor:
    grid = torch.zeros(size, size, size, dtype=torch.bool)
    grid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return grid


CUBE = box((2, 2, 2), (6, 6, 6))


def test_iou_of_a_cube_moved_by_one_of_its_four_cells_is_three_fifths() -> None:
    moved = torch.stack([CUBE.roll(1, axis) for axis in range(3)])
    assert iou(moved, CUBE.expand(3, -1, -1, -1)).tolist() == pytest.approx([0.6] * 3)


def test_iou_of_the_same_is_one_of_apart_is_zero_and_of_two_empty_grids_is_one() -> None:
    grids = torch.stack([CUBE, CUBE, torch.zeros_like(CUBE)])
    others = torch.stack([CUBE, CUBE.roll(8, 0), torch.zeros_like(CUBE)])
    assert iou(grids, others).tolist() == [1.0, 0.0, 1.0]


def test_a_cell_has_six_faces_around_its_middle() -> None:
    points = boundary_points(box((3, 5, 7), (4, 6, 8)))
    middle = (torch.tensor([3.5, 5.5, 7.5])) * 2 / 16 - 1
    assert len(points) == 6
    assert torch.equal(points.mean(0), middle)
    assert (points - middle).norm(dim=1).tolist() == pytest.approx([1 / 16] * 6)


def test_what_touches_the_outside_has_faces_there_and_what_is_inside_has_none() -> None:
    assert len(boundary_points(torch.ones(4, 4, 4, dtype=torch.bool))) == 6 * 16


def test_chamfer_of_a_plate_moved_by_three_cells() -> None:
    # A plate across the whole grid, one cell thick, and the same plate three cells away: both of its sides are full faces, at
    # 3 (the near one) and at 4 - 2 = 2 cells from the nearest side of the other, or the other way round; its rim, the outer
    # faces of its cells, has the side of the other above it at sqrt(2.5^2 + 0.5^2) cells.
    plate, moved = box((4, 0, 0), (5, 16, 16)), box((7, 0, 0), (8, 16, 16))
    sides, rim = 256, 64
    to_rim = (2.5**2 + 0.5**2) ** 0.5
    expected = (sides * 2 + sides * 3 + rim * to_rim) / (2 * sides + rim) * 2 / 16
    assert chamfer(moved[None], plate[None]).item() == pytest.approx(expected, rel=1e-6)


def test_chamfer_is_symmetric_and_zero_only_for_the_same() -> None:
    a, b = CUBE[None], box((2, 2, 2), (6, 6, 9))[None]
    assert chamfer(a, a).item() == 0.0
    assert chamfer(a, b).item() == pytest.approx(chamfer(b, a).item())
    assert chamfer(a, b).item() > 0.0


def test_chamfer_does_not_depend_on_the_resolution_of_the_grids() -> None:
    # Far apart, the discretisation of the faces weighs little.
    coarse = chamfer(box((1, 4, 4), (3, 12, 12))[None], box((13, 4, 4), (15, 12, 12))[None])
    fine = chamfer(box((2, 8, 8), (6, 24, 24), 32)[None], box((26, 8, 8), (30, 24, 24), 32)[None])
    assert coarse.item() == pytest.approx(fine.item(), rel=0.01)


def test_chamfer_to_nothing_is_infinite() -> None:
    empty = torch.zeros_like(CUBE)
    assert chamfer(torch.stack([CUBE, empty, empty]), torch.stack([empty, CUBE, empty])).tolist() == [
        float("inf"),
        float("inf"),
        0.0,
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(CUBE, CUBE), (CUBE[None], CUBE[None].float()), (CUBE[None], box((0, 0, 0), (1, 1, 1), 8)[None])],
)
def test_what_is_no_pair_of_grids_is_refused(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    for measure in (iou, chamfer):
        with pytest.raises(DataError, match="pair by pair"):
            measure(ours, theirs)
