"""How block routers are trained, one choice at a time: short runs of equal length from the same pictures.

    python benchmarks/block_training.py        # writes benchmarks/results/block-training.json

The runs: ours (full-capacity start, distilled from the frozen teacher); the paper's random start; the paper's loss, without a
teacher (flow matching to the data alone); and closed gates that reuse, with a dial that moves. Each is judged on validation
captions at the same shares of the dense FLOPs, beside how many of its gates' logits differ between samples. Runs are short,
so they rank beginnings, not ends.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.cli.train import run_with_progress
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.demo.export import export_images
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer


def main() -> None:
    """Train every variant, judge it, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router-steps", type=int, default=30)
    parser.add_argument("--joint-steps", type=int, default=90)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--compute", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/block-training.json"))
    args = parser.parse_args()
    common.quiet_libraries()
    device, deltas = common.DEFAULT_DEVICE, DeltaConfig(6, 6.0)
    ours = TrainingConfig(
        router_steps=args.router_steps, policy_steps=0, joint_steps=args.joint_steps, groups=1, group_size=8,
        gate_target=0.5, width_target=0.7,
    )  # fmt: skip
    without = dataclasses.replace(ours, output_weight=0.0, feature_weight=0.0, flow_weight=1.0)
    runs = {
        "ours": (RoutingConfig(None, BlockRouting(), deltas), ours),
        "random start": (RoutingConfig(None, BlockRouting(start="random"), deltas), ours),
        "no teacher": (RoutingConfig(None, BlockRouting(), deltas), without),
        "closed gates reuse": (RoutingConfig(None, BlockRouting(closed="reuse"), deltas, Reuse()), ours),
    }
    captions = [str(caption) for caption in EmojiData().captions("validation")[: args.captions]]
    setting = Setting(embedded.STEPS, embedded.GUIDANCE, 0, 16, {"max_sequence_length": embedded.TEXT_TOKENS})
    pipe = common.open_pipeline(None, device, torch.bfloat16)
    results = new_results(device=device, backbone=describe(pipe), split="validation")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = read_folder(export_images(folder / "images", 512, "train", seed=100_000))
        with common.progress_bar("encoding", len(images)) as advance:
            cache = build_cache(
                pipe, images, folder / "cache", 128, embedded.TEXT_TOKENS, lambda done, total: advance()
            )
        for name, (routing, config) in runs.items():
            accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
            trainer = Trainer(pipe, routing, config, cache, folder / name, accelerator)
            adapter = run_with_progress(trainer)
            trainer.close()
            sl.load_adapter(pipe, adapter)
            gates = routed_of(pipe).gates
            assert gates is not None
            spread = gates.records.gate[: gates.records.filled].float().std(0).mean().item()
            comparison = Comparison(pipe, setting)
            dense = comparison.pictures(comparison.dense(), captions)
            for compute in args.compute:
                point = comparison.routed_point("blocks", compute=compute)
                pictures = comparison.pictures(point, captions)
                row = new_row(
                    point.method, point.budget, variant=name, steps=point.steps, dtype="bfloat16", samples=len(captions),
                    guidance=setting.guidance, planned_ratio=comparison.planned(point), logit_spread=spread,
                    realised=comparison.realised[point.name], **fidelity_to_dense(pictures, dense).estimates(),
                )  # fmt: skip
                results["rows"].append(row)
                common.say(
                    f"{name:>20} {point.name:<24} realised {row['realised']:.3f}  PSNR {row['psnr_to_dense']:.2f} dB"
                )
            sl.detach(pipe)
    write_results(args.out, results)


if __name__ == "__main__":
    main()
