"""`shivelight tune`: deltas for a pipeline whose blocks rest at some steps, trained on the user's own prompts."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.calibration import fitted_computes
from shivelight.cli import common
from shivelight.cli.calibrate import read_prompts
from shivelight.config import RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.training.tuner import TuneConfig, Tuner

_DEFAULT = TuneConfig(4, (0.5,))


def tune(
    prompts: Annotated[Path, typer.Argument(help="Text file of prompts, one a line.")],
    out: Annotated[
        Path, typer.Option(help="Folder of trajectories, checkpoints, log and adapter; a run there is gone on with.")
    ] = Path("runs/tuned"),
    pipeline: common.PipelineOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of what `shivelight fit` wrote; the last outputs stand in without."),
    ] = None,
    steps: common.StepsOption = _DEFAULT.steps,
    guidance: common.GuidanceOption = embedded.GUIDANCE,
    compute: Annotated[
        list[float] | None,
        typer.Option(help="Shares of the dense FLOPs; may be repeated. Those of the fit by default."),
    ] = None,
    iterations: Annotated[int, typer.Option(min=1)] = _DEFAULT.iterations,
    batch: Annotated[int, typer.Option(min=1, help="Trajectories of an iteration.")] = _DEFAULT.batch,
    trajectories: Annotated[int, typer.Option(min=1, help="Dense generations to learn from.")] = _DEFAULT.trajectories,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Folder of dense generations that an earlier run made of the same model and prompts; OUT/trajectories."
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the deltas.")] = _DEFAULT.rank,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULT.lr,
    mixed_precision: Annotated[
        Literal["no", "bf16"], typer.Option(help="Precision of the passes.")
    ] = _DEFAULT.mixed_precision,
    adversarial: Annotated[
        float,
        typer.Option(min=0, help="Weight of not being told apart from dense generations, for texture; 2 is a start."),
    ] = _DEFAULT.adversarial,
    checkpointing: Annotated[bool, typer.Option(help="Save memory: blocks run again in the backward pass.")] = False,
    dtype: common.PrecisionOption = "float32",
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the first trajectory's noise.")] = _DEFAULT.seed,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
) -> None:
    """Train deltas that mend what steps at rest leave, along the generation as it is walked: prompts alone, no pictures. For
    few-step models, after `shivelight fit`.

    Example: shivelight tune prompts.txt --pipeline my-turbo-model --adapter runs/fitted --steps 4 --guidance 1
    """
    captions = read_prompts(prompts)
    pipe = common.open_pipeline(pipeline, device, getattr(torch, dtype))
    if adapter is None:
        sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    else:
        sl.load_adapter(pipe, adapter)
    computes = tuple(compute or fitted_computes(routed_of(pipe), steps))
    if not computes and routed_of(pipe).stand_ins is not None:
        raise typer.BadParameter(
            f"The adapter's maps are fitted for other numbers of steps than {steps}; give --compute, or fit."
        )
    computes = computes or (0.5,)
    config = TuneConfig(
        steps, computes, guidance, iterations, batch, trajectories, rank, lr, mixed_precision=mixed_precision,
        adversarial=adversarial, checkpointing=checkpointing, seed=seed,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    options = common.call_options(pipe, pipeline, size, max_sequence_length)
    tuner = Tuner(pipe, captions, config, out, dense=dense, **options)
    common.say(f"{len(captions)} prompts, {trajectories} dense generations of {steps} steps, compute {computes}")
    with common.progress_bar("dense", trajectories) as advance:
        tuner.record_dense(advance)
    with common.progress_bar("tuning", iterations) as advance:
        for _ in range(tuner.done):
            advance()
        made = tuner.run(lambda record: advance(_said(record)))
    common.say(f"adapter: {made}")
    common.say(f'sl.load_adapter(pipe, "{made}"); sl.set_budget(pipe, compute={min(computes):g})')


def _said(record: dict[str, float]) -> str:
    told = f", told apart {record['told_apart']:.0%}" if "told_apart" in record else ""
    return f"loss {record['loss']:.4f}{told}"
