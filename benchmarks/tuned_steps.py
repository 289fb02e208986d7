"""Fewer steps tuned in the way that rests are: the fair peer of `blocks-tuned`, on the distilled pipeline.

    python benchmarks/tuned_steps.py      # trains for over an hour on 2 cores, writes benchmarks/results/tuned-steps.json

Where two of four steps rest, the same two steps are taken without rests (`peers/placed_steps.py`), and deltas of the same kind are
trained along them by the same losses: latents of the dense generation before the second step and at the end, and then not to be
told apart from it. Same prompts, dense generations and settings as `recipes/tune_rests.py` has, whose rests had 600 iterations more
of the first loss: the first of their stages also walks three of four steps. Judged on captions of the test split, timed in turns.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from family_quality import FEWEST, judge
from torch import Tensor

import shivelight as sl
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.peers.placed_steps import only, placed_steps
from shivelight.evaluation.results import new_results, write_results
from shivelight.evaluation.standard import adapter_points
from shivelight.execution.folding import FoldedWeights
from shivelight.pipelines import draw
from shivelight.training.tuner import TuneConfig, Tuner
from shivelight.training.walk import Walk

ADAPTERS = embedded.FEW_STEP / "adapters"
ITERATIONS = 700
TEXTURE: dict[str, Any] = {"iterations": 300, "lr": 3e-4, "adversarial": 2.0}
RUNS = (0, 2)
COMPUTE = 0.508  # two of four steps and their maps
OPTIONS = {"max_sequence_length": embedded.TEXT_TOKENS}


class EveryStep(Walk):
    """Nothing rests."""

    def ends(self, step: int) -> bool:
        """Always."""
        return True


class FewerSteps(Tuner):
    """Tunes deltas along `RUNS` alone, towards the latents that the dense generation has before the next of them."""

    walks = EveryStep

    def _draw(self, call: Callable[..., Any], chosen: Sequence[int]) -> None:
        if call is self.pipe:
            super()._draw(call, chosen)
            return
        captions = [self.prompts[place % len(self.prompts)] for place in chosen]
        seeds = [self.config.seed + place for place in chosen]
        with only(self.pipe.scheduler, self.config.steps, RUNS):
            draw(self.pipe, captions, seeds, len(RUNS), self.config.guidance, call=call, **self.options)

    def _wanted(self, chosen: Sequence[int]) -> Tensor:
        ends = [run - 1 for run in (*RUNS[1:], self.config.steps)]
        return super()._wanted(chosen)[ends]


def prompts() -> list[str]:
    """As `recipes/tune_rests.py` has them."""
    captions = [str(caption) for caption in EmojiData().captions("train")]
    return [captions[place] for place in torch.randperm(len(captions), generator=torch.Generator().manual_seed(1))]


def train(work: Path, iterations: int, trajectories: int, texture: int) -> list[Path]:
    """The folders of both stages' deltas; a run that is there is gone on with."""
    pipe = embedded.load_few_step()
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    config = TuneConfig(embedded.FEW_STEPS, (1.0,), guidance=1.0, iterations=iterations, trajectories=trajectories)
    later = TEXTURE | {"iterations": texture}
    stages = ((config, work), (replace(config, **later), work / "texture"))
    return [
        FewerSteps(pipe, prompts(), stage, folder, dense=work / "trajectories", **OPTIONS).run(
            lambda record: print(record, flush=True)
        )
        for stage, folder in stages
    ]


def tuned_steps(comparison: Comparison, weights: FoldedWeights, method: str) -> OperatingPoint:
    """The dense model with these deltas at `RUNS` alone."""
    point = comparison.finetuned(weights)

    @contextmanager
    def state() -> Iterator[None]:
        with point.state(), only(comparison.pipe.scheduler, comparison.setting.steps, RUNS):
            yield

    return replace(point, method=method, steps=len(RUNS), state=state)


def main() -> None:
    """Train, time, draw and judge; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tuned-steps"))
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--trajectories", type=int, default=3328)
    parser.add_argument("--texture", type=int, default=TEXTURE["iterations"], help="iterations of the second stage")
    parser.add_argument(
        "--plain", type=Path, help="what the recipe's stage `two` leaves: `blocks-tuned` before it learns texture"
    )
    parser.add_argument("--count", type=int, default=96, help="captions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tuned-steps.json"))
    args = parser.parse_args()
    if args.count < FEWEST:
        parser.error(f"{args.count} captions; an interval of KID needs {FEWEST}")
    common.quiet_libraries()
    folders = train(args.work, args.iterations, args.trajectories, args.texture)
    if args.train_only:
        return
    common.keep_freed_memory()
    pipe = embedded.load_few_step("cpu", torch.bfloat16)
    names = ("fewer-steps-tuned-plain", "fewer-steps-tuned")
    tuned = {name: read_deltas(pipe, folder) for name, folder in zip(names, folders, strict=True)}
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
    comparison = Comparison(pipe, Setting(embedded.FEW_STEPS, 1.0, 0, 24, OPTIONS))
    points = [comparison.dense(), placed_steps(comparison, RUNS)]
    points += [tuned_steps(comparison, weights, method) for method, weights in tuned.items()]
    points += [comparison.training_free("blocks", compute=0.5)]
    for folder in (ADAPTERS / "blocks-fitted", args.plain, ADAPTERS / "blocks-tuned"):
        if folder is not None:
            own = adapter_points(comparison, read_adapter(pipe, folder), ablations=False, compute=COMPUTE)
            points += [
                replace(point, method=f"{point.method}-plain") if folder == args.plain else point for point in own
            ]
    results = new_results(device="cpu", split="test", feature_network="efflite0", backbone=describe(pipe))
    texture = TEXTURE | {"iterations": args.texture}
    results |= {"iterations": args.iterations, "trajectories": args.trajectories, "texture": texture}
    data = EmojiData()
    shown = ("planned_ratio", "speedup", "psnr_to_dense", "kid", "kid_to_dense", "caption_agreement")
    for row in judge(comparison, points, data, data.captions("test")[: args.count], args.rounds):
        results["rows"].append(row)
        print(row["method"], {name: round(row[name], 4) for name in shown if name in row}, flush=True)
        write_results(args.out, results)


if __name__ == "__main__":
    main()
