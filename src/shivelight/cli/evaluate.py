"""`shivelight evaluate`: quality, cost and latency of an adapter at several budgets, against its baselines."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import read_adapter, read_deltas
from shivelight.cli import common
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.errors import DataError
from shivelight.evaluation.comparison import Adapter, Comparison, OperatingPoint, Setting
from shivelight.evaluation.features import feature_network
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.peers import PEERS, check_names, peer_points
from shivelight.evaluation.results import new_results
from shivelight.evaluation.standard import (
    BASELINE_KEEPS,
    adapter_points,
    references,
    token_points,
    training_free_points,
    with_fewer_steps,
)
from shivelight.pipelines import native_side
from shivelight.training.data import load_image, read_folder


def evaluate(
    pipeline: common.PipelineOption = None,
    adapter: common.AdapterOption = None,
    finetuned: Annotated[
        str | None, typer.Option(help="Folder of a dense-finetuned adapter; the embedded one by default.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of a further adapter for the same table; repeat the option. The embedded ones by default."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of captioned images to judge against; the embedded test set by default.")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            help="Budgets of token routing: mean keep ratios, of adapters without block routing; repeat the option."
        ),
    ] = None,
    compute: Annotated[
        list[float] | None,
        typer.Option(
            help="Budgets of every adapter, and of routing without training: shares of the dense FLOPs; repeat it."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Captions.")] = 256,
    steps: common.StepsOption = embedded.STEPS,
    guidance: common.GuidanceOption = embedded.GUIDANCE,
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Samples per call while pictures are made.")] = 16,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Also fixed ratios, random tokens and tokens by norm, at 0.8, 0.6 and 0.5; of blocks, gates that do not "
            "adapt to the sample, gates a step late, and the hard cap."
        ),
    ] = True,
    peers: Annotated[
        list[str] | None, typer.Option(help=f"Other people's methods ({', '.join(PEERS)}); repeat the option.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Feature network of KID and FD: efflite0, inception, or none.")
    ] = "efflite0",
    dtype: common.PrecisionOption = "float32",
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Compare dense, routed and baselines on the same captions and seeds, timed in turns.

    Example: shivelight evaluate --keep 0.8 --keep 0.6 --keep 0.5 --json evaluate.json
    """
    check_names(peers or [])
    pipe = common.open_pipeline(pipeline, device, getattr(torch, dtype))
    sl.load_adapter(pipe, adapter or embedded.ADAPTER)
    setting = Setting(steps, guidance, seed, batch, common.call_options(pipe, pipeline, size, max_sequence_length))
    comparison = Comparison(pipe, setting)
    captions, real = judged_on(images, count, pipe, size)
    other = finetuned or (str(embedded.FINETUNED) if pipeline is None and embedded.FINETUNED.is_dir() else None)
    points = references(comparison, None if other is None else read_deltas(pipe, other))
    shipped = embedded.OTHERS if pipeline is None and adapter is None else ()
    others = [read_adapter(pipe, folder) for folder in also or shipped]
    points += budgeted_points(comparison, others, keep or [], compute or [], baselines)
    with common.progress_bar("calibrating fewer steps", 1) as advance:
        points = with_fewer_steps(comparison, points, apart=2)
        advance()
    points = with_peers(comparison, points, peers or [])
    with common.progress_bar("timing", len(points) * (rounds + 1)) as advance:
        timings = comparison.time(points, rounds, progress=advance, captions=captions)
    pictures = {}
    with common.progress_bar("drawing", len(points) * -(-len(captions) // batch)) as advance:
        for point in points:
            pictures[point.name] = comparison.pictures(point, captions, advance)
    network: Any = None if features == "none" else feature_network(features).to(device)
    with common.progress_bar("judging", len(points)) as advance:
        rows = comparison.rows(points, timings, pictures, real, network, advance, captions)
    results = new_results(
        seed=seed, device=device, backbone=describe(pipe), split="test" if images is None else str(images),
        **({} if network is None else {"feature_network": network.name}),
    )  # fmt: skip
    results["rows"] = rows
    common.print_rows(
        rows, f"{len(captions)} captions, {steps} steps, guidance {guidance:g}, one sample timed, {rounds} rounds"
    )
    common.save_json(json, results)


def budgeted_points(
    comparison: Comparison, others: list[Adapter], keeps: list[float], computes: list[float], baselines: bool
) -> list[OperatingPoint]:
    """All adapters at all budgets, and routing without training; without a budget, the usual ones."""
    blocks = comparison.routed.config.blocks is not None
    if keeps and blocks:
        raise typer.BadParameter("This adapter routes blocks: bound it by --compute.", param_hint="--keep")
    if not keeps and not computes:
        keeps = [] if blocks else [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
        computes = [0.7, 0.5, 0.35] if blocks or any(routed.config.blocks is not None for routed, _ in others) else []
    points = []
    if not blocks:
        points += token_points(comparison, keeps, BASELINE_KEEPS if baselines else ())
        points += [
            point
            for keep in keeps
            for other in others
            if other[0].config.blocks is None
            for point in adapter_points(comparison, other, keep=keep)
        ]
    for compute in computes:
        for adapter in (None, *others):
            points += adapter_points(comparison, adapter, baselines, compute=compute)
        free, reasons = training_free_points(comparison, compute=compute)
        points += free
        for reason in reasons:
            common.say(f"left out: {reason}")
    return points


def with_peers(comparison: Comparison, points: list[OperatingPoint], names: list[str]) -> list[OperatingPoint]:
    """`points`, and the usual ones of some peers that are not among them; says why, where one cannot run."""
    if not names:
        return points
    found, reasons = peer_points(comparison, names)
    for reason in reasons:
        common.say(f"left out: {reason}")
    known = {point.name for point in points}
    return [*points, *(point for point in found if point.name not in known)]


def judged_on(images: Path | None, count: int, pipe: Any, size: int | None = None) -> tuple[list[str], torch.Tensor]:
    """(captions, real pictures [n, 3, H, W] in [0, 1]) of the embedded test set or of a folder."""
    if images is None:
        data = EmojiData()
        chosen = data.captions("test")[:count]
        return [str(c) for c in chosen], to_tensor([data.render(c, seed) for seed, c in enumerate(chosen)])
    found = read_folder(images)[:count]
    if len(found) < 2:
        raise DataError(f"{images} has {len(found)} captioned images; KID and FD need two or more.")
    side = size or native_side(pipe)
    return [i.caption for i in found], torch.stack([(load_image(i.path, side) + 1) / 2 for i in found])


def describe(pipe: Any) -> dict[str, Any]:
    """The backbone, as results.json has it; after a picture was drawn."""
    return {
        "class": type(pipe.transformer).__name__,
        "parameters": sum(p.numel() for n, p in pipe.transformer.named_parameters() if not n.startswith("shivelight.")),
        "tokens": routed_of(pipe).shape[0],
    }
