"""The encoder that hy3dgen does not have, in closed form: a shape to an unordered set of latents, one about each of 64 points.

As in Hunyuan3D the denoiser knows no order among its tokens, so the latents have none either. A latent is a point of the surface
(farthest point sampling, Qi et al. 2017: the points cover the shape) and the first principal components of the 7 x 7 x 7
cells around it: where it is, and what the shape is like there. Positions and the first component have deviation 1, later components
less, in proportion. An encoder that learns, as 3DShape2VecSet's, would say more with as many numbers; this one needs no
training, and the denoiser can be trained beside the decoder.

    python recipes/shapes/encoder.py        # writes build/shapes/latents.pt, which both training scripts read
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shivelight.demo.shapes import RESOLUTION, ShapeData, centres, surface, turned, view

sys.path.append(str(Path(__file__).parents[1]))
import checkpoint  # noqa: E402

LATENTS = 64
CHANNELS = 12
RADIUS = 3  # cells around a point
POSES = 8
PATCHES = 60  # a shape, that the components are found from
# Positions of surface points in [-1, 1] deviate about this much.
SPREAD = 0.45


def farthest(points: Tensor, count: int) -> Tensor:
    """Indices [count] into points [P, 3]: the first point, then always the one farthest from those chosen; all of them, some
    twice, where there are fewer."""
    chosen = [0]
    distance = torch.full((len(points),), torch.inf)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(-1))
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def patches(grid: Tensor, cells: Tensor) -> Tensor:
    """float [n, 343]: the cells around each of some cells (flat indices [n]) of a bool grid; outside is empty."""
    padded = torch.nn.functional.pad(grid, (RADIUS,) * 6).flatten()
    side = RESOLUTION + 2 * RADIUS
    reach = torch.arange(2 * RADIUS + 1)
    around = ((reach[:, None, None] * side + reach[:, None]) * side + reach).flatten()
    corner = ((cells // RESOLUTION**2) * side + cells // RESOLUTION % RESOLUTION) * side + cells % RESOLUTION
    return padded[corner[:, None] + around].float()


def moves() -> list[Tensor]:
    """For each pose, where every cell (flat index) goes."""
    cells = torch.arange(RESOLUTION**3).reshape((RESOLUTION,) * 3)
    return [turned(cells, pose).flatten().argsort() for pose in range(POSES)]


def components(grids: Tensor) -> dict[str, Tensor]:
    """{"mean" [343], "basis" [343, CHANNELS - 3]} of patches around random surface cells in all poses."""
    generator, found = torch.Generator().manual_seed(0), []
    for index, grid in enumerate(grids):
        pose = turned(grid, index % POSES)
        cells = surface(pose).flatten().nonzero().squeeze(1)
        found.append(patches(pose, cells[torch.randint(len(cells), (PATCHES,), generator=generator)]))
    every = torch.cat(found)
    mean = every.mean(0)
    values, vectors = torch.linalg.eigh((every - mean).T.cov())
    explained = values.flip(0).clamp(min=0)
    print(f"{CHANNELS - 3} components hold {explained[: CHANNELS - 3].sum() / explained.sum():.2f} of the variance")
    return {"mean": mean, "basis": vectors.flip(1)[:, : CHANNELS - 3] / explained[0].sqrt()}


def encode(grid: Tensor, poses: list[Tensor], parts: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Latents [P, LATENTS, CHANNELS] of a bool grid in the given poses, from one random choice of points."""
    cells = surface(grid).flatten().nonzero().squeeze(1)
    cells = cells[torch.randperm(len(cells), generator=generator)]
    places = centres().reshape(-1, 3)
    cells = cells[farthest(places[cells], LATENTS)]
    rows = []
    for pose, move in enumerate(poses):
        moved = move[cells]
        around = (patches(turned(grid, pose), moved) - parts["mean"]) @ parts["basis"]
        rows.append(torch.cat([places[moved] / SPREAD, around], dim=-1))
    return torch.stack(rows)


def load(path: Path) -> dict[str, Any]:
    """What `main` wrote: by split {"latents" [n, P, E, N, C], "grids" bool [n, 32, 32, 32], "views" uint8 [n, P, 32, 32]}, of n
    shapes in P poses (1 where held out), each encoded E times."""
    state = checkpoint.load(path)
    if state is None:
        raise SystemExit(f"There are no latents {path}: run recipes/shapes/encoder.py first.")
    return state


def main() -> None:
    """Encode every split, once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", type=int, default=2, help="choices of points for each training shape")
    parser.add_argument("--out", type=Path, default=Path("build/shapes/latents.pt"))
    args = parser.parse_args()
    data, every, began = ShapeData(), moves(), time.time()
    parts = components(data.grids("train"))
    state: dict[str, Any] = {"parts": parts}
    for split in ("train", "validation", "test"):
        grids, generator = data.grids(split), torch.Generator().manual_seed(0)
        poses = every if split == "train" else every[:1]
        times = args.encodings if split == "train" else 1
        latents = [torch.stack([encode(grid, poses, parts, generator) for _ in range(times)], dim=1) for grid in grids]
        views = [np.stack([np.asarray(view(turned(grid, pose))) for pose in range(len(poses))]) for grid in grids]
        state[split] = {
            "latents": torch.stack(latents).half(), "grids": grids, "views": torch.from_numpy(np.stack(views)),
        }  # fmt: skip
        deviation = state[split]["latents"].float().flatten(0, -2).std(0)
        print(
            f"{split}: {time.time() - began:.0f} s, deviations {[round(v, 2) for v in deviation.tolist()]}", flush=True
        )
    checkpoint.save(args.out, state)


if __name__ == "__main__":
    main()
