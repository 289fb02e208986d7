"""What it costs that one adapter serves every budget: at three of them, adapters that were trained for that budget alone.

    python benchmarks/sharing.py        # writes benchmarks/results/sharing.json; adapters that are there are not trained again

One adapter is trained as `recipes/train_adapters.py` does, every micro-batch at a keep ratio of its own, and judged at 12 budgets;
three have all their micro-batches at one keep ratio, and their policy's budget there, and are judged at that. The same steps,
pictures, order and seeds. `loss` is the PSNR of the one trained for a budget, less the shared one's, caption by caption: what
sharing costs, in dB. Of token routing with deltas and policy (tokens that are left out are dropped), and of routers with reuse.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

import shivelight as sl
from shivelight.adapter_files import CONFIG_NAME, read_adapter
from shivelight.cli import common
from shivelight.config import DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.demo.export import export_images
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, read_results, write_results
from shivelight.evaluation.standard import adapter_points
from shivelight.measurement.statistics import bootstrap
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

KEEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
ALONE = (0.8, 0.6, 0.4)
SHARED = "shared"


def kinds(steps: int) -> dict[str, tuple[RoutingConfig, TrainingConfig]]:
    """What is trained, and how."""
    config = TrainingConfig(
        router_steps=steps // 6, policy_steps=steps // 6, joint_steps=steps - 2 * (steps // 6), groups=1, group_size=8,
        keep_low=0.4, keep_high=1.0, checkpoint_every=100,
    )  # fmt: skip
    routers = replace(config, router_steps=steps, policy_steps=0, joint_steps=0)
    reusing = RoutingConfig(TokenRouting(sees_drift=True, ratios="fixed"), reuse=Reuse())
    return {
        "tokens": (RoutingConfig(TokenRouting(), deltas=DeltaConfig(6, 6.0)), config),
        "tokens+reuse": (reusing, routers),
    }


def train(work: Path, pictures: int, steps: int, chosen: Sequence[str]) -> None:
    """All adapters of these kinds that are not there yet."""
    for kind in chosen:
        routing, config = kinds(steps)[kind]
        for keep in (None, *ALONE):
            out = work / kind / name_of(keep)
            if (out / "adapter" / CONFIG_NAME).exists():
                continue
            own = config if keep is None else replace(config, keep_low=keep, keep_high=keep, target=keep)
            pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
            images = read_folder(export_images(work / "images", pictures, "train", seed=100_000))
            cache = build_cache(pipe, images, work / "cache", 128, embedded.TEXT_TOKENS)
            AcceleratorState._reset_state()
            accelerator = Accelerator(mixed_precision="bf16", cpu=common.DEFAULT_DEVICE == "cpu")
            Trainer(pipe, routing, own, cache, out, accelerator).run()
            print(f"{kind} {name_of(keep)}: trained", flush=True)


def name_of(keep: float | None) -> str:
    """Of an adapter."""
    return SHARED if keep is None else f"alone-{keep:g}"


def main() -> None:
    """Train, draw and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training, of each adapter")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--count", type=int, default=20, help="captions of the test split")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(kinds(6)), default=list(kinds(6)), help="others keep their rows"
    )
    parser.add_argument("--work", type=Path, default=Path("build/sharing"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sharing.json"))
    args = parser.parse_args()
    common.quiet_libraries()
    common.keep_freed_memory()
    train(args.work, args.pictures, args.steps, args.kinds)
    pipe = common.open_pipeline(None, common.DEFAULT_DEVICE, torch.bfloat16)
    sl.attach(pipe)
    options = {"max_sequence_length": embedded.TEXT_TOKENS}
    comparison = Comparison(pipe, Setting(embedded.STEPS, embedded.GUIDANCE, 0, 20, options))
    captions = [str(caption) for caption in EmojiData().captions("test")[: args.count]]
    results = new_results(
        " ".join(["benchmarks/sharing.py", *sys.argv[1:]]), device=common.DEFAULT_DEVICE, split="test",
        backbone={"class": "the embedded pipeline"}, training_steps=args.steps,
    )  # fmt: skip
    if args.out.exists():
        results["rows"] = [row for row in read_results(args.out)["rows"] if row["method"] not in args.kinds]
    dense = comparison.pictures(comparison.dense(), captions)
    for kind in args.kinds:
        shared: dict[float, Tensor] = {}
        for trained_for in (None, *ALONE):
            adapter = read_adapter(pipe, args.work / kind / name_of(trained_for) / "adapter")
            for keep in KEEPS if trained_for is None else (trained_for,):
                (point,) = named(adapter_points(comparison, adapter, ablations=False, keep=keep), kind)
                drawn = fidelity_to_dense(comparison.pictures(point, captions), dense)
                figures: dict[str, Any] = drawn.estimates()
                if trained_for is None:
                    shared[keep] = drawn.psnr
                else:
                    figures["loss_db"] = bootstrap(drawn.psnr - shared[keep])
                row = new_row(
                    kind, {"keep": keep}, steps=embedded.STEPS, samples=len(captions),
                    planned_ratio=comparison.planned(point), **figures,
                ) | {"variant": name_of(trained_for)}  # fmt: skip
                results["rows"].append(row)
                told = {key: round(row[key], 3) for key in ("psnr_to_dense", "loss_db") if key in row}
                print(kind, name_of(trained_for), keep, told, flush=True)
                write_results(args.out, results)


def named(points: list[OperatingPoint], method: str) -> list[OperatingPoint]:
    """Those of a method."""
    return [point for point in points if point.method == method]


if __name__ == "__main__":
    main()
