"""`shivelight fit`: what stands in for the blocks at steps at rest, fitted to a pipeline on the user's own prompts."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.budgets import told_runs
from shivelight.cli import common
from shivelight.cli.calibrate import read_prompts
from shivelight.cli.evaluate import describe
from shivelight.config import Part, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.results import new_results, new_row
from shivelight.evaluation.standard import method_name


def fit(
    prompts: Annotated[
        Path,
        typer.Argument(help="Text file of prompts, one a line: all are one batch, so as many as memory takes."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("runs/fitted"),
    pipeline: common.PipelineOption = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id of an adapter of this kind, to add other numbers of steps to.")
    ] = None,
    steps: common.StepsOption = embedded.STEPS,
    guidance: common.GuidanceOption = embedded.GUIDANCE,
    compute: Annotated[
        list[float] | None, typer.Option(help="Shares of the dense FLOPs; may be repeated. 0.75 and 0.5 by default.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the maps between channels.")] = 32,
    partial: Annotated[
        Part | None,
        typer.Option(
            help="Spend what whole steps leave of a budget at one more (8 steps and fewer): all blocks on some tokens, or, where "
            "operators cost more than what they do, the rear blocks on all tokens."
        ),
    ] = None,
    unmended: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of what is fitted that is used after the last run; 1 is nearest by PSNR."
        ),
    ] = 0.5,
    dtype: common.PrecisionOption = "float32",
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 5_000_000,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Let all blocks rest at some steps, and fit what stands in for them there: no pictures, no gradients, one generation of
    your prompts for each budget. Most is gained with few steps.

    Example: shivelight fit prompts.txt --pipeline my-turbo-model --steps 4 --guidance 1 --compute 0.75 0.5
    """
    captions, budgets = read_prompts(prompts), compute or [0.75, 0.5]
    pipe = common.open_pipeline(pipeline, device, getattr(torch, dtype))
    if adapter is None:
        sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks", partial=partial or False))
    else:
        sl.load_adapter(pipe, adapter)
        blocks = routed_of(pipe).config.blocks
        if partial and (blocks is None or blocks.partial != partial):
            raise sl.AdapterError(
                f"{adapter} was not fitted with --partial {partial}; leave it out, or fit anew without --adapter."
            )
    options = common.call_options(pipe, pipeline, size, max_sequence_length)
    common.say(f"{len(captions)} prompts, {steps} steps")
    with common.progress_bar("fitting", None) as advance:
        found = sl.fit_stand_ins(
            pipe, captions, steps=steps, computes=budgets, guidance=guidance, rank=rank, unmended=unmended, seed=seed,
            progress=advance, **options,
        )  # fmt: skip
    method = method_name(routed_of(pipe).config)
    sl.save_adapter(
        pipe, out, {"command": "fit", "prompts": len(captions), "steps": steps, "guidance": guidance, "seed": seed}
    )
    table = Table(title="what was fitted", title_justify="left")
    for head in ("steps that run", "ask for", "error left, of the last output's"):
        table.add_column(head, no_wrap=True)
    for fitted in found:
        left = ", ".join(f"{share:.0%}" for share in fitted.left)
        table.add_row(told_runs(fitted.plan), f"compute={fitted.compute:g}", left)
    Console(width=max(common.console.width, 80)).print(table)
    common.say(f"adapter: {out}")
    common.say(f'sl.load_adapter(pipe, "{out}"); sl.set_budget(pipe, compute={found[-1].compute:g})')
    if json is not None:
        results = new_results(seed=seed, device=device, backbone=describe(pipe))
        results["rows"] = [
            new_row(
                method, {"compute": fitted.compute}, steps=steps, guidance=guidance, samples=len(captions),
                planned_ratio=fitted.compute,
            )
            | {"runs": list(fitted.plan.runs), "partial": fitted.plan.partial, "rear": fitted.plan.rear, "left": list(fitted.left)}
            for fitted in found
        ]  # fmt: skip
        common.save_json(json, results)
