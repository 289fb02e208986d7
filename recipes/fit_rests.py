"""Fit what stands in for the blocks at steps at rest: `demo/adapters/blocks-fitted` for the embedded pipeline at 25 and 8
steps, and `demo/few-step/adapters/blocks-fitted` for its distilled form at 4 and 3; `blocks-rear` there runs the last blocks at
one more. `blocks-part`, which runs a part of the tokens there, is written to runs/few-step and not shipped: `blocks-part-tuned` is.

    python recipes/fit_rests.py      # no gradients

Prompts are captions of the training split.
"""

import argparse
import time
from pathlib import Path
from typing import Literal

import torch

import shivelight as sl
from shivelight.cli import common
from shivelight.config import Part
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData

SHIPPED, MADE = embedded.FEW_STEP / "adapters", Path("runs/few-step")
# (steps, budgets) of each pipeline; with many steps a map has little to add to what each channel says of itself.
TEACHER = ((8, (0.75, 0.5)), (25, (0.7, 0.5)))
FEW = ((embedded.FEW_STEPS, (0.75, 0.5, 0.25)), (embedded.FEW_STEPS - 1, (0.67, 0.34)))
PART = ((embedded.FEW_STEPS, (0.88, 0.75, 0.65, 0.5)),)
# Three of four steps, two, and two with four or three of eight blocks at one more.
ENDS = ((embedded.FEW_STEPS, (0.75, 0.64, 0.6, 0.5)),)


def fit(
    few: bool, prompts: list[str], rank: int, out: Path, device: str, partial: Literal[False] | Part = False
) -> None:
    """One adapter."""
    pipe = (embedded.load_few_step if few else embedded.load_pipeline)(device)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis="blocks", partial=partial))
    guidance = 1.0 if few else embedded.GUIDANCE
    began, said = time.perf_counter(), []
    for steps, computes in {False: FEW, "tokens": PART, "rear": ENDS}[partial] if few else TEACHER:
        for fitted in sl.fit_stand_ins(
            pipe, prompts, steps=steps, computes=computes, guidance=guidance, rank=rank,
            max_sequence_length=embedded.TEXT_TOKENS,
        ):  # fmt: skip
            left = [round(share, 3) for share in fitted.left]
            plan = {"runs": list(fitted.plan.runs), "partial": fitted.plan.partial, "rear": fitted.plan.rear}
            said.append({"steps": steps, **plan, "compute": fitted.compute, "left": left})
            print(said[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    training = {"command": "recipes/fit_rests.py", "prompts": len(prompts), "guidance": guidance, "fitted": said}
    sl.save_adapter(pipe.to(dtype=torch.float16), out, training)


def main() -> None:
    """Fit all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=192, help="prompts for the few steps; 0 leaves them out")
    parser.add_argument("--teacher", type=int, default=48, help="prompts for the teacher; 0 leaves it out")
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    args = parser.parse_args()
    common.quiet_libraries()
    captions = [str(caption) for caption in EmojiData().captions("train")]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    if args.few:
        chosen = [captions[place] for place in order[: args.few]]
        fit(True, chosen, 64, SHIPPED / "blocks-fitted", args.device)
        fit(True, chosen, 64, SHIPPED / "blocks-rear", args.device, "rear")
        fit(True, chosen, 64, MADE / "blocks-part", args.device, "tokens")
    if args.teacher:
        folder = embedded.ADAPTER.parent / "blocks-fitted"
        fit(False, [captions[place] for place in order[: args.teacher]], 16, folder, args.device)


if __name__ == "__main__":
    main()
