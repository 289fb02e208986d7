"""`shivelight demo`: from the dense embedded pipeline to a faster one and its report."""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.cli.train import run_with_progress
from shivelight.config import DeltaConfig, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.demo.export import export_images
from shivelight.evaluation.comparison import Comparison, KeptTokens, OperatingPoint, Setting
from shivelight.evaluation.results import new_results
from shivelight.evaluation.standard import (
    adapter_points,
    planned_compute,
    references,
    token_points,
    with_fewer_steps,
)
from shivelight.report import ReportFigures, build_report
from shivelight.report.style import is_ours
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

KEEPS = (0.8, 0.6, 0.5)
SHOWN = 8


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("shivelight-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer captions and training steps.")] = False,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Make the embedded pipeline faster, and show what it costs.

    Example: shivelight demo --out shivelight-demo
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    captions = [str(c) for c in EmojiData().captions("test")[: 4 if quick else 8]]
    rounds, steps = 3, 9 if quick else 30

    common.say("1. The dense pipeline, and the adapter that was trained for it")
    pipe = common.open_pipeline(None, device)
    setting = Setting(embedded.STEPS, embedded.GUIDANCE, seed, 16, {"max_sequence_length": embedded.TEXT_TOKENS})

    common.say(f"2. A short adapter of your own: {steps} training steps, live")
    losses, live = train_live(pipe, steps, device, seed)

    common.say("3. The shipped adapter: same captions, same seeds, methods timed in turns")
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, setting)
    points = references(comparison, read_deltas(pipe, embedded.FINETUNED))
    points += token_points(comparison, KEEPS, (0.6,))
    compute = planned_compute(comparison, 0.6)
    for other in (read_adapter(pipe, folder) for folder in embedded.OTHERS if folder != embedded.BLOCKS):
        budget = {"keep": 0.6} if other[0].config.blocks is None else {"compute": compute}
        points += adapter_points(comparison, other, ablations=False, **budget)[-1:]  # with reuse
    points.append(comparison.training_free("blocks", compute=compute))
    points = with_fewer_steps(comparison, points, apart=3, rounds=1)
    with common.progress_bar("timing", len(points) * (rounds + 1)) as advance:
        timings = comparison.time(points, rounds, progress=advance, captions=captions)
    sl.set_budget(pipe, keep=0.6)
    common.say(sl.summary(pipe))
    with common.progress_bar("drawing", len(points) * -(-len(captions) // setting.batch)) as advance:
        pictures = {point.name: comparison.pictures(point, captions, advance) for point in points}
    with common.progress_bar("judging", len(points)) as advance:
        rows = comparison.rows(points, timings, pictures, progress=advance, captions=captions)

    results = new_results(seed=seed, device=device, backbone=describe(pipe), split="test", live_training=live)
    results["rows"] = rows
    common.save_json(out / "results.json", results)
    figures = report_figures(comparison, points, pictures, captions, losses)
    page = build_report(
        [results], figures, out / "report.html", "Shivelight: a Diffusion Transformer that skips what it can"
    )
    if json is not None:
        common.save_json(json, results)
    common.print_rows(rows, f"{len(captions)} test captions, {setting.steps} steps, guidance {setting.guidance:g}")
    common.say(f"{time.perf_counter() - began:.0f} s in all")
    common.say(f"report: {page.resolve()}")


def train_live(pipe: Any, steps: int, device: str, seed: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Train a short adapter on 96 training pictures, measure its loss before and after, and take it off again."""
    third = max(1, steps // 3)
    config = TrainingConfig(
        router_steps=third,
        policy_steps=third,
        joint_steps=steps - 2 * third,
        warmup=3,
        groups=2,
        group_size=4,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = read_folder(export_images(folder / "images", 96, "train"))
        with common.progress_bar("encoding", len(images)) as advance:
            cache = build_cache(
                pipe, images, folder / "cache", 128, embedded.TEXT_TOKENS, lambda done, total: advance()
            )
        accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
        trainer = Trainer(pipe, RoutingConfig(deltas=DeltaConfig()), config, cache, folder / "run", accelerator)
        run_with_progress(trainer)
        losses = trainer.history
        sl.detach(pipe)
    tail = max(1, steps // 4)
    return losses, {
        "steps": steps,
        "output_loss_first": float(np.mean([r["output"] for r in losses[:tail]])),
        "output_loss_last": float(np.mean([r["output"] for r in losses[-tail:]])),
    }


def report_figures(
    comparison: Comparison,
    points: list[OperatingPoint],
    pictures: dict[str, Tensor],
    captions: list[str],
    losses: list[dict[str, float]],
) -> ReportFigures:
    """Grids, the schedule, the kept tokens of two captions, and the training curve."""
    grids = {}
    for point in points:
        shown = {
            "dense": "dense",
            "dense-finetuned": "dense, fine-tuned",
            "fewer-steps": f"fewer steps ({point.steps})",
        }
        if point.method in shown or is_ours(point.method):
            budget = ", ".join(f"{name} {value:g}" for name, value in point.budget.items())
            label = shown.get(point.method) or f"{point.method}, {budget}"
            grids[label] = [to_image(picture) for picture in pictures[point.name][:SHOWN]]
    routed = routed_of(comparison.pipe)
    schedule = sl.current_schedule(comparison.pipe, comparison.setting.steps)
    maps = []
    for index in (0, 1):
        with KeptTokens(routed).watching() as kept:
            image = comparison.call([captions[index]], comparison.setting.steps, comparison.setting.seed + index)[0]
        maps.append((to_image(image), kept.array().numpy()))
    return ReportFigures(
        grids=grids,
        captions=captions[:SHOWN],
        schedule=np.array(schedule.keep) / schedule.tokens,
        schedule_blocks=list(routed.routed),
        token_maps=maps,
        losses=losses,
        block_maps=block_maps(comparison, points),
    )


def block_maps(comparison: Comparison, points: list[OperatingPoint]) -> list[tuple[str, np.ndarray]]:
    """Share of each block that ran, for pictures on plain and on textured backgrounds; of gates that a router decides."""
    maps = []
    captions = EmojiData().captions("test")
    for point in points:
        if not (is_ours(point.method) and "blocks" in point.method and point.method.endswith("+reuse")):
            continue
        for pattern in ("plain", "texture"):
            chosen = [str(c) for c in captions if c.background.pattern == pattern][:2]
            with point.state():
                comparison.call(chosen, point.steps)
                spent = np.array(comparison.routed.spending.map())
            maps.append((f"{point.method}, compute {point.budget['compute']:g}, {pattern} backgrounds", spent))
    return maps


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to a PIL picture."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
