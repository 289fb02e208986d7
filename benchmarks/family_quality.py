"""Quality and speed of routing on a trained teacher of any family, beside fewer steps: the table that `shivelight evaluate`
makes of the embedded pipeline.

    python benchmarks/family_quality.py                                       # the embedded SD3 pipeline and its adapters
    python benchmarks/family_quality.py --pipeline build/flux/pipeline \\
        --adapter build/flux/adapters/tokens-reuse --adapter build/flux/adapters/blocks-refresh

Writes benchmarks/results/families-quality.json: one call judges one pipeline and replaces the rows of its family; those of the
others stay, each family with the command, commit and machine it was measured with. Captions are those of the test split that name
concepts the teacher has seen (teacher.json, which recipes/train_teacher.py writes); nothing was tuned on them. Each is drawn
from --seeds noises. Speed-ups are of one-sample generations timed in turns; `kid_to_dense` is the paired difference to
the dense pictures' KID, below 0 nearer to the data. Intervals resample pictures: the noises of one caption count as
independent.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
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
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.distribution import fd, kid, kid_difference
from shivelight.evaluation.features import extract_features, feature_network
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.evaluation.standard import adapter_points, training_free_points

OUT = Path("benchmarks/results/families-quality.json")
FEWEST = 40


class FamilyComparison(Comparison):
    """A comparison whose negative prompt, where the setting has one, is said once for each caption."""

    def call(self, captions: Sequence[str], steps: int, first_seed: int | None = None) -> torch.Tensor:
        """Pictures [n, 3, H, W] in [0, 1] of some captions, in the state that is in force."""
        setting = self.setting
        if (negative := setting.options.get("negative_prompt")) is not None:
            self.setting = replace(setting, options=setting.options | {"negative_prompt": [negative] * len(captions)})
        try:
            return super().call(captions, steps, first_seed)
        finally:
            self.setting = setting


def teacher_of(folder: Path | None) -> dict[str, Any]:
    """What the recipe wrote beside the pipeline; of the embedded one, what it was trained with."""
    record = None if folder is None else folder / "teacher.json"
    if record is not None and record.exists():
        return json.loads(record.read_text())
    return {
        "subset": "basic",
        "concepts": [concept.label for concept in EmojiData().concepts],
        "steps": embedded.STEPS,
        "guidance": {"guidance_scale": embedded.GUIDANCE},
        "options": {"max_sequence_length": embedded.TEXT_TOKENS},
    }


def setting_of(teacher: dict[str, Any], steps: int | None, batch: int) -> Setting:
    """How the teacher is sampled; guidance by another name than diffusers' usual one stands in the options."""
    ((name, scale),) = teacher["guidance"].items()
    options = dict(teacher["options"])
    if name != "guidance_scale":
        options[name] = scale
    return Setting(steps or teacher["steps"], scale, 0, batch, options)


def captions_of(teacher: dict[str, Any], count: int, seeds: int) -> tuple[EmojiData, list[Caption]]:
    """The data, and up to `count` test captions of the teacher's concepts, all of them `seeds` times over."""
    data = EmojiData(teacher["subset"])
    chosen = [caption for caption in data.captions("test") if caption.concept.label in teacher["concepts"]]
    return data, chosen[:count] * seeds


def table(
    comparison: Comparison, adapters: Sequence[Path], computes: Sequence[float]
) -> tuple[list[OperatingPoint], list[str]]:
    """Dense, then at each budget fewer steps, routing without training and the adapters; and why some are left out."""
    loaded = [read_adapter(comparison.pipe, folder) for folder in adapters]
    points, reasons = [comparison.dense()], []
    for compute in computes:
        points.append(comparison.dense(max(1, round(compute * comparison.setting.steps))))
        free, missing = training_free_points(comparison, compute=compute)
        points += free
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
) -> list[dict[str, Any]]:
    """Times the points in turns, draws them all, and compares each with the dense pictures and with the data."""
    captions = [str(caption) for caption in chosen]
    timings = comparison.time(points, rounds, captions=captions, progress=lambda name: print("timed", name, flush=True))
    network = feature_network("efflite0").to(comparison.pipe.device)
    real = extract_features(to_tensor([data.render(c, seed) for seed, c in enumerate(chosen)]), network)
    rows: list[dict[str, Any]] = []
    dense, dense_features = torch.empty(0), torch.empty(0)
    for point in points:
        planned, drawn = comparison.planned(point), comparison.pictures(point, captions)
        features = extract_features(drawn, network)
        figures: dict[str, Any] = {"kid": kid(real, features), "fd": fd(real, features)}
        if point is points[0]:
            dense, dense_features = drawn, features
        else:
            figures |= fidelity_to_dense(drawn, dense, comparison.setting.seed).estimates()
            figures["kid_to_dense"] = kid_difference(real, features, dense_features)
        rows.append(
            new_row(
                point.method, point.budget, steps=point.steps, batch=1, guidance=comparison.setting.guidance,
                dtype=str(comparison.backbone.dtype).removeprefix("torch."), samples=len(drawn), planned_ratio=planned,
                realised=comparison.realised.get(point.name),
                **comparison.clock(timings, point, points[0], planned), **figures,
            )
        )  # fmt: skip
        shown = ("planned_ratio", "speedup", "psnr_to_dense", "ssim_to_dense", "kid", "kid_to_dense")
        print(point.name, {name: round(rows[-1][name], 3) for name in shown if name in rows[-1]}, flush=True)
    return rows


def main() -> None:
    """Judge one pipeline; write its rows beside those of the other families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="folder; the embedded one by default")
    parser.add_argument(
        "--adapter", type=Path, action="append", help="folder; of the embedded pipeline its own by default"
    )
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--count", type=int, default=64, help="captions")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each caption")
    parser.add_argument("--steps", type=int, help="of the dense reference; the teacher's own by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
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
    comparison = FamilyComparison(pipe, setting_of(teacher, args.steps, args.batch))
    family = comparison.routed.spec.name
    points, reasons = table(comparison, args.adapter or shipped, args.compute)
    for reason in reasons:
        print("left out:", reason)
    print(f"{family}: {len(points)} rows, {len(chosen)} pictures of {len(set(chosen))} captions each", flush=True)
    rows = judge(comparison, points, data, chosen, args.rounds)

    results = new_results(device=args.device, split="test", feature_network="efflite0")
    measured = {name: results[name] for name in ("commit", "machine")} | {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "backbone": describe(pipe),
        "concepts": teacher["concepts"],
        "captions": len(set(chosen)),
        "seeds": args.seeds,
    }
    before = read_results(args.out) if args.out.exists() else {"rows": [], "families": {}}
    results["backbone"] = {"class": "every family, tiny, trained"}
    results["families"] = before["families"] | {family: measured | ({"left_out": reasons} if reasons else {})}
    kept = [row for row in before["rows"] if row["family"] != family]
    results["rows"] = kept + [row | {"family": family} for row in rows]
    write_results(args.out, results)


if __name__ == "__main__":
    main()
