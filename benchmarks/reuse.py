"""Routing without training on the embedded pipeline: what reuse needs, part by part, beside fewer steps.

    python benchmarks/reuse.py        # writes benchmarks/results/reuse.json

Validation captions (the test set judges, and tunes nothing), same seeds, PSNR and SSIM to the dense pictures. The rows vary
one field of `Reuse` at a time from its default; `no-reuse` lets rejected tokens pass through unchanged; the shipped adapters
learned with or without reuse; `blocks` and `both` leave out whole blocks, and blocks and tokens, at the
planned FLOPs of the default; the rows of blocks after them vary who decides.
"""

import argparse
import math
from pathlib import Path
from typing import Any, Literal

import torch

import shivelight as sl
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, write_results

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no context": {"context": False},
    "no forecast": {"forecast": 0.0},
    "max_age 3": {"max_age": 3},
    **{f"warmup {share}": {"warmup": share} for share in (0.04, 0.12, 0.36)},
}
# At intervals what all blocks add is forecast, as when these rows were taken; benchmarks/forecast.py has the output too.
RESIDUAL: dict[str, Any] = {"whole": "residual"}
# Who decides which blocks run, and with which settings of their reuse.
BLOCK_VARIANTS: dict[str, tuple[Literal["interval", "age", "drift"], dict[str, Any]]] = {
    "at intervals": ("interval", RESIDUAL),
    "at intervals, no forecast": ("interval", RESIDUAL | {"forecast": 0.0}),
    "at intervals, forecast 0.15": ("interval", RESIDUAL | {"forecast": 0.15}),
    "at intervals, forecast 0.35": ("interval", RESIDUAL | {"forecast": 0.35}),
    "by age": ("age", {}),
    "by age, no forecast": ("age", {"forecast": 0.0}),
    "by drift, no forecast": ("drift", {"forecast": 0.0}),
}


def main() -> None:
    """Draw every variant and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reuse.json"))
    args = parser.parse_args()
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.attach(pipe, sl.RoutingConfig.training_free())
    setting = Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, {"max_sequence_length": embedded.TEXT_TOKENS})
    comparison = Comparison(pipe, setting)
    captions = [str(caption) for caption in EmojiData().captions("validation")[: args.captions]]
    dense = comparison.pictures(comparison.dense(), captions)
    rows: list[dict[str, Any]] = []

    def judge(name: str, point: OperatingPoint) -> float:
        planned = comparison.planned(point)
        figures = fidelity_to_dense(comparison.pictures(point, captions), dense).estimates()
        rows.append(
            new_row(
                point.method, point.budget, variant=name, steps=point.steps, dtype="bfloat16", samples=len(captions),
                guidance=setting.guidance, planned_ratio=planned, **figures,
            )
        )  # fmt: skip
        row = rows[-1]
        print(f"{name:>14} {point.name:<32} planned {planned:.3f}  PSNR {row['psnr_to_dense']:.2f} dB", flush=True)
        return planned

    plans, defaults = set(), []
    for keep in args.keep:
        for name, fields in VARIANTS.items():
            planned = judge(
                name, comparison.routed_point("training-free", keep=keep, variant={"reuse": sl.Reuse(**fields)})
            )
            plans.add(round(planned * setting.steps))
            if not fields:
                defaults.append(math.floor(1e4 * planned) / 1e4)
        for scores in ("norm", "random"):
            judge(f"{scores} scores", comparison.routed_point(f"{scores}+reuse", keep=keep, variant={"scores": scores}))
    plans |= {round(compute * setting.steps) for compute in args.compute}
    for steps in sorted(plans, reverse=True):
        judge("", comparison.dense(steps))
    for axis in ("blocks", "both"):
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.7, axis=axis))
        comparison = Comparison(pipe, setting)
        for plan in defaults:
            judge(axis, comparison.routed_point("training-free", compute=plan))
    for name, (router, fields) in BLOCK_VARIANTS.items():
        routing = sl.BlockRouting(router=router, widths=(1.0,))
        sl.attach(pipe, sl.RoutingConfig(None, routing, reuse=sl.Reuse(**fields)))
        comparison = Comparison(pipe, setting)
        for compute in args.compute:
            judge(name, comparison.routed_point("training-free-blocks", compute=compute))
    sl.attach(pipe, sl.RoutingConfig(sl.TokenRouting(scores="random", ratios="fixed")))
    comparison = Comparison(pipe, setting)
    for keep in args.keep:
        judge("no-reuse", comparison.routed_point("random", keep=keep))
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, setting)
    for keep in args.keep:
        judge("trained without reuse", comparison.tokens(keep))
        judge(
            "trained without reuse", comparison.routed_point("tokens+reuse", keep=keep, variant={"reuse": sl.Reuse()})
        )
    sl.load_adapter(pipe, embedded.REUSING)
    comparison = Comparison(pipe, setting)
    for keep in args.keep:
        judge("trained with reuse", comparison.routed_point("tokens+reuse", keep=keep))
    for compute in args.compute:
        judge("trained with reuse", comparison.routed_point("tokens+reuse", compute=compute))
    sl.load_adapter(pipe, embedded.REFRESHING)
    comparison = Comparison(pipe, setting)
    for name, fields in {
        "trained with reuse": {},
        "no forecast": {"forecast": 0.0},
        "no warm-up": {"warmup": 0.0},
    }.items():
        for compute in args.compute:
            variant = {"reuse": sl.Reuse(**fields)}
            judge(name, comparison.routed_point("blocks-refresh+reuse", compute=compute, variant=variant))
    results = new_results(device=common.DEFAULT_DEVICE, backbone=describe(pipe), split="validation")
    results["rows"] = rows
    write_results(args.out, results)


if __name__ == "__main__":
    main()
