"""What a step at which some tokens or the last blocks run costs on the clock: generations of few steps, two of which run, on a
preset's shape with random weights, or on the embedded distilled backbone, timed in turns.

    python benchmarks/partial.py                             # writes benchmarks/results/partial.json
    python benchmarks/partial.py --embedded --rounds 60      # writes benchmarks/results/partial-embedded.json

A part of the tokens pays where tokens are most of what a step costs, which on the embedded model they are not
(`block_scaling.py`); there the last blocks do.
"""

import argparse
from pathlib import Path
from typing import Literal

import torch

from shivelight.backbones import find_spec
from shivelight.backbones.presets import read_preset
from shivelight.cli import common
from shivelight.config import Part, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.evaluation.bare import BareLoop, timed_rows
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.results import new_results, write_results

COMPUTES = (0.5, 0.56, 0.6, 0.65, 0.7, 0.75)
OUT = Path("benchmarks/results")
Timed = tuple[str, Literal[False] | Part, tuple[float, ...]]

# (method, what runs of a step at rest, budgets): on the embedded backbone also two steps alone, and three.
PRESET: tuple[Timed, ...] = (("training-free-blocks", "tokens", COMPUTES),)
EMBEDDED: tuple[Timed, ...] = (
    ("training-free-blocks", False, (0.5, 0.75)),
    ("training-free-blocks-tokens", "tokens", (0.59, 0.62)),
    ("training-free-blocks-rear", "rear", (0.59, 0.62)),
)


def main() -> None:
    """Time and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="sd3-cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--embedded", action="store_true", help="the distilled embedded backbone, in bf16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    device = common.DEFAULT_DEVICE
    if args.embedded:
        model = embedded.load_few_step(device, torch.bfloat16).transformer
        name, (tokens, _) = "embedded", find_spec(model).default_shape(model)
        text_tokens = embedded.TEXT_TOKENS
    else:
        preset = read_preset(args.shape)
        torch.manual_seed(0)
        model = preset.build(device=device, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
        name, tokens, text_tokens = args.shape, preset.image_tokens, preset.text_tokens
    loop = BareLoop(model, args.batch, tokens, text_tokens, args.steps)
    if args.compile:
        loop.compile()
    points = [
        OperatingPoint(
            method,
            {"compute": compute},
            loop.steps,
            loop.attached(RoutingConfig.training_free(compute=compute, axis="blocks", partial=part)),
        )
        for method, part, computes in (EMBEDDED if args.embedded else PRESET)
        for compute in computes
    ]
    described = {"variant": name, "image_tokens": tokens, "text_tokens": text_tokens}
    results = new_results(device=device, backbone={"class": type(model).__name__, "of": name})
    results["rows"] = timed_rows(loop, points, args.rounds, progress=print, described=described)
    for row in results["rows"]:
        speedup, told = row.get("speedup"), f"{row['latency_ms']['median']:.0f} ms"
        if speedup is not None:
            told += f", {speedup:.3f}x of {row['planned_ratio']:.4f}: efficiency {row['efficiency']:.3f}"
        print(row["method"], row["budget"], told)
    write_results(args.out or OUT / f"partial{'-embedded' if args.embedded else ''}.json", results)


if __name__ == "__main__":
    main()
