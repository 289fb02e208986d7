"""Fill the tables of README and docs from the committed JSON files, and redraw README's pictures from the embedded files.

python recipes/readme.py            # tables only
python recipes/readme.py --grid     # also docs/images/grid.png and docs/images/dense-32.png
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import shivelight as sl
from shivelight.adapter_files import read_adapter
from shivelight.cli import common
from shivelight.cli.bench import SHAPE_HEADS, shape_cells
from shivelight.cli.demo import to_image
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.results import read_results
from shivelight.evaluation.standard import adapter_points, planned_compute
from shivelight.files import replacing
from shivelight.report.style import budget_label

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/measure.md",
    "docs/families.md",
    "docs/speed.md",
    "docs/decisions/training-free.md",
    "docs/decisions/blocks.md",
    "docs/decisions/few-steps.md",
    "docs/front.md",
)
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)
COLUMNS = {
    "planned": ("planned_ratio", "{:.3f}", 1),
    "speed-up": ("speedup", "{:.2f}x", 1),
    "end to end": ("speedup_end_to_end", "{:.2f}x", 1),
    "efficiency": ("efficiency", "{:.2f}", 1),
    "PSNR dB": ("psnr_to_dense", "{:.1f}", 1),
    "SSIM": ("ssim_to_dense", "{:.3f}", 1),
    "PSNR to 100 steps, dB": ("psnr_to_fine", "{:.1f}", 1),
    "KID x1000": ("kid", "{:.1f}", 1000),
    "KID less fine-tuned's, x1000": ("kid_to_finetuned", "{:+.1f}", 1000),
    "KID less dense's, x1000": ("kid_to_dense", "{:+.1f}", 1000),
    "agreement": ("caption_agreement", "{:.1f}", 1),
    "agreement less dense's": ("agreement_to_dense", "{:+.1f}", 1),
    "named, %": ("named", "{:.1f}", 100),
    "placed, %": ("placed", "{:.1f}", 100),
    "IoU to dense": ("iou_to_dense", "{:.3f}", 1),
    "Chamfer to dense": ("chamfer_to_dense", "{:.4f}", 1),
    "IoU to the shape": ("iou_to_truth", "{:.3f}", 1),
    "Chamfer to the shape": ("chamfer_to_truth", "{:.4f}", 1),
    "FD": ("fd", "{:.0f}", 1),
    "realised": ("realised", "{:.3f}", 1),
    "share of the block": ("share", "{:.2%}", 1),
    "of its weights": ("share_of_parameters", "{:.2%}", 1),
    "time over dense fine-tuning's": ("ratio", "{:.2f}", 1),
    "all rounds together": ("total_ratio", "{:.2f}", 1),
    "memory, MB": ("working_memory_mb", "{:.0f}", 1),
    "memory over dense fine-tuning's": ("memory_ratio", "{:.2f}", 1),
    "predicted": ("predicted", "{:.2f}", 1),
    "held (1: within 3% or the spread)": ("held", "{:.0f}", 1),
    "operators of a step": ("operators", "{:.0f}", 1),
    "before": ("operators_before", "{:.0f}", 1),
    "of the cheapest step": ("cheapest", "{:.0f}", 1),
    "that before": ("cheapest_before", "{:.0f}", 1),
    "graphs": ("graphs", "{:d}", 1),
    "compiling, s": ("compile_seconds", "{:.0f}", 1),
}

WITH_INTERVALS = (
    "speedup", "ratio", "psnr_to_dense", "psnr_to_fine", "kid", "kid_to_finetuned", "kid_to_dense", "agreement_to_dense",
    "named", "placed", "iou_to_dense", "iou_to_truth",
)  # fmt: skip


def table(source: str) -> str:
    """Markdown of every row and every column that was measured, with 95% intervals of the figures that decide; of a front's file
    with #at behind it, what stands at the speed-ups wanted."""
    name, _, part = source.partition("#")
    path = ROOT / name
    results = read_results(path)
    if part == "at":
        return fronts(path, results)
    rows = results["rows"]
    if rows and "tests" in rows[0]:
        return matrix(path, results)
    if rows and "multiply_adds" in rows[0]:
        return shapes(path, results)
    labels: dict[str, Callable[[dict[str, Any]], str]] = {
        "family": lambda row: row.get("family", ""),
        "shape": lambda row: row["variant"] if "title" in row else "",
        "batch": lambda row: str(row["batch"]) if "title" in row else "",
        "compiled": lambda row: ("yes" if row["compiled"] else "no") if "title" in row else "",
        "method": lambda row: (
            row["method"] + (f" ({row['variant']})" if row.get("variant") and "title" not in row else "")
        ),
        "budget": budget_label,
        "steps": lambda row: str(row.get("steps", "")),
        "prompts": lambda row: str(row.get("prompts", "")),
        "rank": lambda row: str(row.get("rank", "")),
        "unmended": lambda row: f"{row['unmended']:g}" if "unmended" in row else "",
        "error left at rest": lambda row: ", ".join(f"{share:.0%}" for share in row.get("left", [])),
        "growth": lambda row: f"{row['growth']:g}" if "growth" in row else "",
        "forecast": lambda row: f"{row['forecast']:g}" if "forecast" in row else "",
        "ms": lambda row: f"{row['latency_ms']['median']:.2f}" if "latency_ms" in row else "",
    }
    heads = {name: text for name, text in labels.items() if name == "method" or any(text(row) for row in rows)}
    columns = {name: column for name, column in COLUMNS.items() if any(column[0] in row for row in rows)}
    lines = [f"| {' | '.join([*heads, *columns])} |", "|---" * (len(heads) + len(columns)) + "|"]
    for row in rows:
        cells = [text(row) for text in heads.values()]
        for key, pattern, scale in columns.values():
            cell = pattern.format(row[key] * scale) if key in row else ""
            if cell and key in WITH_INTERVALS and key in row.get("ci95", {}):
                cell += " ({} to {})".format(*(pattern.format(bound * scale) for bound in row["ci95"][key]))
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    machine, last = results["machine"], rows[-1]
    said = [
        f"{last['samples']} {'pictures' if 'family' in last else 'samples' if 'iou_to_truth' in last else 'captions'} of the "
        f"{results['split']} split, guidance {last['guidance']:g}"
        if "samples" in last
        else "",
        ", ".join(
            sorted({row["dtype"] for row in rows if "dtype" in row})
            + ([] if any(row.get("compiled") for row in rows) else ["not compiled"])
        ),
        f"{last['latency_ms']['runs']} timed rounds" if "latency_ms" in last else "",
        f"batch {last.get('batch', 1)}" if "latency_ms" in last and "title" not in last else "",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, diffusers {machine['diffusers']}",
    ]
    commands = [family["command"] for family in results.get("families", {}).values()] or [results["command"]]
    source = f"Source: `{path.relative_to(ROOT)}`, written by {', '.join(f'`{command}`' for command in commands)}."
    return "\n".join(lines) + f"\n\n{'; '.join(part for part in said if part)}. {source}"


def fronts(path: Path, results: dict[str, Any]) -> str:
    """Markdown of a front at the speed-ups wanted: a row for each method that reaches one, the nearest to dense first."""
    metrics = {"psnr_to_dense": ("PSNR dB", "{:.1f}", 1), "kid": ("KID x1000", "{:.1f}", 1000)}
    metrics |= {"caption_agreement": ("agreement", "{:.1f}", 1)}
    known = [name for name in metrics if any(name in row for row in results["rows"])]
    heads = ["speed-up", "method", *(metrics[name][0] for name in known)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for speedup, methods in results["at"].items():
        ranked = sorted(methods.items(), key=lambda item: -item[1].get("psnr_to_dense", 0.0))
        for method, figures in ranked:
            cells = [
                metrics[name][1].format(metrics[name][2] * figures[name]) if name in figures else "" for name in known
            ]
            lines.append(f"| {speedup}x | {' | '.join([method, *cells])} |")
    return "\n".join(lines) + f"\n\nInterpolated on each method's own front. Source: `{path.relative_to(ROOT)}`."


def matrix(path: Path, results: dict[str, Any]) -> str:
    """Markdown of what the tests of all families found: a row for each test, a column for each family."""
    tests = list(dict.fromkeys(test for row in results["rows"] for test in row["tests"]))
    lines = [f"| | {' | '.join(row['method'] for row in results['rows'])} |", "|---" * (len(results["rows"]) + 1) + "|"]
    notes: list[str] = []
    for test in tests:
        cells = []
        for row in results["rows"]:
            outcome, _, reason = row["tests"].get(test, "").partition(": ")
            if reason and reason not in notes:
                notes.append(reason)
            mark = {"passed": "yes", "skipped": "no", "": ""}.get(outcome, outcome)
            cells.append(mark + (f" ({notes.index(reason) + 1})" if reason else ""))
        lines.append(f"| {test} | {' | '.join(cells)} |")
    said = "".join(f"\n\n({number}) {note}." for number, note in enumerate(notes, 1))
    return "\n".join(lines) + f"{said}\n\nSource: `{path.relative_to(ROOT)}`, written by `{results['command']}`."


def shapes(path: Path, results: dict[str, Any]) -> str:
    """Markdown of the published shapes."""
    lines = [f"| {' | '.join(SHAPE_HEADS)} |", "|---" * len(SHAPE_HEADS) + "|"]
    lines += [f"| {' | '.join(shape_cells(row))} |" for row in results["rows"]]
    whose = "; ".join(row["published_of"] for row in results["rows"] if "published_of" in row)
    return (
        "\n".join(lines)
        + f"\n\nPublished: {whose}. Source: `{path.relative_to(ROOT)}`, written by `{results['command']}`."
    )


def grids() -> None:
    """32 dense pictures of test captions; and 8 of them dense, and routed at one plan: blocks without training, learned gates
    and tokens with reuse, and tokens that are dropped."""
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, {"max_sequence_length": 16}))
    captions = [str(c) for c in EmojiData().captions("test")[:32]]
    folder = ROOT / "docs/images"
    folder.mkdir(parents=True, exist_ok=True)
    paste(comparison.pictures(comparison.dense(), captions), 8).save(folder / "dense-32.png")
    plan = planned_compute(comparison, 0.6)
    blocks = adapter_points(comparison, read_adapter(pipe, embedded.REFRESHING), ablations=False, compute=plan)
    reusing = adapter_points(comparison, read_adapter(pipe, embedded.REUSING), compute=plan)
    free = comparison.training_free("blocks", compute=plan)
    points = [comparison.dense(), free, blocks[-1], *reusing, comparison.tokens(0.6)]
    print("grid.png, top to bottom:", ", ".join(point.name for point in points))
    paste(torch.cat([comparison.pictures(point, captions[:8]) for point in points]), 8).save(folder / "grid.png")


def paste(pictures: torch.Tensor, columns: int) -> Image.Image:
    """[n, 3, H, W] to one picture."""
    height, width = pictures.shape[-2:]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(to_image(picture), (index % columns * width, index // columns * height))
    return sheet


def main() -> None:
    """Tables, and with --grid the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true")
    args = parser.parse_args()
    for name in PAGES:
        page = ROOT / name
        filled = MARKED.sub(lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", page.read_text())
        with replacing(page) as unfinished:
            unfinished.write_text(filled)
    if args.grid:
        grids()


if __name__ == "__main__":
    main()
