"""Tune deltas around steps at rest of the distilled pipeline: `demo/few-step/adapters/blocks-tuned` on top of `blocks-fitted`, and
`blocks-part-tuned` and `blocks-rear-tuned`, which go on from it, on top of `blocks-part` and `blocks-rear` (`fit_rests.py` first).
What the package has no room for, `blocks-rear-tuned`, is written to runs/few-step.

    python recipes/tune_rests.py      # over four hours on 2 cores; goes on where it stopped

Prompts are captions of the training split, each walked from noise of its own (few generations are learned by heart): first at two
and three of four steps, then at two alone, where those of `blocks-tuned` are in force. Those of `blocks-part-tuned` go on at two
with and without a part of the tokens at one more, those of `blocks-rear-tuned` at two with the last blocks at one more. In the
end all learn not to be told apart from dense generations.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fit_rests import MADE, SHIPPED
from train_adapters import ship

import shivelight as sl
from shivelight.adapter import backbone_of, routed_of
from shivelight.cli import common
from shivelight.config import DeltaConfig
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.execution.folding import Delta
from shivelight.training.tuner import TuneConfig, Tuner

TRAJECTORIES = 3328
TEXTURE: dict[str, Any] = {"iterations": 300, "lr": 3e-4, "adversarial": 2.0}


class Stage(NamedTuple):
    """One run of the tuner.

    Attributes:
        fitted: folder of the adapter that has the maps.
        after: stage whose deltas it goes on from.
        computes: budgets that are walked.
        settings: of `TuneConfig`.
        out: folder of the adapter, where it is used.
    """

    fitted: Path
    after: str | None
    computes: tuple[float, ...]
    settings: dict[str, Any]
    out: Path | None = None


STAGES = {
    "both": Stage(SHIPPED / "blocks-fitted", None, (0.52, 0.52, 0.76), {"iterations": 700, "trajectories": 1536}),
    "two": Stage(SHIPPED / "blocks-fitted", "both", (0.52,), {"iterations": 600}),
    "two-texture": Stage(SHIPPED / "blocks-fitted", "two", (0.52,), TEXTURE, SHIPPED / "blocks-tuned"),
    "rear": Stage(
        SHIPPED / "blocks-rear",
        "two-texture",
        (0.6, 0.63),
        TEXTURE | {"iterations": 400, "lr": 4e-4},
        MADE / "blocks-rear-tuned",
    ),  # fmt: skip
    "part": Stage(MADE / "blocks-part", "two", (0.56, 0.62, 0.52), {"iterations": 450}),
    "part-texture": Stage(MADE / "blocks-part", "part", (0.56, 0.62, 0.52), TEXTURE, SHIPPED / "blocks-part-tuned"),
}


def main() -> None:
    """Tune, and put the adapters where they are used from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tune-rests"))
    parser.add_argument("--device", default=common.DEFAULT_DEVICE)
    args = parser.parse_args()
    common.quiet_libraries()
    if missing := sorted({str(stage.fitted) for stage in STAGES.values() if not stage.fitted.is_dir()}):
        parser.error(f"there is no {', no '.join(missing)}: run recipes/fit_rests.py first")
    captions = [str(caption) for caption in EmojiData().captions("train")]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(1)).tolist()
    pipe = embedded.load_few_step(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [captions[place] for place in order]
    made: dict[str | None, tuple[dict[str, Delta], DeltaConfig | None]] = {None: ({}, None)}
    for name, stage in STAGES.items():
        sl.load_adapter(pipe, stage.fitted)
        routed, settings = routed_of(pipe), {"trajectories": TRAJECTORIES} | stage.settings
        routed.set_deltas(backbone_of(pipe), *made[stage.after])
        config = TuneConfig(embedded.FEW_STEPS, stage.computes, guidance=1.0, **settings)
        length = embedded.TEXT_TOKENS
        tuner = Tuner(pipe, prompts, config, args.work / name, dense=args.work / "dense", max_sequence_length=length)
        folder = tuner.run(lambda record: print(record, flush=True))
        made[name] = routed.deltas, routed.config.deltas
        if stage.out is not None:
            print(f"{ship(folder, stage.out) / 1e6:.2f} MB in {stage.out}")
        sl.detach(pipe)


if __name__ == "__main__":
    main()
