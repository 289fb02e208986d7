"""The plots of the report, each a matplotlib figure of its own: no global state, no display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from shivelight.report.style import DENSE, MethodStyle, budget_label, is_ours, method_styles, takes_fewer_steps
from shivelight.report.tables import Metric

INK = "#1f2933"
FAINT = "#d9dee3"
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]
TIGHT = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
ABLATIONS = ("fixed", "norm", "random")
# Rejected tokens are covered by this colour.
SHADE = (12, 22, 36)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float | None], list[Mapping[str, Any]]]:
    """Rows that belong on one line: a method at one step count; fewer steps over all of its step counts."""
    curves: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        steps = None if takes_fewer_steps(row["method"]) else row.get("steps")
        curves.setdefault((row["method"], steps), []).append(row)
    return curves


def _curve_label(rows: Sequence[Mapping[str, Any]], method: str, steps: float | None) -> str:
    """The method, and its step count where the plot has several."""
    several = len({row.get("steps") for row in rows if not takes_fewer_steps(row["method"])}) > 1
    return f"{method}, {steps:g} steps" if several and steps is not None else method


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 3 if max(map(len, labels)) <= 18 else 2  # three of the long names would be wider than the figure
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK
        )


def _draw_curve(axes: Axes, x: list[float], y: list[float], style: MethodStyle, label: str) -> None:
    fewer = takes_fewer_steps(label)
    axes.plot(
        x,
        y,
        style.line,
        color=style.colour,
        marker=style.marker,
        markersize=11 if style.marker == "*" else 6,
        markerfacecolor="white" if fewer else style.colour,
        markeredgecolor=style.colour,
        linewidth=1.4,
        label=label,
        zorder=4 if fewer else 3,
    )


def quality_latency(results: Mapping[str, Any], metric: Metric) -> Figure | None:
    """One quality figure against latency for every method, the fewer-steps curve among them; None without any point."""
    rows = [row for row in results["rows"] if "latency_ms" in row and metric.key in row]
    if not rows:
        return None
    figure, axes = _axes(4.9, 4.1)
    styles = method_styles([row["method"] for row in results["rows"]])
    for (method, steps), members in _curves(rows).items():
        members = sorted(members, key=lambda row: row["latency_ms"]["median"])
        x = [row["latency_ms"]["median"] for row in members]
        y = [metric.scale * row[metric.key] for row in members]
        style = styles[method]
        _draw_curve(axes, x, y, style, _curve_label(rows, method, steps))
        for row, right, up in zip(members, x, y, strict=True):
            latency = row["latency_ms"]
            low, high = row.get("ci95", {}).get(metric.key, (row[metric.key], row[metric.key]))
            axes.errorbar(
                right,
                up,
                xerr=[[right - latency["p10"]], [latency["p90"] - right]],
                yerr=[[up - metric.scale * low], [metric.scale * high - up]],
                color=style.colour,
                alpha=0.45,
                linewidth=1,
                zorder=2,
            )
            if is_ours(method) or takes_fewer_steps(method):
                # Towards the corner of what is better and faster, where the curves of other methods are not.
                axes.annotate(
                    budget_label(row),
                    (right, up),
                    xytext=(-5, 4 if metric.higher_is_better else -4),
                    textcoords="offset points",
                    ha="right",
                    va="bottom" if metric.higher_is_better else "top",
                    fontsize=8,
                    color=style.colour,
                    path_effects=HALO,
                    zorder=5,
                )
    dense = [row["latency_ms"]["median"] for row in results["rows"] if row["method"] == DENSE and "latency_ms" in row]
    if dense and metric.key not in next(row for row in results["rows"] if row["method"] == DENSE):
        axes.axvline(dense[0], color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "dense",
            (dense[0], 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=INK,
        )
    axes.margins(x=0.13, y=0.14)
    axes.set_xlabel("latency of one generation, ms (left is faster)", fontsize=9)
    unit = f", {metric.unit}" if metric.unit else ""
    direction = "up is better" if metric.higher_is_better else "down is better"
    axes.set_ylabel(f"{metric.title}{unit} ({direction})", fontsize=9)
    _legend(figure, axes)
    return figure


def speedup_against_plan(results: Mapping[str, Any]) -> Figure | None:
    """Measured speed-up against the planned share of the dense FLOPs, and what the plan promises; None without points.

    Ablations are left out: they run the same shapes as our method and would lie on its points.
    """
    rows = [
        row
        for row in results["rows"]
        if "speedup" in row and row.get("planned_ratio", 1) < 1 and row["method"] not in ABLATIONS
    ]
    if not rows:
        return None
    figure, axes = _axes(4.9, 4.1)
    smallest = min(row["planned_ratio"] for row in rows)
    promised = np.linspace(max(smallest * 0.9, 0.02), 1.0, 100)
    axes.plot(promised, 1 / promised, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="promised: 1 / planned")
    styles = method_styles([row["method"] for row in results["rows"]])
    for (method, steps), members in _curves(rows).items():
        members = sorted(members, key=lambda row: row["planned_ratio"])
        x, y = [row["planned_ratio"] for row in members], [row["speedup"] for row in members]
        _draw_curve(axes, x, y, styles[method], _curve_label(rows, method, steps))
    axes.axhline(1, color="#9aa5b1", linewidth=0.8)
    axes.set_xlabel("planned FLOPs, share of dense", fontsize=9)
    axes.set_ylabel("measured speed-up of the backbone", fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    _legend(figure, axes)
    return figure


def schedule_heat_map(
    schedule: np.ndarray, blocks: Sequence[int] | None = None, meaning: str = "share of tokens that the block runs"
) -> Figure:
    """Shares [steps, blocks] as a heat map, block by step, on the whole scale from 0 to 1; `meaning` names the scale."""
    ratios = np.asarray(schedule, dtype=float)
    steps, count = ratios.shape
    names = list(blocks) if blocks is not None else list(range(1, count + 1))
    figure = Figure(figsize=(8.6, 1.7 + 0.27 * max(count, 6)), layout="constrained")
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(count, 6) / 3.2])
    _clean(top)
    top.step(np.arange(steps), ratios.mean(axis=1), where="mid", color="#0072B2", linewidth=1.6)
    top.set_ylim(0, 1.05)
    top.set_yticks([0, 0.5, 1])
    top.set_ylabel("mean", fontsize=9)
    top.tick_params(axis="x", which="both", length=0)
    image = axes.imshow(ratios.T, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("sampling step (0 is pure noise)", fontsize=9, color=INK)
    axes.set_ylabel("block", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    shown = range(0, count, max(1, -(-count // 14)))
    axes.set_yticks(list(shown), [str(names[index]) for index in shown])
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # White lines part the cells where they are large enough to bear them.
    if steps <= 60:
        axes.set_xticks(np.arange(-0.5, steps), minor=True)
        axes.set_yticks(np.arange(-0.5, count), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.7)
        axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=[top, axes], shrink=0.85, pad=0.015)
    bar.set_label(meaning, fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9)
    return figure


def shade_rejected(image: Image.Image, kept: np.ndarray, size: int = 192) -> Image.Image:
    """The picture with a shade over its tokens: kept [H, W] is the share of blocks that ran a token; 1 is clear."""
    share = Image.fromarray(np.round(255 * (1 - np.asarray(kept, dtype=float))).astype(np.uint8))
    mask = share.resize((size, size), Image.Resampling.NEAREST).point(lambda value: value * 0.8)
    picture = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    picture.paste(Image.new("RGB", (size, size), SHADE), mask=mask)
    return picture


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, first and last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def token_maps(image: Image.Image, kept: np.ndarray, blocks: Sequence[int] | None = None, columns: int = 7) -> Figure:
    """Which tokens ran, drawn on the picture: kept [steps, blocks, H, W]; all blocks together, then single ones."""
    kept = np.asarray(kept)
    steps, count = kept.shape[:2]
    names = list(blocks) if blocks is not None else list(range(1, count + 1))
    shown_steps = evenly_spaced(steps, columns)
    shown_blocks = evenly_spaced(count, 3)
    tiles: list[tuple[str, np.ndarray]] = [("all blocks", kept.mean(axis=1))]
    tiles += [(f"block {names[block]}", kept[:, block]) for block in shown_blocks]
    figure = Figure(figsize=(1.25 * len(shown_steps) + 0.3, 1.25 * len(tiles) + 0.25), layout=TIGHT)
    grid = figure.subplots(len(tiles), len(shown_steps), squeeze=False)
    for line, (title, maps) in enumerate(tiles):
        for column, step in enumerate(shown_steps):
            axes = grid[line, column]
            axes.imshow(shade_rejected(image, maps[step]), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if line == 0:
                axes.set_title(f"step {step}", fontsize=9, color=INK)
            if column == 0:
                axes.set_ylabel(title, fontsize=9, color=INK)
    return figure


def training_curve(losses: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Every figure named "...loss..." on a logarithmic axis, and mean keep below it; None when nothing was logged."""
    names = dict.fromkeys(name for entry in losses for name in entry)
    loss_names = [name for name in names if "loss" in name]
    keep_names = [name for name in names if "keep" in name]
    if not loss_names:
        return None
    figure = Figure(figsize=(8.6, 4.4 if keep_names else 3.3), layout="constrained")
    heights = [2.2, 1] if keep_names else [1]
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    for axes, shown in zip(panels, (loss_names, keep_names), strict=False):
        _clean(axes)
        for colour, name in zip(colours, shown, strict=False):
            points = [(entry["step"], entry[name]) for entry in losses if name in entry]
            steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)
            label = name.replace("_", " ")
            if len(values) > 60:
                axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=colour, linewidth=1.7, label=label)
            else:
                axes.plot(steps, values, color=colour, linewidth=1.7, label=label)
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, ncols=3)
    positive = all(entry[name] > 0 for entry in losses for name in loss_names if name in entry)
    if positive:
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("loss" + (" (log scale)" if positive else ""), fontsize=9)
    if keep_names:
        panels[1].set_ylim(0, 1.05)
        panels[1].set_ylabel("mean keep", fontsize=9)
    panels[-1].set_xlabel("training step", fontsize=9)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over 1/40 of the curve, centred, narrower at the ends, so that it never runs ahead of its data."""
    half = max(1, len(values) // 80)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
