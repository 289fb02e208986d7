"""The report page: results and figures in, one HTML file out that needs nothing else, not even the internet."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from shivelight.errors import DataError
from shivelight.evaluation.results import validate, write_atomic
from shivelight.report import plots, tables
from shivelight.report.style import FEWER_STEPS, budget_label, count, is_ours, method_styles


@dataclass
class ReportFigures:
    """What a run can show besides its figures; each part may be absent.

    grids: method -> its images, one for each caption, in the same order for every method; the dense model first.
    captions: the prompts of the grids. schedule: keep ratios [steps, blocks]. schedule_blocks: the blocks' own numbers.
    token_maps: (image, kept [steps, blocks, H, W] bool), or several of them. losses: one dict for each logged training
    step, with "step", losses ("loss", "loss_distillation", ...) and "mean_keep". block_maps: (title, share of each routed
    block's dense FLOPs that ran [steps, blocks]), in the order of `schedule_blocks`.
    """

    grids: dict[str, list[Image.Image]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    schedule: np.ndarray | None = None
    schedule_blocks: list[int] | None = None
    token_maps: tuple[Image.Image, np.ndarray] | list[tuple[Image.Image, np.ndarray]] | None = None
    losses: list[dict[str, Any]] = field(default_factory=list)
    block_maps: list[tuple[str, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """A figure on the page: its picture as a data URI, what it shows, and its text for those who cannot see it."""

    uri: str
    caption: str
    alt: str


def build_report(
    results: Sequence[Mapping[str, Any]], figures: ReportFigures, out: Path, title: str = "Shivelight report"
) -> Path:
    """Writes the page and returns its path. Results are checked first; latencies are compared within one run only."""
    if not results:
        raise DataError("a report needs one results object or more: run `shivelight demo`, `bench` or `evaluate` first")
    for result in results:
        validate(result)
    _check(figures)
    environment = Environment(
        loader=PackageLoader("shivelight.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=[_run(result) for result in results],
        examples=_examples(figures),
        schedule=_schedule(figures),
        token_maps=_token_maps(figures),
        block_maps=_block_maps(figures),
        training=_training(figures),
        any_distance=any(key in row for result in results for row in result["rows"] for key in ("kid", "fd")),
    )
    return write_atomic(out, page)


def _check(figures: ReportFigures) -> None:
    for method, images in figures.grids.items():
        if len(images) != len(figures.captions):
            raise DataError(
                f"the grid of {method!r} has {len(images)} images for {len(figures.captions)} captions: "
                "pass one image for each caption"
            )
    for _, kept in _as_list(figures.token_maps):
        if np.ndim(kept) != 4:
            raise DataError(f"token maps must be [steps, blocks, H, W], not {np.shape(kept)}")
    if figures.schedule is not None and np.ndim(figures.schedule) != 2:
        raise DataError(f"the schedule must be keep ratios [steps, blocks], not of shape {np.shape(figures.schedule)}")
    for title, shares in figures.block_maps:
        if np.ndim(shares) != 2:
            raise DataError(f"the block map {title!r} must be shares [steps, blocks], not of shape {np.shape(shares)}")


def _as_list(maps: Any) -> list[tuple[Image.Image, np.ndarray]]:
    return [] if maps is None else [maps] if isinstance(maps, tuple) else list(maps)


def _run(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page says of one results object."""
    backbone, machine = result["backbone"], result["machine"]
    rows = result["rows"]
    facts = [("Backbone", backbone.get("class"))]
    facts += [("Parameters", count(backbone["parameters"]) if backbone.get("parameters") else None)]
    facts += [("Image tokens", backbone.get("tokens")), ("Machine", machine.get("device"))]
    facts += [("Threads", machine.get("threads")), ("Split", result.get("split")), ("Seed", result["seed"])]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "diffusers") if name in machine)
    facts += [("Versions", versions), ("Commit", result["commit"]), ("Command", result["command"])]
    samples = sorted({row["samples"] for row in rows if "samples" in row})
    return {
        "facts": [(name, value) for name, value in facts if value not in (None, "")],
        "budgets": tables.budgets_of(result),
        "samples": " to ".join(str(number) for number in dict.fromkeys([*samples[:1], *samples[-1:]])),
        "cards": tables.cards(result),
        "table": tables.results_table(result),
        "equal_latency": tables.equal_latency_table(result),
        "has_fewer_steps": any(row["method"] == FEWER_STEPS for row in rows),
        "has_routed": any(is_ours(row["method"]) for row in rows),
        "plots": _result_plots(result),
        "styles": method_styles([row["method"] for row in rows]),
        "budget_label": budget_label,
        "is_ours": is_ours,
        "fewer_steps": FEWER_STEPS,
        "json": json.dumps(result, indent=1),
    }


def _result_plots(result: Mapping[str, Any]) -> list[Plot]:
    made = []
    for metric in tables.quality_metrics(result):
        figure = plots.quality_latency(result, metric)
        if figure is not None:
            caption = f"{metric.title} against latency."
            made.append(Plot(svg_uri(figure), caption, f"{caption} The figures are those of the table."))
    figure = plots.speedup_against_plan(result)
    if figure is not None:
        caption = "Measured speed-up against the plan; on the dashed line nothing is lost."
        made.append(Plot(svg_uri(figure), caption, f"{caption} The figures are those of the table."))
    return made


def _examples(figures: ReportFigures) -> list[tuple[str, list[tuple[str, str]]]]:
    """Caption by caption: each method's name and its image."""
    return [
        (caption, [(method, image_uri(images[index])) for method, images in figures.grids.items()])
        for index, caption in enumerate(figures.captions)
        if figures.grids
    ]


def _schedule(figures: ReportFigures) -> Plot | None:
    if figures.schedule is None:
        return None
    ratios = np.asarray(figures.schedule, dtype=float)
    caption = (
        f"Share of tokens that each routed block runs at each step; {ratios.mean():.3f} on average, "
        f"from {ratios.min():.2f} to {ratios.max():.2f}. Above it, the mean over the blocks."
    )
    figure = plots.schedule_heat_map(ratios, figures.schedule_blocks)
    return Plot(svg_uri(figure), caption, "Heat map of the schedule, block by step. " + caption)


def _token_maps(figures: ReportFigures) -> list[Plot]:
    caption = (
        "Clear tokens ran, dark ones were passed by; in the first row, the darker, the fewer blocks ran the token."
    )
    return [
        Plot(
            png_uri(plots.token_maps(image, kept, figures.schedule_blocks)),
            caption,
            "Kept tokens over the steps. " + caption,
        )
        for image, kept in _as_list(figures.token_maps)
    ]


def _block_maps(figures: ReportFigures) -> list[Plot]:
    made = []
    for title, shares in figures.block_maps:
        ratios = np.asarray(shares, dtype=float)
        caption = f"{title}: {ratios.mean():.3f} of the routed blocks on average. Above it, the mean over the blocks."
        figure = plots.schedule_heat_map(ratios, figures.schedule_blocks, "share of the dense block that ran")
        made.append(Plot(svg_uri(figure), caption, "Heat map of what ran, block by step. " + caption))
    return made


def _training(figures: ReportFigures) -> Plot | None:
    figure = plots.training_curve(figures.losses)
    if figure is None:
        return None
    caption = f"Training, {len(figures.losses)} logged steps; bold lines are running means where there are many points."
    return Plot(svg_uri(figure), caption, caption)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def svg_uri(figure: Figure) -> str:
    """A figure as an SVG data URI; letters are outlines, so that it looks the same on every machine."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "shivelight"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", buffer.getvalue())


def png_uri(figure: Figure, dpi: int = 170) -> str:
    """A figure as a PNG data URI, for those that are pictures themselves."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return _data_uri("image/png", buffer.getvalue())


def image_uri(image: Image.Image) -> str:
    """A picture as a lossless WebP data URI: the comparison must show the model's artefacts and no others."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP", lossless=True)
    return _data_uri("image/webp", buffer.getvalue())
