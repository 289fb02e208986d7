"""The embedded shapes: what the file holds, what their licences ask for, and the geometry of grids and views."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shivelight.demo.shapes import ARCHIVE, FAR, ShapeData, centres, surface, turned, view
from shivelight.errors import DataError


def single(*cell: int) -> torch.Tensor:
    grid = torch.zeros(32, 32, 32, dtype=torch.bool)
    grid[cell] = True
    return grid


def test_every_shape_has_a_grid_a_licence_and_a_place_in_one_split() -> None:
    data = ShapeData()
    counts = Counter(shape.split for shape in data.shapes())
    assert counts == {"train": 555, "validation": 48, "test": 48}
    assert {shape.licence for shape in data.shapes()} == {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"}
    assert all(shape.creator and shape.name and shape.category for shape in data.shapes())
    grids = data.grids("test")
    assert grids.shape == (48, 32, 32, 32)
    assert torch.equal(grids[3], data.grids()[data.shapes("test")[3].index])
    # The longest side is 30 cells, in the middle of the grid.
    every = data.grids()
    for axis in (1, 2, 3):
        assert not every.select(axis, 0).any() and not every.select(axis, 31).any()
    for grid in every:
        assert (grid.nonzero().amax(0) - grid.nonzero().amin(0)).max() == 29
    assert (data.grids().flatten(1).sum(1) >= 60).all()


def test_the_attribution_names_every_model_and_its_creator() -> None:
    with zipfile.ZipFile(ARCHIVE) as archive:
        text = archive.read("ATTRIBUTION.txt").decode()
    lines = set(text.splitlines())
    for shape in ShapeData().shapes():
        assert f"  {shape.name}, {shape.creator}, {shape.licence}, {shape.id}" in lines
    assert "https://creativecommons.org/licenses/by/3.0/" in text and "was changed" in text


def test_no_test_shape_is_a_training_shape_in_another_pose() -> None:
    data = ShapeData()
    known = data.grids("train").flatten(1).float()
    for grid in data.grids("test")[::8]:
        for turn in range(8):
            pose = turned(grid, turn).flatten().float()
            common = known @ pose
            assert (common / (known.sum(1) + pose.sum() - common)).max() <= 0.8


def test_the_surface_of_a_cube_is_all_of_it_but_its_inside() -> None:
    grid = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    grid[0, 1:6, 1:6, 1:6] = True
    grid[1] = True
    assert surface(grid)[0].sum() == 5**3 - 3**3
    assert surface(grid)[1].sum() == 8**3 - 6**3


def test_poses_are_eight_different_ones_and_keep_the_top_up() -> None:
    grid = torch.rand(4, 4, 4) > 0.5
    poses = torch.stack([turned(grid, turn) for turn in range(8)])
    assert len(poses.flatten(1).unique(dim=0)) == 8
    assert torch.equal(poses.sum((1, 3)), grid.sum((0, 2)).expand(8, -1))
    # A quarter turn about y takes what is on the right (x) to the front or back (z).
    assert turned(single(31, 4, 16), 1)[15:17, 4].any(dim=0).nonzero().item() in (0, 31)


def test_centres_are_the_middles_of_cells() -> None:
    assert centres()[0, 31, 16].tolist() == pytest.approx([-31 / 32, 31 / 32, 1 / 32])


def test_a_view_is_brighter_where_it_is_nearer_and_shows_the_nearest() -> None:
    near, far = np.asarray(view(single(20, 22, 25))), np.asarray(view(single(11, 9, 6)))
    assert FAR < far.max() < near.max() <= 255
    # The viewer is at the front (z), turned to the right (x) and raised (y): the one hides the other.
    both = single(11, 9, 6) | single(20, 22, 25)
    assert np.array_equal(np.asarray(view(both)), np.maximum(near, far))


def test_what_is_higher_stands_higher_in_a_view_and_right_is_right() -> None:
    def place(*cell: int) -> tuple[float, float]:
        rows, columns = np.nonzero(np.asarray(view(single(*cell))))
        return rows.mean(), columns.mean()

    assert place(16, 28, 16)[0] < place(16, 4, 16)[0]
    assert place(28, 16, 16)[1] > place(4, 16, 16)[1]


def test_a_view_of_a_solid_has_no_holes() -> None:
    grid = torch.zeros(32, 32, 32, dtype=torch.bool)
    grid[4:28, 4:28, 4:28] = True
    mask = np.asarray(view(grid)) > 0
    for line in mask:
        places = np.flatnonzero(line)
        assert len(places) == 0 or len(places) == np.ptp(places) + 1


def test_a_missing_archive_says_how_to_rebuild_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="build_data"):
        ShapeData(tmp_path / "none.zip")
