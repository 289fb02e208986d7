"""The embedded set of shapes: furniture and other things of a home as 32 x 32 x 32 grids of full and empty cubes.

One zip file holds the packed grids, what is known of each model (name, category, creator, licence), the attribution that
their licences ask for, and the split by model. The space is the cube [-1, 1]^3 as in Hunyuan3D: x to the right, y up, z towards
the viewer; cell (i, j, k) of a grid is the small cube around `centres()[i, j, k]`.

A *view* is one grayscale picture of a shape, 0 where there is nothing and brighter the nearer the surface: the condition from
which a shape is generated.
"""

import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shivelight.errors import DataError

ARCHIVE = Path(__file__).parent / "data" / "shapes.zip"
RESOLUTION = 32
VIEW_SIZE = 32
# Where the viewer stands: turned to the right of the front and raised, in degrees.
YAW, PITCH = 30.0, 25.0
# Brightness of the farthest point that a view can show; the nearest one is 255.
FAR = 55.0
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Shape:
    """What is known of one model: its place in the set, its catalogue id, name, category, creator and licence."""

    index: int
    id: str
    name: str
    category: str
    creator: str
    licence: str
    split: Split


@lru_cache(maxsize=1)
def _read(path: Path) -> tuple[tuple[Shape, ...], Tensor]:
    if not path.exists():
        raise DataError(f"The shapes {path} are missing; rebuild them with `python recipes/shapes/build_data.py`.")
    with zipfile.ZipFile(path) as archive:
        records = json.loads(archive.read("shapes.json"))
        bits = np.frombuffer(archive.read("shapes.bits"), dtype=np.uint8)
    grids = np.unpackbits(bits).reshape(-1, RESOLUTION, RESOLUTION, RESOLUTION)
    if len(grids) != len(records):
        raise DataError(f"{path} holds {len(grids)} grids and {len(records)} names; rebuild it.")
    return tuple(Shape(index, **record) for index, record in enumerate(records)), torch.from_numpy(grids).bool()


class ShapeData:
    """The embedded shapes, or those of another archive that `recipes/shapes/build_data.py` wrote."""

    def __init__(self, path: Path = ARCHIVE) -> None:
        self._shapes, self._grids = _read(path)

    def shapes(self, split: Split | None = None) -> list[Shape]:
        """All models, or those of one split, in the order of the archive."""
        return [shape for shape in self._shapes if split is None or shape.split == split]

    def grids(self, split: Split | None = None) -> Tensor:
        """bool [n, 32, 32, 32], x then y then z, in the order of `shapes`."""
        return self._grids[[shape.index for shape in self.shapes(split)]]


def centres(resolution: int = RESOLUTION) -> Tensor:
    """float [R, R, R, 3]: the middle of each cell of a grid over [-1, 1]^3."""
    axis = (torch.arange(resolution) + 0.5) * 2 / resolution - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def surface(grid: Tensor) -> Tensor:
    """bool [..., R, R, R]: full cells of a bool grid with an empty one, or the outside of the grid, at one of their 6 faces."""
    padded = torch.nn.functional.pad(grid, (1, 1) * 3)
    buried = grid.clone()
    for axis in range(-3, 0):
        inner = padded
        for other in {-3, -2, -1} - {axis}:
            inner = inner.narrow(other, 1, grid.shape[other])
        buried &= inner.narrow(axis, 0, grid.shape[axis]) & inner.narrow(axis, 2, grid.shape[axis])
    return grid & ~buried


def turned(grid: Tensor, turn: int) -> Tensor:
    """One of 8 poses of a grid [..., R, R, R] with its top up: `turn` % 4 quarter turns about y, mirrored first from 4 on."""
    if turn >= 4:
        grid = grid.flip(-3)
    return torch.rot90(grid, turn % 4, dims=(-1, -3))


def view(grid: Tensor) -> Image.Image:
    """The picture of a bool grid [32, 32, 32] from the right above, orthographic, mode L, 32 x 32.

    Brightness is 255 for the nearest point that any shape can have and `FAR` for the farthest. Each full cell is drawn as
    8 points, more than one a pixel, so that there are no holes; nearer ones hide farther ones.
    """
    cells = centres()[surface(grid)]
    half = 0.5 / RESOLUTION
    corners = torch.tensor([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
    points = (cells[:, None] + corners).reshape(-1, 3).double().numpy()
    yaw, pitch = np.radians(YAW), np.radians(PITCH)
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    towards = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    up = np.cross(towards, right)
    reach = np.sqrt(3.0)
    # A shape touches the faces of its box, hardly its corners: what little leaves the frame is cut off.
    columns = ((points @ right / 1.4 + 1) / 2 * VIEW_SIZE).astype(int)
    rows = ((1 - points @ up / 1.4) / 2 * VIEW_SIZE).astype(int)
    inside = (columns >= 0) & (columns < VIEW_SIZE) & (rows >= 0) & (rows < VIEW_SIZE)
    brightness = FAR + (255 - FAR) * (points @ towards / reach + 1) / 2
    picture = np.zeros((VIEW_SIZE, VIEW_SIZE))
    np.maximum.at(picture, (rows[inside], columns[inside]), brightness[inside])
    return Image.fromarray(picture.round().astype(np.uint8))
