"""Quality and speed of routing on a trained teacher of any family, beside fewer steps: the table that `shivelight evaluate`
makes of the embedded pipeline.

    python benchmarks/family_quality.py                                       # the embedded SD3 pipeline and its adapters
    python benchmarks/family_quality.py --pipeline build/flux/pipeline \\
        --adapter build/flux/adapters/tokens-reuse --adapter build/flux/adapters/blocks-refresh

Writes benchmarks/results/families-quality.json: one call judges one pipeline and replaces the rows of its family; those of
the others stay, each family with the command, commit and machine it was measured with. Captions are those of the test split
that name concepts the teacher has seen (teacher.json, which recipes/train_teacher.py writes); nothing was tuned on them. Each
is drawn from --seeds noises. Speed-ups are of one-sample generations timed in turns; `kid_to_dense` is the paired difference
to the dense pictures' KID, below 0 nearer to the data. Intervals resample pictures: the noises of one caption count as
independent.

With --add, rows that the file has of this family stay, but for those of the methods --anew, and only the others are drawn. With
--retime nothing is drawn: all rows that the file has are timed anew, since times depend on what else a machine does and pictures
do not. --peers adds the caches of diffusers where the family has them.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import shivelight as sl
from shivelight.adapter_files import read_adapter
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import Caption, EmojiData
from shivelight.errors import BudgetError
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting, point_key
from shivelight.evaluation.features import feature_network
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.judging import Judge
from shivelight.evaluation.peers import cache_points
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.evaluation.standard import adapter_points, training_free_points

OUT = Path("benchmarks/results/families-quality.json")
FEWEST = 40


def teacher_of(folder: Path | None) -> dict[str, Any]:
    """What the recipe wrote beside the pipeline; of the embedded one, what it was trained with."""
    record = None if folder is None else folder / "teacher.json"
    if record is not None and record.exists():
        return json.loads(record.read_text())
    return {
        "subset": "basic",
        "concepts": [concept.label for concept in EmojiData().concepts],
        "steps": embedded.STEPS,
        "guidance": embedded.GUIDANCE,
        "options": {"max_sequence_length": embedded.TEXT_TOKENS},
    }


def captions_of(teacher: dict[str, Any], count: int, seeds: int) -> tuple[EmojiData, list[Caption]]:
    """The data, and up to `count` test captions of the teacher's concepts, all of them `seeds` times over."""
    data = EmojiData(teacher["subset"])
    chosen = [caption for caption in data.captions("test") if caption.concept.label in teacher["concepts"]]
    return data, chosen[:count] * seeds


def table(
    comparison: Comparison, adapters: Sequence[Path], computes: Sequence[float], axes: Sequence[str]
) -> tuple[list[OperatingPoint], list[str]]:
    """Dense, then at each budget fewer steps, routing without training and the adapters; and why some are left out."""
    loaded = [read_adapter(comparison.pipe, folder) for folder in adapters]
    points, reasons = [comparison.dense()], []
    for compute in computes:
        points.append(comparison.dense(max(1, round(compute * comparison.setting.steps))))
        free, missing = training_free_points(comparison, compute=compute)
        wanted = {"training-free" if axis == "tokens" else f"training-free-{axis}" for axis in axes}
        points += [point for point in free if point.method in wanted]
        reasons += missing
        for folder, adapter in zip(adapters, loaded, strict=True):
            for point in adapter_points(comparison, adapter, ablations=False, compute=compute):
                try:
                    comparison.planned(point)
                except BudgetError as error:
                    reasons.append(f"{folder.name} {point.name}: {error}")
                else:
                    points.append(point)
    return points, list(dict.fromkeys(reasons))


def judge(
    comparison: Comparison, points: Sequence[OperatingPoint], data: EmojiData, chosen: Sequence[Caption], rounds: int
) -> Iterator[dict[str, Any]]:
    """Times the points in turns, then draws one after the other and compares it with the dense pictures and with the data."""
    captions = [str(caption) for caption in chosen]
    timings = comparison.time(points, rounds, captions=captions)
    network = feature_network("efflite0").to(comparison.pipe.device)
    real = to_tensor([data.render(c, seed) for seed, c in enumerate(chosen)])
    judge_: Judge | None = None
    for point in points:
        planned, drawn = comparison.planned(point), comparison.pictures(point, captions)
        judge_ = judge_ or Judge(drawn, comparison.setting.seed, real, network, captions)
        figures = judge_.figures(point.method, drawn)
        yield new_row(
            point.method, point.budget, steps=point.steps, batch=1, guidance=comparison.setting.guidance,
            dtype=str(comparison.backbone.dtype).removeprefix("torch."), samples=len(drawn), planned_ratio=planned,
            realised=comparison.realised.get(point.name),
            **comparison.clock(timings, point, points[0], planned), **figures,
        )  # fmt: skip


def save(path: Path, family: str, measured: dict[str, Any], rows: Sequence[dict[str, Any]], device: str) -> None:
    """Put the rows of a family in the place of its former ones."""
    before = read_results(path) if path.exists() else {"rows": [], "families": {}}
    results = new_results(
        device=device,
        split="test",
        feature_network="efflite0",
        backbone={"class": "small, trained, one of each family"},
    )
    results["families"] = before["families"] | {family: measured}
    results["rows"] = [row for row in before["rows"] if row["family"] != family]
    results["rows"] += [row | {"family": family} for row in rows]
    write_results(path, results)


def rows_of(path: Path, family: str) -> list[dict[str, Any]]:
    """What a file has of a family."""
    return [row for row in read_results(path)["rows"] if row["family"] == family] if path.exists() else []


def retime(
    comparison: Comparison, points: Sequence[OperatingPoint], path: Path, family: str, captions: Sequence[str],
    rounds: int, device: str,
) -> None:  # fmt: skip
    """Give the rows of a family another clock."""
    results = read_results(path)
    rows = [row for row in results["rows"] if row["family"] == family]
    comparison.retime(rows, points, rounds, captions)
    for row in rows:
        print(
            f"{row['method']} {row['budget']} {row['steps']}: {row['latency_ms']['median']:.0f} ms, {row['speedup']:.2f}x"
        )
    frame = new_results(device=device)
    results["families"][family]["clock"] = {name: frame[name] for name in ("command", "commit", "machine")}
    write_results(path, results)


def main() -> None:
    """Judge one pipeline; write its rows beside those of the other families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="folder; the embedded one by default")
    parser.add_argument(
        "--adapter", type=Path, action="append", help="folder; of the embedded pipeline its own by default"
    )
    parser.add_argument(
        "--axes", nargs="+", choices=["tokens", "blocks", "both"], default=["tokens", "blocks", "both"],
        help="of routing without training",
    )  # fmt: skip
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--count", type=int, default=64, help="captions")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each caption")
    parser.add_argument("--steps", type=int, help="of the dense reference; the teacher's own by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    parser.add_argument("--peers", action="store_true", help="also the caches that come with diffusers")
    parser.add_argument("--add", action="store_true", help="draw only what the file lacks")
    parser.add_argument("--anew", nargs="+", default=[], help="with --add: methods whose rows are drawn again")
    parser.add_argument("--retime", action="store_true", help="time what the file has, and draw nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    source = None if args.pipeline is None else str(args.pipeline)
    pipe = common.open_pipeline(source, args.device, getattr(torch, args.dtype))
    teacher = teacher_of(args.pipeline)
    shipped = [embedded.REUSING, embedded.REFRESHING] if source is None else []
    data, chosen = captions_of(teacher, args.count, args.seeds)
    if len(chosen) < FEWEST:
        parser.error(f"{len(chosen)} pictures; an interval of KID needs {FEWEST}: raise --count or --seeds")
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    setting = Setting(args.steps or teacher["steps"], teacher["guidance"], 0, args.batch, teacher["options"])
    comparison = Comparison(pipe, setting)
    family = comparison.routed.spec.name
    points, reasons = table(comparison, args.adapter or shipped, args.compute, args.axes)
    points += cache_points(comparison) if args.peers else []
    for reason in reasons:
        print("left out:", reason)
    if args.retime:
        retime(comparison, points, args.out, family, [str(caption) for caption in chosen], args.rounds, args.device)
        return
    print(f"{family}: {len(points)} rows, {len(chosen)} pictures, {len(set(chosen))} captions", flush=True)
    frame = new_results(device=args.device)
    known = [row for row in rows_of(args.out, family) if row["method"] not in args.anew] if args.add else []
    there = {point_key(row): row for row in known}
    points = [points[0], *(point for point in points[1:] if point_key(point) not in there)]
    measured: dict[str, Any] = {
        **{name: frame[name] for name in ("command", "commit", "machine")},
        "backbone": describe(pipe),
        "concepts": teacher["concepts"],
        "captions": len(set(chosen)),
        "seeds": args.seeds,
        "left_out": reasons,
    }
    if there:
        measured = read_results(args.out)["families"][family] | {"added": {n: frame[n] for n in ("command", "commit")}}
    rows = list(there.values())
    shown = ("planned_ratio", "speedup", "psnr_to_dense", "ssim_to_dense", "kid", "kid_to_dense")
    for point, row in zip(points, judge(comparison, points, data, chosen, args.rounds), strict=True):
        if point_key(point) not in there:
            rows.append(row)
        print(point.name, {name: round(row[name], 3) for name in shown if name in row}, flush=True)
        save(args.out, family, measured, rows, args.device)


if __name__ == "__main__":
    main()
