"""Fill README's table from the committed demo.json, and redraw its grid of pictures from the embedded files.

python recipes/readme.py            # table only
python recipes/readme.py --grid     # also docs/images/grid.png and docs/images/dense-32.png
"""

import argparse
import re
from pathlib import Path

import torch
from PIL import Image

import shivelight as sl
from shivelight.cli import common
from shivelight.cli.demo import to_image
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.results import read_results
from shivelight.report.style import budget_label

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/demo.json"
COLUMNS = {
    "planned": ("planned_ratio", "{:.3f}", 1),
    "speed-up": ("speedup", "{:.2f}x", 1),
    "end to end": ("speedup_end_to_end", "{:.2f}x", 1),
    "efficiency": ("efficiency", "{:.2f}", 1),
    "PSNR dB": ("psnr_to_dense", "{:.1f}", 1),
    "SSIM": ("ssim_to_dense", "{:.3f}", 1),
    "KID x1000": ("kid", "{:.1f}", 1000),
    "FD": ("fd", "{:.0f}", 1),
}


def table() -> str:
    """Markdown of every row, with 95% intervals of the quality figures."""
    results = read_results(RESULTS)
    lines = ["| method | budget | steps | " + " | ".join(COLUMNS) + " |", "|---|---|---|" + "---|" * len(COLUMNS)]
    for row in results["rows"]:
        cells = [row["method"], budget_label(row), str(row["steps"])]
        for key, pattern, scale in COLUMNS.values():
            cell = pattern.format(row[key] * scale) if key in row else ""
            if cell and key in ("speedup", "psnr_to_dense", "kid") and key in row.get("ci95", {}):
                cell += " ({} to {})".format(*(pattern.format(bound * scale) for bound in row["ci95"][key]))
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    machine, first = results["machine"], results["rows"][0]
    lines.append(
        f"\n{first['samples']} captions of the {results['split']} split, guidance {first['guidance']:g}, {first['dtype']}, not "
        f"compiled; one sample timed, {first['latency_ms']['runs']} rounds; {machine['device']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, diffusers {machine['diffusers']}. Source: "
        f"`benchmarks/results/demo.json`, written by `{results['command']}`."
    )
    return "\n".join(lines)


def grids() -> None:
    """32 dense pictures of test captions; and 8 of them dense, at keep 0.8, 0.6 and 0.5."""
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, {"max_sequence_length": 16}))
    captions = [str(c) for c in EmojiData().captions("test")[:32]]
    folder = ROOT / "docs/images"
    folder.mkdir(parents=True, exist_ok=True)
    paste(comparison.pictures(comparison.dense(), captions), 8).save(folder / "dense-32.png")
    points = [comparison.dense(), *(comparison.tokens(keep) for keep in (0.8, 0.6, 0.5))]
    paste(torch.cat([comparison.pictures(point, captions[:8]) for point in points]), 8).save(folder / "grid.png")


def paste(pictures: torch.Tensor, columns: int) -> Image.Image:
    """[n, 3, H, W] to one picture."""
    height, width = pictures.shape[-2:]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(to_image(picture), (index % columns * width, index // columns * height))
    return sheet


def main() -> None:
    """Rewrite README.md between its markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true")
    if parser.parse_args().grid:
        grids()
    readme = ROOT / "README.md"
    pattern = re.compile(r"(<!-- table: [^>]*-->\n).*?(<!-- end table -->)", re.DOTALL)
    unfinished = readme.with_suffix(".part")
    unfinished.write_text(pattern.sub(lambda match: match[1] + table() + "\n" + match[2], readme.read_text()))
    unfinished.replace(readme)


if __name__ == "__main__":
    main()
