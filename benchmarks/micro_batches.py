"""How to train samples that keep different numbers of tokens: three ways, timed in turns on the embedded backbone.

    python benchmarks/micro_batches.py        # writes benchmarks/results/micro-batches.json

16 samples, keep ratios from 0.35 to 0.95, student forward and backward through the routers:
`shared`: 4 micro-batches of 4, one ratio each; `grouped`: one batch of 16 different ratios, blocks run once for each
distinct k; `single`: 16 batches of one.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.measurement.latency import interleave, synchronize
from shivelight.training.session import TeacherRecord, TokenSession

SAMPLES = 16


def main() -> None:
    """Time the three ways and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/micro-batches.json"))
    args = parser.parse_args()
    device = common.DEFAULT_DEVICE
    pipe = common.open_pipeline(None, device)
    sl.attach(pipe)
    routed, config = routed_of(pipe), pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SAMPLES, config.in_channels, config.sample_size, config.sample_size, generator=generator).to(
        device
    )
    text = torch.randn(SAMPLES, 32, config.joint_attention_dim, generator=generator).to(device)
    pooled = torch.randn(SAMPLES, config.pooled_projection_dim, generator=generator).to(device)
    ratios = torch.linspace(0.35, 0.95, SAMPLES, device=device)

    def forward(rows: slice) -> torch.Tensor:
        times = 1000 * torch.linspace(0.9, 0.1, SAMPLES, device=device)[rows]
        return pipe.transformer(latents[rows], text[rows], pooled[rows], times, return_dict=False)[0]

    def train(rows: slice, keep: torch.Tensor) -> None:
        record = TeacherRecord(())
        with torch.no_grad(), routed.switched(False):
            routed.observer = record
            wanted = forward(rows)
            routed.observer = None
        routed.session = TokenSession(routed.routed, keep[:, None].expand(-1, len(routed.routed)), record)
        (forward(rows) - wanted).square().mean().backward()
        routed.session = None

    def shared() -> None:
        for start in range(0, SAMPLES, 4):
            train(slice(start, start + 4), ratios[start : start + 4].mean().reshape(1))

    def single() -> None:
        for index in range(SAMPLES):
            train(slice(index, index + 1), ratios[index : index + 1])

    ways: dict[str, Callable[[], None]] = {
        "shared": shared,
        "grouped": lambda: train(slice(None), ratios),
        "single": single,
    }
    timings = interleave(ways, args.rounds, 1, synchronize(device))
    results = new_results(device=device, backbone=describe(pipe))
    results["rows"] = [
        new_row(
            way,
            {"keep": 0.65},
            batch=SAMPLES,
            latency_ms=timings.latency_ms(way),
            speedup=timings.speedup(way, "single"),
        )
        for way in ways
    ]
    write_results(args.out, results)
    for row in results["rows"]:
        print(f"{row['method']:>8}: {row['latency_ms']['median']:.0f} ms, {row['speedup']:.2f}x of single")


if __name__ == "__main__":
    main()
