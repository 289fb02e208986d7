"""Where few steps are taken, which of them may rest, and what stands in for those that do: the forecast's horizon and the growth of
the intervals, beside fewer steps; and what is fitted to stand in.

    python benchmarks/rests.py      # writes benchmarks/results/rests.json

On validation captions, the embedded pipeline at 8 and 12 steps and its distilled form at 4 and 8. Horizons are those of
`Reuse.forecast`, and intervals grow by `Reuse.growth`, without what `Reuse.horizon` and `Reuse.spacing` take off for few steps:
that is what this is to find.

What is fitted (`shivelight.fit_stand_ins`) stands beside the last output at 4 steps of the distilled form, by the number of prompts
(captions of the training split) and the rank of its maps, whole and by half at the step after the last run (`unmended`), judged on
96 validation captions by KID too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.config import Reuse
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.features import feature_network
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.judging import Judge
from shivelight.evaluation.results import new_results, new_row, write_results

OUT = Path("benchmarks/results/rests.json")
OPTIONS = {"max_sequence_length": embedded.TEXT_TOKENS}
COMPUTES = (0.8, 0.65, 0.5)
FEW_COMPUTES, JUDGED = (0.75, 0.5), 96
FITS = ((12, 64), (48, 64), (192, 64), (192, 8))  # prompts and rank


def settings(name: str, pipe: Any, steps: int, guidance: float, captions: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one pipeline and number of steps: growth and forecast at each budget, and fewer steps."""
    comparison = Comparison(pipe, Setting(steps, guidance, 0, len(captions), OPTIONS))
    routed = routed_of(pipe)
    assert routed.config.reuse is not None
    dense, rows = comparison.pictures(comparison.dense(), captions), []

    def row(method: str, budget: dict[str, float], count: int, drawn: Tensor, planned: float, **more: Any) -> None:
        figures = fidelity_to_dense(drawn, dense).estimates()
        rows.append(
            new_row(
                method, budget, steps=count, planned_ratio=planned, samples=len(drawn), guidance=guidance, **figures
            )
        )
        rows[-1] |= {"variant": name, **more}

    for compute in COMPUTES:
        fewer = max(1, round(compute * steps))
        if fewer < steps:
            drawn = comparison.pictures(comparison.dense(fewer), captions)
            row("fewer-steps", {}, fewer, drawn, fewer / steps)
        for growth in (1.0, 2.0):
            for forecast in (0.0, 0.25, 0.5):
                reuse = replace(routed.config.reuse, growth=growth, forecast=forecast)
                whole = patch.object(Reuse, "horizon", lambda self, steps: self.forecast * steps)
                spaced = patch.object(Reuse, "spacing", lambda self, steps: self.growth)
                with whole, spaced, routed.variant(reuse=reuse), routed.switched(True):
                    sl.set_budget(pipe, compute=compute)
                    drawn = comparison.call(captions, steps)
                    planned = sl.planned_ratio(pipe, steps)
                row("rests", {"compute": compute}, steps, drawn, planned, growth=growth, forecast=forecast)
    return rows


def fitted(data: EmojiData, fit_on: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the distilled pipeline with what stands in at steps at rest as it last was, and fitted on more and fewer prompts;
    after the last run, all of it and a half."""
    pipe = embedded.load_few_step(common.DEFAULT_DEVICE)
    steps, rows = embedded.FEW_STEPS, []
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    chosen = data.captions("validation")[:JUDGED]
    captions = [str(caption) for caption in chosen]
    comparison = Comparison(pipe, Setting(steps, 1.0, 0, 24, OPTIONS))
    dense = comparison.pictures(comparison.dense(), captions)
    real = to_tensor([data.render(caption, seed) for seed, caption in enumerate(chosen)])
    judge = Judge(dense, 0, real, feature_network("efflite0"), captions)
    judge.figures("dense", dense)

    def row(method: str, compute: float, **more: Any) -> None:
        drawn = comparison.pictures(comparison.routed_point(method, compute=compute), captions)
        sl.set_budget(pipe, compute=compute)
        planned = sl.planned_ratio(pipe, steps)
        figures = judge.figures(method, drawn)
        rows.append(
            new_row(
                method, {"compute": compute}, steps=steps, guidance=1.0, planned_ratio=planned, samples=len(captions),
                **figures,
            )
            | {"variant": "distilled", **more}
        )  # fmt: skip
        said = {name: round(rows[-1][name], 4) for name in ("psnr_to_dense", "kid_to_dense", "agreement_to_dense")}
        print(method, compute, more, said, flush=True)

    for compute in FEW_COMPUTES:
        row("training-free-blocks", compute)
    for prompts, rank in FITS:
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
        found = sl.fit_stand_ins(
            pipe, fit_on[:prompts], steps=steps, computes=FEW_COMPUTES, guidance=1.0, rank=rank, unmended=1.0, **OPTIONS
        )
        for unmended in (1.0, 0.5):
            for fit in found:
                if unmended < 1:  # one step alone follows the last run, so it is as if it had been fitted so
                    own = routed_of(pipe).stand_ins.find(fit.plan, steps - 1, 0)
                    own.requires_grad_(False).weaken(unmended)
                said = {"prompts": prompts, "rank": rank, "unmended": unmended, "left": list(fit.left)}
                row("blocks-fitted", fit.compute, **said)
    return rows


def main() -> None:
    """Draw all; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    data, device = EmojiData(), common.DEFAULT_DEVICE
    captions = [str(caption) for caption in data.captions("validation")[: args.captions]]
    results = new_results(
        device=device, split="validation", backbone={"class": "the embedded pipeline and its distilled form"}
    )
    known = [str(caption) for caption in data.captions("train")]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1)).tolist()
    results["rows"] = fitted(data, [known[place] for place in order[: max(prompts for prompts, _ in FITS)]])
    write_results(args.out, results)
    for name, steps in (("distilled", 4), ("distilled", 8), ("teacher", 8), ("teacher", 12)):
        few = name == "distilled"
        pipe = (embedded.load_few_step if few else embedded.load_pipeline)(device, torch.bfloat16)
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
        results["rows"] += settings(name, pipe, steps, 1.0 if few else embedded.GUIDANCE, captions)
        write_results(args.out, results)
        print(name, steps, flush=True)


if __name__ == "__main__":
    main()
