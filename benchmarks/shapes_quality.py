"""Routing on Hunyuan3D's own classes, trained small: how near the shapes stay to the dense ones of the same views and noise.

    pip install 'shivelight[hy3d]' && pip install --no-deps hy3dgen==2.0.2
    python recipes/shapes/encoder.py && python recipes/shapes/train_decoder.py && python recipes/shapes/train_teacher.py
    python benchmarks/shapes_quality.py        # writes benchmarks/results/shapes-quality.json

Views of shapes that no training saw, one noise each, guidance and Euler steps by hy3dgen's own pipeline. IoU and Chamfer distance
are of the decoded 32-cell grids, to those of the dense generation and to the shape of the view; a generation without a full cell
counts in the IoU and is told in `empty`. Blocks and tokens are routed without training; `fewer-steps` has the same planned FLOPs.
Speed-ups are of one view at a time, in turns, of the denoiser (`speedup`) and of a whole generation of latents. An adapter that
was trained for the same pipeline is measured with --adapter.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import shivelight as sl
from shivelight.demo import shape_pipeline
from shivelight.demo.shapes import ShapeData, Split, view
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.evaluation.shapes import chamfer, iou
from shivelight.measurement.statistics import bootstrap


class ShapeComparison(Comparison):
    """The comparison of pictures, of views and their latents: "captions" are numbers of views."""

    def __init__(self, pipe: Any, setting: Setting, split: Split, count: int) -> None:
        super().__init__(pipe, setting)
        self.truth = ShapeData().grids(split)[:count]
        self.views = [view(grid) for grid in self.truth]
        self.names = [str(index) for index in range(len(self.views))]

    def call(self, captions: Sequence[str], steps: int, first_seed: int | None = None) -> Tensor:
        """Latents [n, N, C]; a caption that is no number stands for any view."""
        chosen = [self.views[int(caption) if caption.isdecimal() else 0] for caption in captions]
        seed = self.setting.seed if first_seed is None else first_seed
        return shape_pipeline.generate(self.pipe, chosen, steps, self.setting.guidance, seed)

    def shapes(self, point: OperatingPoint) -> Tensor:
        """bool [n, 32, 32, 32] of all views."""
        return shape_pipeline.occupancy(self.pipe, self.pictures(point, self.names))


def figures(grids: Tensor, references: Tensor, name: str) -> dict[str, Any]:
    """IoU of all pairs and Chamfer distance of those where neither is empty, with intervals."""
    distance = chamfer(grids, references)
    distance = distance[distance.isfinite()]
    measured: dict[str, Any] = {f"iou_to_{name}": bootstrap(iou(grids, references))}
    if len(distance) > 1:
        measured[f"chamfer_to_{name}"] = bootstrap(distance)
    return measured


def describe(pipe: Any) -> dict[str, Any]:
    """The backbone, as results.json has it."""
    own = sum(p.numel() for name, p in pipe.model.named_parameters() if not name.startswith("shivelight."))
    tokens = pipe.vae.latent_shape[0]
    return {
        "class": type(pipe.model).__name__,
        "parameters": own,
        "tokens": tokens,
        "text_tokens": pipe.conditioner.tokens,
    }


def main() -> None:
    """Generate, decode and time every row, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("build/shapes/teacher/pipeline.pt"))
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="folder of a learned adapter; repeatable"
    )
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    parser.add_argument("--views", type=int, default=48)
    parser.add_argument("--steps", type=int, default=shape_pipeline.STEPS)
    parser.add_argument("--guidance", type=float, default=shape_pipeline.GUIDANCE)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--axes", nargs="+", choices=["blocks", "tokens", "both"], default=["blocks", "tokens", "both"])
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shapes-quality.json"))
    args = parser.parse_args()
    pipe = shape_pipeline.open_pipeline(args.pipeline)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7, axis="blocks"))
    comparison = ShapeComparison(pipe, Setting(args.steps, args.guidance, 0, 16), args.split, args.views)
    reference = comparison.dense()
    points = [reference]
    for compute in args.compute:
        points += [comparison.training_free(axis, compute=compute) for axis in args.axes]
        points.append(comparison.dense(round(compute * args.steps)))
    dense = comparison.shapes(reference)
    rows: list[dict[str, Any]] = []

    def judge(comparison: ShapeComparison, points: list[OperatingPoint]) -> None:
        timings = comparison.time(points, args.rounds, captions=comparison.names) if args.rounds else None
        for point in points:
            planned = comparison.planned(point)
            grids = dense if point.method == "dense" else comparison.shapes(point)
            measured = {} if point.method == "dense" else figures(grids, dense, "dense")
            measured |= figures(grids, comparison.truth, "truth")
            if timings is not None:
                measured |= comparison.clock(timings, point, points[0], planned)
            rows.append(
                new_row(
                    point.method, point.budget, steps=point.steps, dtype="float32", samples=len(grids), batch=1,
                    guidance=args.guidance, planned_ratio=planned, realised=comparison.realised.get(point.name),
                    empty=int((~grids.flatten(1).any(1)).sum()), **measured,
                )
            )  # fmt: skip
            shown = (
                "planned_ratio",
                "speedup",
                "iou_to_dense",
                "chamfer_to_dense",
                "iou_to_truth",
                "chamfer_to_truth",
                "empty",
            )
            values = {name: round(rows[-1][name], 4) for name in shown if name in rows[-1]}
            print(f"{point.name:<44} {values}", flush=True)

    def keep() -> None:
        # Written after each part: nothing that was measured is lost with what comes after it.
        results = new_results(device="cpu", backbone=describe(pipe), split=args.split)
        results["rows"] = rows
        write_results(args.out, results)

    judge(comparison, points)
    keep()
    for folder in args.adapter:
        sl.load_adapter(pipe, folder)
        learned = ShapeComparison(pipe, comparison.setting, args.split, args.views)
        method = folder.name
        judge(learned, [learned.dense(), *(learned.routed_point(method, compute=compute) for compute in args.compute)])
        del rows[-1 - len(args.compute)]  # the dense row again
        keep()


if __name__ == "__main__":
    main()
