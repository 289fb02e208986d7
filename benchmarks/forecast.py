"""When all blocks run, and what they are expected to make in between: routing of blocks without training on several pipelines.

    python benchmarks/forecast.py                                              # the embedded SD3 pipeline
    python benchmarks/forecast.py --pipeline build/families/flux/pipeline      # a teacher of recipes/train_teacher.py

Writes benchmarks/results/forecast.json; one call measures one pipeline and replaces its family's rows of the same settings.
Validation captions
(the test set judges, and tunes nothing), same seeds, PSNR and SSIM to the dense pictures of the same steps. Each row is one
setting of `Reuse` at one budget; "as it was" is what `RoutingConfig.training_free(axis="blocks")` did before.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from family_quality import teacher_of

import shivelight as sl
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, read_results, write_results

BEFORE = {"growth": 3.0, "forecast": 0.25, "whole": "residual"}
DEFAULTS = ("output:3:0.25", "output:2:0.5", "output:1:1")


def setting_of(text: str) -> dict[str, Any]:
    """Fields of `Reuse` from "output:2:0.5": what is forecast, growth, forecast."""
    whole, growth, forecast = text.split(":")
    return {"whole": whole, "growth": float(growth), "forecast": float(forecast)}


def named(fields: dict[str, Any]) -> str:
    """What a row is called."""
    return "as it was" if fields == BEFORE else "{whole}, growth {growth:g}, forecast {forecast:g}".format(**fields)


def save(path: Path, family: str, measured: dict[str, Any], rows: list[dict[str, Any]], device: str) -> None:
    """Put the rows of a family in the place of its former ones of the same settings; those of other settings stay."""
    before = read_results(path) if path.exists() else {"rows": [], "families": {}}
    results = new_results(device=device, split="validation", backbone={"class": "small, trained, one of each family"})
    results["families"] = before["families"] | {family: measured}
    fresh = {row["variant"] for row in rows}
    rows = [row | {"family": family} for row in rows]
    own = [row for row in before["rows"] if row["family"] == family and row["variant"] not in fresh]
    results["rows"] = [row for row in before["rows"] if row["family"] != family] + own + rows
    write_results(path, results)


def main() -> None:
    """Draw every setting at every budget on one pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="folder; the embedded one by default")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument(
        "--settings", nargs="+", type=setting_of, metavar="WHOLE:GROWTH:FORECAST",
        default=[BEFORE, *map(setting_of, DEFAULTS)],
    )  # fmt: skip
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forecast.json"))
    args = parser.parse_args()
    source = None if args.pipeline is None else str(args.pipeline)
    pipe = common.open_pipeline(source, args.device, torch.bfloat16)
    teacher = teacher_of(args.pipeline)
    known = EmojiData(teacher["subset"]).captions("validation")
    captions = [str(caption) for caption in known if caption.concept.label in teacher["concepts"]][: args.captions]
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    comparison = Comparison(pipe, Setting(teacher["steps"], teacher["guidance"], 0, 16, teacher["options"]))
    family, frame = comparison.routed.spec.name, new_results(device=args.device)
    dense = comparison.pictures(comparison.dense(), captions)
    measured = {name: frame[name] for name in ("command", "commit", "machine")} | {"backbone": describe(pipe)}
    rows: list[dict[str, Any]] = []
    for fields in args.settings:
        name = named(fields)
        for compute in args.compute:
            variant = {"reuse": sl.Reuse(**fields)}
            point = comparison.routed_point("training-free-blocks", compute=compute, variant=variant)
            figures = fidelity_to_dense(comparison.pictures(point, captions), dense).estimates()
            rows.append(
                new_row(
                    point.method, point.budget, variant=name, steps=point.steps, dtype="bfloat16", samples=len(captions),
                    guidance=teacher["guidance"], planned_ratio=comparison.planned(point), **figures,
                )
            )  # fmt: skip
            print(f"{family} {name}, compute {compute:g}: {rows[-1]['psnr_to_dense']:.2f} dB", flush=True)
        mean = sum(row["psnr_to_dense"] for row in rows[-len(args.compute) :]) / len(args.compute)
        print(f"{family} {name}, mean: {mean:.2f} dB", flush=True)
        save(args.out, family, measured, rows, args.device)


if __name__ == "__main__":
    main()
