"""Fewer steps with solvers of higher order, beside blocks without training on the pipeline's own first-order one.

    python benchmarks/solvers.py        # writes benchmarks/results/solvers.json

Validation captions, same seeds. `psnr_to_dense` is to the picture of the pipeline's own 25 Euler steps, `psnr_to_fine` to that
of 100, which no method imitates. A solver and its step count are one row; blocks without training run at the FLOPs of 12 steps.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import shivelight as sl
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, write_results

FINE = 100


def main() -> None:
    """Draw every row and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/solvers.json"))
    args = parser.parse_args()
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    comparison = Comparison(pipe, Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, common.call_options(pipe, None)))
    captions = [str(caption) for caption in EmojiData().captions("validation")[: args.captions]]
    euler, shift = pipe.scheduler, pipe.scheduler.config.shift
    dense, fine = (comparison.pictures(comparison.dense(steps), captions) for steps in (embedded.STEPS, FINE))
    rows: list[dict[str, Any]] = []

    def judge(solver: str, point: OperatingPoint) -> None:
        planned, drawn = comparison.planned(point), comparison.pictures(point, captions)
        figures = {} if solver == "Euler" and point.method == "dense" else fidelity_to_dense(drawn, dense).estimates()
        to_fine = fidelity_to_dense(drawn, fine).estimates()["psnr_to_dense"]
        rows.append(
            new_row(
                point.method, point.budget, variant=solver, steps=point.steps, dtype="bfloat16", samples=len(captions),
                guidance=embedded.GUIDANCE, planned_ratio=planned, psnr_to_fine=to_fine, **figures,
            )
        )  # fmt: skip
        print(
            {name: rows[-1].get(name) for name in ("method", "variant", "steps", "psnr_to_dense", "psnr_to_fine")},
            flush=True,
        )

    judge("Euler", comparison.dense())
    judge("Euler", comparison.routed_point("training-free-blocks", compute=0.5))
    solvers: dict[str, Any] = {"Euler": euler}
    for solver in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        name = solver.__name__.removesuffix("MultistepScheduler")
        solvers[name] = solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for name, scheduler in solvers.items():
        pipe.scheduler = scheduler
        for steps in args.steps:
            judge(name, comparison.dense(steps))
    results = new_results(device=common.DEFAULT_DEVICE, backbone=describe(pipe), split="validation")
    results["rows"] = rows
    write_results(args.out, results)


if __name__ == "__main__":
    main()
