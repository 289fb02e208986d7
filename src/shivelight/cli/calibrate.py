"""`shivelight calibrate`: the latency table of a pipeline on this device, and the least compute that keeps a quality."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.config import RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.errors import BudgetError, DataError
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.guard import Tried, least_compute, most_runs
from shivelight.evaluation.results import new_results
from shivelight.evaluation.standard import method_name
from shivelight.execution.latency_table import LatencyTable


def calibrate(
    pipeline: common.PipelineOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of an adapter. By default the embedded pipeline's own; another pipeline is routed without "
            "training, as --training-free says."
        ),
    ] = None,
    training_free: Annotated[
        Literal["tokens", "blocks", "both"] | None,
        typer.Option(help="Route without an adapter: leave out tokens, blocks, or both."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of prompts, one a line: find the least compute that keeps --min-psnr on them."),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            "--min-psnr",
            help="PSNR to the dense pictures, in dB, that the mean over the prompts must reach with the lower end of its 95% "
            "interval; 30 by default.",
        ),
    ] = None,
    steps: common.StepsOption = embedded.STEPS,
    guidance: common.GuidanceOption = embedded.GUIDANCE,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one call: the table is of such passes.")] = 1,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time to take for the table, about; a busy machine needs more.")
    ] = 8.0,
    dtype: common.PrecisionOption = "float32",
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Measure the latency table that set_budget(speedup=...) and set_budget(latency_ms=...) go by, and keep it on disk.
    With --prompts, find the least compute that keeps the pictures of your own prompts near the dense ones.

    Example: shivelight calibrate --prompts prompts.txt --min-psnr 30
    """
    if adapter is not None and training_free is not None:
        raise typer.BadParameter("Give --adapter or --training-free, not both.", param_hint="--training-free")
    if prompts is None and min_psnr is not None:
        raise typer.BadParameter("--min-psnr is about the pictures of --prompts FILE.", param_hint="--min-psnr")
    captions = None if prompts is None else read_prompts(prompts)
    pipe = common.open_pipeline(pipeline, device, getattr(torch, dtype))
    if adapter is None and (training_free is not None or pipeline is not None):
        sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis=training_free or "blocks"))
    else:
        sl.load_adapter(pipe, adapter or embedded.ADAPTER)
    options = common.call_options(pipe, pipeline, size, max_sequence_length)
    comparison = Comparison(pipe, Setting(steps, guidance, seed, batch, options))
    common.say(f"{method_of(pipe)}, {steps} steps")
    table = measured(comparison, batch, seconds)
    common.say(str(table))
    results = new_results(seed=seed, device=device, backbone=describe(pipe), latency_table=table.to_dict())
    if captions is not None:
        least = 30.0 if min_psnr is None else min_psnr
        best, tried = guarded(comparison, captions, least, batch)
        results["min_psnr"] = least
        results["rows"] = [entry.row(method_of(pipe), steps, guidance) for entry in tried]
        common.save_json(json, results)
        if best is None:
            raise BudgetError(
                f"Even at compute=1.0, with all blocks and tokens, the lower end of the mean PSNR is {tried[0].psnr.low:.2f} dB, "
                f"below {least:g}: the adapter's tuned weights draw other pictures than the dense ones. Ask for less, or route "
                "without tuned weights (--training-free blocks)."
            )
        common.say(f"sl.set_budget(pipe, compute={best.compute:g})")
        return
    common.save_json(json, results)
    common.say("sl.set_budget(pipe, speedup=1.5)  # or latency_ms=..., of the backbone over one generation")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The prompts cannot be read from {path}: {error}") from error
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{path} holds no prompts; write one on each line.")
    return found


def method_of(pipe: Any) -> str:
    """What is attached, as results.json names it."""
    config = routed_of(pipe).config
    return method_name(config) + ("+reuse" if config.reuse is not None else "")


def measured(comparison: Comparison, batch: int, seconds: float) -> LatencyTable:
    """The table of passes as this pipeline's calls make them."""
    pipe = comparison.pipe
    with common.progress_bar("two steps, to see the passes", 1) as advance:
        comparison.look(batch)
        advance()
    with common.progress_bar("timing", None) as advance:
        return sl.calibrate(pipe, seconds=seconds, anew=True, progress=advance)


def guarded(
    comparison: Comparison, captions: list[str], min_psnr: float, batch: int
) -> tuple[Tried | None, list[Tried]]:
    """The least budget that keeps the quality, and the table of what was tried, which is printed."""
    pictures = -(-len(captions) // batch)
    with common.progress_bar("drawing", (1 + most_runs()) * pictures) as advance:
        best, tried = least_compute(comparison, captions, min_psnr, lambda _: advance())
    table = Table(title=f"{len(captions)} prompts, PSNR to dense in dB, at least {min_psnr:g}", title_justify="left")
    for head in ("compute", "planned", "mean", "95% interval", "kept"):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in sorted(tried, key=lambda entry: -entry.compute):
        table.add_row(
            f"{entry.compute:.2f}",
            "" if entry.planned is None else f"{entry.planned:.3f}",
            f"{entry.psnr.value:.2f}",
            f"{entry.psnr.low:.2f} to {entry.psnr.high:.2f}",
            "yes" if entry.keeps(min_psnr) else "no",
        )
    Console(width=max(common.console.width, 80)).print(table)
    return best, tried
