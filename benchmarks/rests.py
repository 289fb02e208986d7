"""Where few steps are taken, which of them may rest, and what stands in for those that do: the forecast's horizon and the growth of
the intervals, beside fewer steps; and a stand-in that is fitted.

    python benchmarks/rests.py      # writes benchmarks/results/rests.json

On validation captions, the embedded pipeline at 8 and 12 steps and its distilled form at 4 and 8. Horizons are those of
`Reuse.forecast`, and intervals grow by `Reuse.growth`, without what `Reuse.horizon` and `Reuse.spacing` take off for few steps:
that is what this is to find.

The fitted stand-in is an experiment, not a part of the library: at a step that rests, the last block's output is a linear map of
what the first block is given now and of what it was given and the last block made a step (and two steps) before, one map for each
step, by ridge regression on 96 generations of training captions:  o_t = W_t [x_t, x_(t-1), o_(t-1), x_(t-2), o_(t-2), 1].
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
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, write_results

OUT = Path("benchmarks/results/rests.json")
OPTIONS = {"max_sequence_length": embedded.TEXT_TOKENS}
COMPUTES = (0.8, 0.65, 0.5)
FIT, SEED = 96, 5_000_000  # generations, and the seed of the first
RIDGE = 1e-3  # of the mean square of the inputs


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


class StandIn:
    """In the place of all blocks at some steps; the blocks run all the same, this is for quality alone.

    Args:
        pipe: an SD3 pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.step, self.resting, self.how = 0, (), "fitted"
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, Tensor] = {}
        blocks = pipe.transformer.transformer_blocks
        self.handles = [
            pipe.transformer.register_forward_pre_hook(self._begin),
            blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            blocks[-1].register_forward_hook(self._leave),
        ]

    def begin(self) -> None:
        """A generation begins."""
        self.step, self.seen = -1, {}

    def remove(self) -> None:
        """Leave the pipeline as it was."""
        for handle in self.handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self.step += 1

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seen[self.step] = {"x": kwargs["hidden_states"]}

    def _leave(self, module: Any, args: tuple, output: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
        image = output[1]
        if self.step in self.resting:
            last = self.seen[self.step - 1]["o"]
            image = last if self.how == "last" else self.inputs(self.step) @ self.weights[self.step]
        self.seen[self.step]["o"] = image
        return output[0], image

    def inputs(self, step: int) -> Tensor:
        """What is known at a step that rests, [B, N, 3 D + 1] or [B, N, 5 D + 1]."""
        parts = [self.seen[step]["x"]]
        for earlier in range(step - 1, max(-1, step - 3), -1):
            parts += [self.seen[earlier]["x"], self.seen[earlier]["o"]]
        return torch.cat([*parts, torch.ones_like(parts[0][..., :1])], dim=-1)


def fitted(captions: Sequence[str], fit_on: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the distilled pipeline with steps at rest, whose output stays as it was or is fitted."""
    pipe = embedded.load_few_step(common.DEFAULT_DEVICE)
    steps, stand_in = embedded.FEW_STEPS, StandIn(pipe)

    def draw(texts: Sequence[str], seed: int) -> Tensor:
        stand_in.begin()
        seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
        drawn = pipe(
            list(texts), num_inference_steps=steps, guidance_scale=1.0, generator=seeds, output_type="pt", **OPTIONS
        )
        return drawn.images.float().cpu().clamp(0, 1)

    products: dict[int, list[Tensor]] = {}
    for first in range(0, FIT, 24):
        draw(fit_on[first : first + 24], SEED + first)
        for step in range(1, steps):
            known = stand_in.inputs(step).flatten(0, 1).double()
            made = stand_in.seen[step]["o"].flatten(0, 1).double()
            own = products.setdefault(step, [torch.zeros(()), torch.zeros(())])
            own[0], own[1] = own[0] + known.T @ known, own[1] + known.T @ made
    for step, (square, cross) in products.items():
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        stand_in.weights[step] = torch.linalg.solve(square + ridge, cross).float()
    dense, rows = draw(captions, 0), []
    for resting in ((1,), (2,), (3,), (1, 3), (2, 3), (1, 2, 3)):
        for how in ("last", "fitted"):
            stand_in.resting, stand_in.how = resting, how
            figures = fidelity_to_dense(draw(captions, 0), dense).estimates()
            share = 1 - len(resting) / steps
            row = new_row(f"stand-in, {how}", {}, steps=steps, planned_ratio=share, samples=len(captions), **figures)
            rows.append(row | {"variant": "distilled", "resting": list(resting)})
            print(row["method"], resting, f"{row['psnr_to_dense']:.1f} dB", flush=True)
    stand_in.remove()
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
    results["rows"] = fitted(captions, [str(caption) for caption in data.captions("train")[:FIT]])
    for name, steps in (("distilled", 4), ("distilled", 8), ("teacher", 8), ("teacher", 12)):
        few = name == "distilled"
        pipe = (embedded.load_few_step if few else embedded.load_pipeline)(device, torch.bfloat16)
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks"))
        results["rows"] += settings(name, pipe, steps, 1.0 if few else embedded.GUIDANCE, captions)
        write_results(args.out, results)
        print(name, steps, flush=True)


if __name__ == "__main__":
    main()
