"""Shapes on a CPU, dense against routed, eager and compiled, batch 1 and 4: what the plan promises, by the clock.

    python benchmarks/cpu.py --out benchmarks/results/bench-cpu.json

Each group (a shape, a batch, compiled or not) is one process's interleaved run; the file is written after each, so that what
was measured stays if a later one is cut off, and groups that it holds are not measured again.
"""

import argparse
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from shivelight.backbones.presets import read_preset
from shivelight.cli import common
from shivelight.evaluation.bare import BareLoop, bare_points, timed_rows
from shivelight.evaluation.results import new_results, write_results


@dataclass(frozen=True)
class Shape:
    """What of a published shape fits: `blocks` of each kind, `tokens` of the picture."""

    name: str
    blocks: int | None
    tokens: int | None
    dtype: torch.dtype
    steps: int
    batches: tuple[int, ...]


SHAPES = (
    Shape("sd3-cpu", None, None, torch.float32, 4, (1, 4)),
    Shape("dit-xl-2-256", 8, None, torch.float32, 4, (1, 4)),
    Shape("flux1-dev", 2, 1024, torch.bfloat16, 2, (1,)),
)
KEEPS = (0.8, 0.6, 0.4)
# A plan of few steps is coarse, and the whole batch of four is slow: these are timed where they tell something.
COMPUTES = (0.75, 0.5)


def main() -> None:
    """All groups that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of shapes")
    parser.add_argument("--batches", type=int, nargs="*", help="of these alone")
    arguments = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else None
    results = new_results(seed=0, backbone={"class": "published shapes, random weights"})
    if known is not None:
        results["rows"] = known["rows"]
    for shape in SHAPES:
        for batch in shape.batches:
            for compiled in (False, True):
                if arguments.only and shape.name not in arguments.only:
                    continue
                if arguments.batches and batch not in arguments.batches:
                    continue
                if any(
                    row["variant"] == shape.name and row["batch"] == batch and row["compiled"] == compiled
                    for row in results["rows"]
                ):
                    continue
                results["rows"] += group(shape, batch, compiled, arguments.rounds)
                write_results(arguments.out, results)
                gc.collect()


def group(shape: Shape, batch: int, compiled: bool, rounds: int) -> list[dict]:
    """Rows of one interleaved run."""
    preset = read_preset(shape.name)
    model = preset.build("cpu", shape.dtype, shape.blocks)
    loop = BareLoop(model, batch, shape.tokens or preset.image_tokens, preset.text_tokens, shape.steps)
    if compiled:
        loop.compile()
    points, _ = bare_points(loop, KEEPS, COMPUTES if batch == 1 else ())
    described = {
        "variant": shape.name, "title": preset.title, "image_tokens": loop.shape[0], "text_tokens": loop.shape[1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    if shape.blocks is not None:
        described["blocks_of_a_kind"] = shape.blocks
    with common.progress_bar(f"{shape.name} batch {batch}", (rounds + 1) * (1 + compiled + len(points))) as advance:
        rows = timed_rows(loop, points, rounds, 0, advance, described)
    if loop.regions is not None:
        common.say(f"{preset.title}: {loop.regions}")
        rows[0] |= {"graphs": loop.regions.graphs, "compile_seconds": round(loop.regions.seconds, 1)}
    return rows


if __name__ == "__main__":
    main()
