"""What a block of the embedded backbone costs at fewer tokens: the most that any token routing could gain here.

    python benchmarks/block_scaling.py        # writes benchmarks/results/block-scaling.json

Times one dense block on N tokens and on fewer, in turns, without router or gather, and beside it what routing adds:
scores, ranking, gather, write-back. `efficiency` = speed-up * planned ratio is the ceiling that the kernels of this
machine set: where it falls, small matrices and the cost of each operator are the cause. What routing adds comes on top.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.execution.tokens import gather_tokens, write_back
from shivelight.measurement.latency import interleave, synchronize
from shivelight.routing import top_k_indices

BLOCK = 3
COUNTS = (256, 240, 224, 208, 205, 192, 160, 154, 152, 128, 96, 64, 8)


@torch.no_grad()
def main() -> None:
    """Time the block and the parts of routing, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2, help="2: one picture under guidance")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/block-scaling.json"))
    args = parser.parse_args()
    device, dtype = common.DEFAULT_DEVICE, getattr(torch, args.dtype)
    pipe = common.open_pipeline(None, device)
    pipe.transformer.to(dtype)
    sl.attach(pipe)
    routed, block = routed_of(pipe), pipe.transformer.transformer_blocks[BLOCK]
    tokens, width, text = COUNTS[0], pipe.transformer.inner_dim, 32

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    time, words, whole = draw(args.batch, width), draw(args.batch, text, width), draw(args.batch, tokens, width)
    routed.context.time_embedding = routed.context.condition = time
    half = slice(args.batch // 2, None) if args.batch > 1 else slice(None)
    scores = routed.scores(BLOCK, whole)
    kept = top_k_indices(scores, tokens // 2)
    gathered = gather_tokens(whole, kept)
    ways: dict[str, Callable[[], object]] = {
        f"block-{n}": partial(block, draw(args.batch, n, width), words, time) for n in COUNTS
    }
    ways |= {
        # With guidance the conditional half is scored for both.
        "router": lambda: routed.scores(BLOCK, whole[half], half),
        "ranking": lambda: top_k_indices(scores[half], tokens // 2),
        "gather": lambda: gather_tokens(whole, kept),
        "write-back": lambda: write_back(whole, kept, gathered),
    }
    with sl.dense(pipe):
        timings = interleave(ways, args.rounds, 3, synchronize(device))
    results = new_results(device=device, backbone=describe(pipe))
    cost, dense = routed.planner.costs[BLOCK], f"block-{tokens}"
    for way in ways:
        figures: dict[str, Any] = {}
        if way.startswith("block-"):
            count = int(way.removeprefix("block-"))
            planned, speedup = cost.flops(count, text) / cost.flops(tokens, text), timings.speedup(way, dense)
            figures = {"planned_ratio": planned, "speedup": speedup, "efficiency": planned * speedup.value}
        results["rows"].append(
            new_row(way, batch=args.batch, dtype=args.dtype, latency_ms=timings.latency_ms(way), **figures)
        )
    write_results(args.out, results)
    for row in results["rows"]:
        extra = f", efficiency {row['efficiency']:.2f}" if "efficiency" in row else ""
        print(f"{row['method']:>10}: {row['latency_ms']['median']:.3f} ms{extra}")


if __name__ == "__main__":
    main()
