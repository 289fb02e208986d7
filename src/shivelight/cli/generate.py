"""`shivelight generate`: dense and routed pictures of a prompt, same seed, side by side."""

import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.results import new_results, new_row
from shivelight.evaluation.standard import method_name
from shivelight.files import replacing
from shivelight.pipelines import draw


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("shivelight.png"),
    pipeline: common.PipelineOption = None,
    adapter: common.AdapterOption = None,
    keep: Annotated[float | None, typer.Option(help="Mean token keep ratio, in (0, 1]; 0.6 by default.")] = None,
    compute: Annotated[float | None, typer.Option(help="Or a share of the dense FLOPs.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Or, of block routers, the probability from which they run.")
    ] = None,
    steps: common.StepsOption = embedded.STEPS,
    guidance: common.GuidanceOption = embedded.GUIDANCE,
    count: Annotated[int, typer.Option(min=1, help="Pictures, each from a seed of its own.")] = 4,
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Draw a prompt with the dense and the routed model, same seeds: dense above, routed below.

    Example: shivelight generate "red apple on blue stripes" --keep 0.6
    """
    pipe = common.open_pipeline(pipeline, device)
    sl.load_adapter(pipe, adapter or embedded.ADAPTER)
    if keep is None and compute is None and threshold is None:
        keep = 0.6
    sl.set_budget(pipe, keep=keep, compute=compute, threshold=threshold)
    asked = {"keep": keep, "compute": compute, "threshold": threshold}
    budget = {name: value for name, value in asked.items() if value is not None}
    options = common.call_options(pipe, pipeline, size, max_sequence_length)

    def drawn() -> tuple[list[Image.Image], float]:
        began = time.perf_counter()
        images = draw(pipe, [prompt] * count, range(seed, seed + count), steps, guidance, **options)
        return images, time.perf_counter() - began

    with common.progress_bar("drawing", 2) as advance:
        with sl.dense(pipe):
            dense, dense_seconds = drawn()
        advance()
        routed, routed_seconds = drawn()
        advance()
    width, height = dense[0].size
    sheet = Image.new("RGB", (width * count, height * 2))
    for row, images in enumerate((dense, routed)):
        for column, image in enumerate(images):
            sheet.paste(image, (column * width, row * height))
    with replacing(out) as unfinished:
        sheet.save(unfinished)
    ratio = sl.planned_ratio(pipe)
    known = "unknown" if ratio is None else f"{ratio:.3f}"
    common.say(
        f"dense {dense_seconds:.2f} s, routed {routed_seconds:.2f} s (one run, unmeasured warm-up); planned FLOPs {known}"
    )
    common.say(f"pictures: {out} (dense above, routed below)")
    if json is not None:
        config = routed_of(pipe).config
        method = method_name(config) + ("+reuse" if config.reuse is not None else "")
        results = new_results(seed=seed, device=device, backbone={"class": type(pipe.transformer).__name__})
        results["rows"] = [
            new_row("dense", steps=steps, batch=count, guidance=guidance),
            new_row(
                method,
                budget,
                steps=steps,
                batch=count,
                guidance=guidance,
                **({} if ratio is None else {"planned_ratio": ratio}),
            ),
        ]
        common.save_json(json, results)
