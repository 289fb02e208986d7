"""Rebuild src/shivelight/demo/data/shapes.zip from Debian's package sweethome3d-furniture (CC0, CC-BY 3.0).

    apt-get download sweethome3d-furniture          # 1.8-1, 120 MB; needs no installation
    python recipes/shapes/build_data.py --package sweethome3d-furniture_1.8-1_all.deb

Each model is scaled to its size in the catalogue, centred, its longest side 30 of 32 cells; a cell is full where a triangle
passes through it or where air cannot come to it from outside. Left out: what is flat (thinner than 2 cells) or nearly empty, and
what looks like a model before it in any of 8 poses (IoU above 0.8), so that no shape that is judged was learnt under another
name. Needs scipy, which the extra `hy3d` brings, and dpkg-deb.
"""

import argparse
import codecs
import io
import json
import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_fill_holes

from shivelight.demo import shapes
from shivelight.files import replacing

LONGEST = 30  # cells
FLAT = 2  # cells
FEWEST = 60  # full cells
ALIKE = 0.8  # IoU
HELD_OUT = 48  # models, in validation and again in test
# By the file in the package: what the catalogue says of the licence, and who must be named beside the creator.
LICENCES = {
    "BlendSwap-CC-0": ("CC0-1.0", "Blend Swap contributors, converted by Emmanuel Puybaret / eTeks"),
    "BlendSwap-CC-BY": ("CC-BY-3.0", "Blend Swap contributors, converted by Emmanuel Puybaret / eTeks"),
    "KatorLegaz": ("CC-BY-3.0-US", "(C) 2003-2008 Andrew Kator & Jennifer Legaz"),
    "Reallusion": ("CC-BY-3.0-US", "(C) 2008-2016 Reallusion, http://www.reallusion.com/"),
    "Scopia": (
        "CC-BY-3.0",
        "(C) 2014-2020 Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, s.l., http://www.scopia.es",
    ),
}
URLS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
}
NOTICE = """Shapes made from 3D models of the Sweet Home 3D furniture library (http://www.sweethome3d.com/importModels.jsp),
as packed in Debian's sweethome3d-furniture 1.8-1. Each model was changed: scaled, centred, and turned into a grid of
32 x 32 x 32 full and empty cells. Nobody named here endorses this use. Licences:
"""


def read_catalogue(text: str) -> list[dict[str, str]]:
    """The numbered entries of a .properties file, each as its fields."""
    entries: dict[int, dict[str, str]] = {}
    for field, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, flags=re.MULTILINE):
        entries.setdefault(int(number), {})[field] = codecs.decode(value.strip(), "unicode_escape")
    return [entries[number] for number in sorted(entries)]


def read_obj(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and triangles [F, 3] of an OBJ file; polygons become fans."""
    lines = text.splitlines()
    points = " ".join(line[2:] for line in lines if line.startswith("v "))
    # Corners are written vertex/texture/normal, counted from 1.
    polygons = re.sub(r"/\S*", "", "\n".join(line[2:] for line in lines if line.startswith("f "))).split("\n")
    corners = np.array([len(polygon.split()) for polygon in polygons])
    flat = np.array(" ".join(polygons).split(), dtype=np.int64) - 1
    if (flat < 0).any():
        raise ValueError("this OBJ file counts its vertices from the end, which read_obj does not know")
    starts, faces = np.concatenate([[0], corners.cumsum()[:-1]]), []
    for place in range(1, corners.max() - 1):
        first = starts[corners > place + 1]
        faces.append(np.stack([flat[first], flat[first + place], flat[first + place + 1]], axis=1))
    return np.array(points.split(), dtype=np.float64).reshape(-1, 3), np.concatenate(faces)


def placed(vertices: np.ndarray, used: np.ndarray, entry: dict[str, str]) -> np.ndarray:
    """Vertices in cells: turned as the catalogue says, of its width, height and depth, centred, longest side `LONGEST`."""
    if rotation := entry.get("modelRotation"):
        vertices = vertices @ np.array(rotation.split(), dtype=np.float64).reshape(3, 3).T
    low, high = vertices[used].min(0), vertices[used].max(0)
    size = np.array([float(entry[side]) for side in ("width", "height", "depth")])
    extent = np.maximum(high - low, 1e-9)
    # A hair less: a face that lies between two cells belongs to the one inside.
    longest = LONGEST * (1 - 1e-4)
    return (vertices - (low + high) / 2) / extent * (size * longest / size.max()) + shapes.RESOLUTION / 2


def voxels(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """bool [32, 32, 32]: cells that points 0.4 cells apart on the triangles fall into, and what they close in."""
    grid = np.zeros((shapes.RESOLUTION,) * 3, dtype=bool)
    triangles = vertices[faces]
    edges = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=-1).max(1)
    parts = np.maximum(1, np.ceil(edges / 0.4)).astype(int)
    for count in np.unique(parts):
        i, j = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
        i, j = i[i + j <= count], j[i + j <= count]
        weights = np.stack([i, j, count - i - j], axis=1) / count
        group = triangles[parts == count]
        for first in range(0, len(group), max(1, 2_000_000 // len(weights))):
            points = weights @ group[first : first + max(1, 2_000_000 // len(weights))]
            cells = np.clip(points.reshape(-1, 3).astype(int), 0, shapes.RESOLUTION - 1)
            grid[cells[:, 0], cells[:, 1], cells[:, 2]] = True
    return binary_fill_holes(grid)


def solid(grid: np.ndarray) -> bool:
    """Whether a grid is neither flat nor nearly empty."""
    sides = [np.ptp(np.flatnonzero(grid.any(axis=other))) + 1 for other in ((1, 2), (0, 2), (0, 1)) if grid.any()]
    return grid.sum() >= FEWEST and min(sides) > FLAT


def alike(grid: torch.Tensor, others: torch.Tensor, sizes: torch.Tensor) -> bool:
    """Whether a bool grid [32, 32, 32] has an IoU above `ALIKE` with any pose of another.

    Args:
        grid: the new one.
        others: 0 and 1 [C, n] in float, the cells of those before it.
        sizes: float [n], how many cells each of them fills.
    """
    poses = torch.stack([shapes.turned(grid, turn).flatten() for turn in range(8)])
    # Only full cells count: rows of the others that belong to them.
    common = torch.stack([others[pose].sum(0) for pose in poses])
    return bool((common / (sizes + grid.sum() - common) > ALIKE).any())


def collect(package: Path) -> tuple[list[dict[str, str]], torch.Tensor]:
    """What is known of each model that is kept, and their grids [n, 32, 32, 32]."""
    records, left_out = [], Counter()
    cells, sizes = torch.zeros(shapes.RESOLUTION**3, 1000), torch.zeros(1000)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for source, (licence, _) in LICENCES.items():
            archive = zipfile.ZipFile(next(Path(folder).rglob(f"{source}.sh3f")))
            entries = read_catalogue(archive.read("PluginFurnitureCatalog.properties").decode("latin-1"))
            print(f"{source}: {len(entries)} models", flush=True)
            for entry in entries:
                vertices, faces = read_obj(archive.read(entry["model"].lstrip("/")).decode("latin-1"))
                grid = voxels(placed(vertices, np.unique(faces), entry), faces)
                if not solid(grid):
                    left_out["flat or nearly empty"] += 1
                    continue
                tensor = torch.from_numpy(grid)
                count = len(records)
                if alike(tensor, cells[:, :count], sizes[:count]):
                    left_out["like another"] += 1
                    continue
                cells[:, count], sizes[count] = tensor.flatten(), tensor.sum()
                names = {"id": entry["id"], "name": entry.get("name", entry["id"].rsplit("#", 1)[-1])}
                records.append(names | {"category": entry["category"], "creator": entry["creator"], "licence": licence})
    print(f"kept {len(records)}, left out {dict(left_out)}", flush=True)
    return records, cells[:, : len(records)].T.bool().reshape(-1, *(shapes.RESOLUTION,) * 3)


def attribution(records: list[dict[str, str]]) -> str:
    """The text that goes with the grids: licences, who is to be named for which collection, and each model's creator."""
    lines = [NOTICE, *(f"  {name}: {url}" for name, url in URLS.items()), "", "Collections:"]
    lines += [f"  {source} ({licence}): {owner}" for source, (licence, owner) in LICENCES.items()]
    lines += ["", "Models: name, creator, licence, catalogue id"]
    lines += [f"  {r['name']}, {r['creator']}, {r['licence']}, {r['id']}" for r in records]
    return "\n".join(lines) + "\n"


def sheet(grids: torch.Tensor, columns: int = 24) -> Image.Image:
    """Views of all grids in rows, twice their size, to look at."""
    size = 2 * shapes.VIEW_SIZE
    picture = Image.new("L", (columns * size, -(-len(grids) // columns) * size))
    for index, grid in enumerate(grids):
        view = shapes.view(grid).resize((size, size), Image.Resampling.NEAREST)
        picture.paste(view, (index % columns * size, index // columns * size))
    return picture


def main() -> None:
    """Write the archive, whole or not at all, and a sheet of pictures beside the work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="the .deb file")
    parser.add_argument("--out", type=Path, default=shapes.ARCHIVE)
    parser.add_argument("--sheet", type=Path, default=Path("build/shapes/data.png"))
    args = parser.parse_args()
    records, grids = collect(args.package)
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    for place, index in enumerate(order):
        records[index]["split"] = "test" if place < HELD_OUT else "validation" if place < 2 * HELD_OUT else "train"
    # Like beside like packs better, and the split is drawn by now.
    contents = io.BytesIO()
    with zipfile.ZipFile(contents, "w", zipfile.ZIP_LZMA) as archive:
        for name, data in {
            "shapes.bits": np.packbits(grids.numpy()).tobytes(),
            "shapes.json": json.dumps(records, ensure_ascii=False).encode(),
            "ATTRIBUTION.txt": attribution(records).encode(),
        }.items():
            archive.writestr(zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0)), data, zipfile.ZIP_LZMA)
    with replacing(args.out) as unfinished:
        unfinished.write_bytes(contents.getvalue())
    print(f"{args.out}: {len(contents.getvalue()) / 1e6:.2f} MB, {grids.float().mean():.3f} of the cells are full")
    print(Counter(record["split"] for record in records), Counter(record["category"] for record in records))
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet(grids).save(args.sheet)


if __name__ == "__main__":
    main()
