"""What an iteration of joint training costs beside distilled dense fine-tuning: the same student and teacher, without routing.

    python benchmarks/training_cost.py        # writes benchmarks/results/training-cost.json
    python benchmarks/training_cost.py --shape sd3-cpu --size 4 --ways "tokens keep 1.0" "tokens keep 0.6" --add

Each way trains a copy of the embedded pipeline (or, with `--shape`, its text encoders and VAE around a preset's transformer with
random weights: of a width at which a router weighs what it does in published models) on the same pictures, one iteration in turn;
`ratio` is the median over the rounds of its time over dense fine-tuning's in the same round, `total_ratio` that of all rounds
together: with `residual-2` every fourth iteration fits a curvature, which a median hides. Wanted: at most 1.07 with all tokens
kept, below 1.0 at keep 0.6, and no more memory. Memory is what an iteration needs beyond weights and optimiser, the most of four
iterations: the CUDA allocator's, or on a CPU that of the tensors that live at once.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shivelight.backbones.presets import read_preset
from shivelight.cli import common
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.demo import pipeline as embedded
from shivelight.demo.export import export_images
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.measurement.latency import interleave, synchronize
from shivelight.measurement.memory import working_memory_mb
from shivelight.measurement.statistics import bootstrap, median
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

DELTAS = DeltaConfig(6, 6.0)


def pipeline_of(shape: str | None, device: str) -> Any:
    """The embedded pipeline, with the transformer of a preset in the place of its own."""
    pipe = common.open_pipeline(None, device, torch.bfloat16)
    if shape is not None:
        config, own = read_preset(shape).config, pipe.transformer.config
        fitting = {
            name: own[name] for name in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
        }
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer)(**config | fitting).to(device, torch.bfloat16)
    return pipe


def main() -> None:
    """Time every way and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", type=int, default=16, help="samples of an iteration")
    parser.add_argument("--shape", help="preset of an SD3 transformer")
    parser.add_argument(
        "--pixels",
        type=int,
        help="side of the pictures; that of the embedded pipeline by default, twice it for a shape",
    )
    parser.add_argument("--ways", nargs="+", help="beside dense fine-tuning; all by default")
    parser.add_argument("--add", action="store_true", help="keep rows of other shapes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training-cost.json"))
    args = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    device = common.DEFAULT_DEVICE
    config = TrainingConfig(
        router_steps=0, policy_steps=0, joint_steps=1000, groups=1, group_size=args.size, rank_batches=0
    )
    kept = replace(config, keep_low=0.6, keep_high=0.6)
    ways = {
        "dense-finetuned": (RoutingConfig(None, None, DELTAS), config),
        "tokens keep 1.0": (RoutingConfig(TokenRouting(), None, DELTAS), replace(config, keep_low=1.0, keep_high=1.0)),
        "tokens keep 0.6": (RoutingConfig(TokenRouting(), None, DELTAS), kept),
        "tokens+reuse keep 0.6": (RoutingConfig(TokenRouting(sees_drift=True), None, DELTAS, Reuse()), kept),
        "blocks": (RoutingConfig(None, BlockRouting(), DELTAS), replace(config, gate_low=0.6, gate_high=0.6)),
    }
    ways = {name: way for name, way in ways.items() if args.ways is None or name in ("dense-finetuned", *args.ways)}
    of = args.shape or "the embedded pipeline"
    results = new_results(device=device, backbone={"class": "SD3Transformer2DModel", "of": of})
    if args.add:
        results["rows"] = [row for row in read_results(args.out)["rows"] if row.get("variant") != args.shape]
    pixels = args.pixels or (128 if args.shape is None else 256)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = read_folder(export_images(folder / "images", 64, "train", seed=100_000))
        trainers = {}
        for name, (routing, training) in ways.items():
            pipe = pipeline_of(args.shape, device)
            cache = build_cache(pipe, images, folder / "cache", pixels, embedded.TEXT_TOKENS)
            accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
            trainers[name] = Trainer(pipe, routing, training, cache, folder / name, accelerator)
        timings = interleave(
            {name: own.train_step for name, own in trainers.items()}, args.rounds, 2, synchronize(device)
        )
        dense, memory = torch.tensor(timings.total["dense-finetuned"]), 0.0
        for name, trainer in trainers.items():
            ratio = bootstrap(torch.tensor(timings.total[name]) / dense, statistic=median)
            row = new_row(
                name, batch=args.size, dtype="bfloat16", latency_ms=timings.latency_ms(name), ratio=ratio,
                total_ratio=sum(timings.total[name]) / float(dense.sum()),
                working_memory_mb=max(working_memory_mb(trainer.train_step, device) for _ in range(4)),
            )  # fmt: skip
            memory = memory or row["working_memory_mb"]
            row["memory_ratio"] = row["working_memory_mb"] / memory
            results["rows"].append(row | ({} if args.shape is None else {"variant": args.shape}))
            print(
                f"{name:>22}: {row['latency_ms']['median']:.0f} ms, ratio {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}),"
                f" total {row['total_ratio']:.3f}, memory {row['memory_ratio']:.3f}"
            )
    write_results(args.out, results)


if __name__ == "__main__":
    main()
