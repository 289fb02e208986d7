"""How latency and memory grow with the work: tokens, blocks, batch and steps, dense and routed, with the fitted exponents.

    python benchmarks/scaling.py        # writes benchmarks/results/scaling.json and docs/images/scaling.png

An SD3 of random weights, narrow enough for 16384 tokens; one thing grows at a time, the others stay. Dense, tokens at keep 0.6 and
blocks at half of the FLOPs are timed in turns at each size. An exponent is the slope of log(latency) over log(size), by least
squares over the upper half of the sizes, where fixed costs no longer hide it. Memory is what a run needs beyond the weights: of the
CUDA allocator, or on a CPU of the tensors that live at once (what kernels take for themselves is not among them).
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from matplotlib.figure import Figure

from shivelight.cli import common
from shivelight.evaluation.bare import BareLoop, bare_points, timed_rows
from shivelight.evaluation.results import new_results, read_results, write_results
from shivelight.measurement.memory import working_memory_mb

TEXT = 64
BASE = {"tokens": 1024, "blocks": 4, "batch": 1, "steps": 4}
SIZES = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "blocks": (2, 4, 8, 16),
    "batch": (1, 2, 4, 8),
    "steps": (4, 8, 16, 32),
}
TINY = {"tokens": (64, 256), "blocks": (2, 4), "batch": (1, 2), "steps": (4, 8)}
METHODS = {"dense": "dense", "tokens": "tokens, keep 0.6", "blocks+reuse": "blocks, compute 0.5"}


def main() -> None:
    """Time all sizes; write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/scaling.png"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=16384, help="tokens")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(SIZES), help="what grows; rows of the others stay as they are"
    )
    parser.add_argument("--draw", action="store_true", help="draw what is there anew, and time nothing")
    parser.add_argument("--tiny", action="store_true", help="two sizes of each, to see that it runs")
    args = parser.parse_args()
    if args.draw:
        results = read_results(args.out)
        draw(results["rows"], results["exponents"]).savefig(args.plot, dpi=110)
        return
    common.quiet_libraries()
    common.keep_freed_memory()
    device = common.DEFAULT_DEVICE
    results = new_results(device=device, backbone={"class": "SD3Transformer2DModel", "width": args.width})
    if args.only:
        kept = read_results(args.out)
        results["rows"] = [row for row in kept["rows"] if row["axis"] not in args.only]
        results["kept"] = {name: kept[name] for name in ("command", "commit", "machine")}
    sizes = {
        axis: tuple(value for value in values if axis != "tokens" or value <= args.most)
        for axis, values in (TINY if args.tiny else SIZES).items()
        if axis in (args.only or SIZES)
    }
    with common.progress_bar("scaling", sum(map(len, sizes.values()))) as advance:
        for axis, values in sizes.items():
            for value in values:
                results["rows"] += measure(axis, value, args.width, args.rounds, device)
                write_results(args.out, results)
                advance(f"{axis} {value}")
    results["exponents"] = {axis: exponents(results["rows"], axis) for axis in SIZES}
    write_results(args.out, results)
    draw(results["rows"], results["exponents"]).savefig(args.plot, dpi=110)
    for axis, fitted in results["exponents"].items():
        print(axis, ", ".join(f"{method} {slope:.2f}" for method, slope in fitted.items()))


def measure(axis: str, value: int, width: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of one size."""
    chosen = {**BASE, axis: value}
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=256, patch_size=2, in_channels=16, out_channels=16, num_layers=chosen["blocks"], attention_head_dim=64,
        num_attention_heads=width // 64, joint_attention_dim=width, caption_projection_dim=width,
        pooled_projection_dim=width, pos_embed_max_size=128, qk_norm="rms_norm",
    ).to(device).eval().requires_grad_(False)  # fmt: skip
    loop = BareLoop(model, chosen["batch"], chosen["tokens"], TEXT, chosen["steps"])
    points = [p for p in bare_points(loop, [0.6], [0.5])[0] if p.method in METHODS]
    rows = timed_rows(
        loop,
        points,
        rounds,
        described={"axis": axis, "size": value, "image_tokens": chosen["tokens"], "blocks": chosen["blocks"]},
    )
    rows = [row for row in rows if row["method"] in METHODS]
    for row, state in zip(rows, (loop.dense, *(point.state for point in points)), strict=True):
        with state():
            row["working_memory_mb"] = working_memory_mb(loop, device)
    return rows


def exponents(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, float]:
    """The slope of log(latency) over log(size) of each method, over the upper half of the sizes (at least two)."""
    fitted = {}
    for method in METHODS:
        own = [
            (row["size"], row["latency_ms"]["median"]) for row in rows if (row["axis"], row["method"]) == (axis, method)
        ]
        upper = own[min(len(own) // 2, len(own) - 2) :]
        fitted[method] = linear_regression(
            [math.log(size) for size, _ in upper], [math.log(ms) for _, ms in upper]
        ).slope
    return fitted


def draw(rows: Sequence[dict[str, Any]], fitted: dict[str, dict[str, float]]) -> Figure:
    """Latency above, memory below, one column for each thing that grows."""
    figure = Figure(figsize=(3.1 * len(fitted), 5.6), layout="constrained")
    panels = figure.subplots(2, len(fitted), sharex="col", squeeze=False)
    for column, (axis, slopes) in enumerate(fitted.items()):
        for line, (figures, unit) in enumerate(
            (("latency_ms", "ms a generation"), ("working_memory_mb", "MB beyond the weights"))
        ):
            panel = panels[line][column]
            for method, label in METHODS.items():
                own = [row for row in rows if (row["axis"], row["method"]) == (axis, method)]
                values = [row[figures]["median"] if line == 0 else row[figures] for row in own]
                told = f"{label}: ^{slopes[method]:.2f}" if line == 0 else label
                panel.plot([row["size"] for row in own], values, marker="o", markersize=3, linewidth=1.2, label=told)
            sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
            panel.set_xscale("log")
            panel.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
            panel.set_xticks([], minor=True)
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            panel.set_ylim(low / 2, high * 2.5)  # room for the legend, and so that what stays level looks it
            panel.grid(True, linewidth=0.4, color="#d9dee3")
            if column == 0:
                panel.set_ylabel(unit)
            if line == 0:
                panel.legend(fontsize=7, frameon=False)
            else:
                panel.set_xlabel(axis)
    return figure


if __name__ == "__main__":
    main()
