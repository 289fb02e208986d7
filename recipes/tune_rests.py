"""Tune deltas around steps at rest of the distilled pipeline: `demo/few-step/adapters/blocks-tuned` on top of `blocks-fitted`, and
`blocks-part-tuned`, which goes on from it, on top of `blocks-part`.

    python recipes/tune_rests.py      # about three hours on 2 cores; goes on where it stopped

Prompts are captions of the training split, each walked from noise of its own: first at two and three of four steps, then at two
alone, on twice as many generations (few of them are learned by heart). Those deltas are in force where two of four steps run. In a
third stage they learn two with and without a part of the tokens at one more.
"""

import argparse
from pathlib import Path

import torch
from train_adapters import ship

import shivelight as sl
from shivelight.adapter import backbone_of, routed_of
from shivelight.cli import common
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.training.tuner import TuneConfig, Tuner

ADAPTERS = embedded.FEW_STEP / "adapters"
# What the maps come from, what is made, and of each stage: budgets that are walked, iterations, dense generations to learn from.
TUNED = (
    ("blocks-fitted", "blocks-tuned", (((0.52, 0.52, 0.76), 700, 1536), ((0.52,), 600, 3328))),
    ("blocks-part", "blocks-part-tuned", (((0.56, 0.62, 0.52), 450, 3328),)),
)


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
    deltas, kind, number = {}, None, 0
    for fitted, name, stages in TUNED:
        sl.load_adapter(pipe, ADAPTERS / fitted)
        routed_of(pipe).set_deltas(backbone_of(pipe), deltas, kind)
        for computes, iterations, trajectories in stages:
            number += 1
            config = TuneConfig(
                embedded.FEW_STEPS, computes, guidance=1.0, iterations=iterations, trajectories=trajectories
            )
            work = args.work / f"stage-{number}"
            tuner = Tuner(pipe, prompts, config, work, max_sequence_length=embedded.TEXT_TOKENS)
            made = tuner.run(lambda record: print(record, flush=True))
        deltas, kind = routed_of(pipe).deltas, routed_of(pipe).config.deltas
        print(f"{ship(made, args.out / name) / 1e6:.2f} MB in {args.out / name}")
        sl.detach(pipe)


if __name__ == "__main__":
    main()
