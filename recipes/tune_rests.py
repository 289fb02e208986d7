"""Tune deltas around steps at rest of the distilled pipeline: `demo/few-step/adapters/blocks-tuned` on top of `blocks-fitted`, and
`blocks-part-tuned`, which goes on from it, on top of `blocks-part`.

    python recipes/tune_rests.py      # over three hours on 2 cores; goes on where it stopped

Prompts are captions of the training split, each walked from noise of its own (few generations are learned by heart): first at two
and three of four steps, then at two alone. From there two ways part: `blocks-tuned` learns not to be told apart from dense
generations, in force where two of four steps run, and `blocks-part-tuned` learns two with and without a part of the tokens at one
more.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from train_adapters import ship

import shivelight as sl
from shivelight.adapter import backbone_of, routed_of
from shivelight.cli import common
from shivelight.config import DeltaConfig
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.execution.folding import Delta
from shivelight.training.tuner import TuneConfig, Tuner

ADAPTERS = embedded.FEW_STEP / "adapters"
TRAJECTORIES = 3328
# Stages: what the maps come from, which stage the deltas go on from, budgets that are walked, settings, and what is shipped.
STAGES: dict[str, tuple[str, str | None, tuple[float, ...], dict[str, Any], str | None]] = {
    "both": ("blocks-fitted", None, (0.52, 0.52, 0.76), {"iterations": 700, "trajectories": 1536}, None),
    "two": ("blocks-fitted", "both", (0.52,), {"iterations": 600}, None),
    "texture": ("blocks-fitted", "two", (0.52,), {"iterations": 300, "lr": 3e-4, "adversarial": 2.0}, "blocks-tuned"),
    "part": ("blocks-part", "two", (0.56, 0.62, 0.52), {"iterations": 450}, "blocks-part-tuned"),
}


def main() -> None:
    """Tune, and put the adapters where they are shipped from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tune-rests"))
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="folder of both")
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    args = parser.parse_args()
    common.quiet_libraries()
    captions = [str(caption) for caption in EmojiData().captions("train")]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(1)).tolist()
    pipe = embedded.load_few_step(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [captions[place] for place in order]
    made: dict[str | None, tuple[dict[str, Delta], DeltaConfig | None]] = {None: ({}, None)}
    for stage, (fitted, before, computes, settings, name) in STAGES.items():
        sl.load_adapter(pipe, ADAPTERS / fitted)
        routed = routed_of(pipe)
        routed.set_deltas(backbone_of(pipe), *made[before])
        config = TuneConfig(embedded.FEW_STEPS, computes, guidance=1.0, **{"trajectories": TRAJECTORIES} | settings)
        tuner = Tuner(
            pipe,
            prompts,
            config,
            args.work / stage,
            dense=args.work / "dense",
            max_sequence_length=embedded.TEXT_TOKENS,
        )
        folder = tuner.run(lambda record: print(record, flush=True))
        made[stage] = routed.deltas, routed.config.deltas
        if name is not None:
            print(f"{ship(folder, args.out / name) / 1e6:.2f} MB in {args.out / name}")
        sl.detach(pipe)


if __name__ == "__main__":
    main()
