"""Train block routers for the shape pipeline: each learns from what it costs to reuse its block's last residual.

    python recipes/shapes/train_teacher.py
    python recipes/shapes/train_adapter.py --steps 300             # resumes from --work by itself
    python benchmarks/shapes_quality.py --adapter build/shapes/adapter/blocks-refresh

The trainer is the one of every family.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import encoder
import torch
from accelerate import Accelerator

import shivelight as sl
from shivelight.demo import shape_pipeline
from shivelight.training.cache import LatentCache, write_cache
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

NAME = "blocks-refresh"


@torch.no_grad()
def build_cache(pipe: Any, latents: Path, folder: Path) -> LatentCache:
    """Every training shape in its first two poses, with the tokens of its view."""
    train = encoder.load(latents)["train"]
    clean = train["latents"][:, :2, 0].flatten(0, 1).float() * pipe.vae.scale_factor
    views = train["views"][:, :2].flatten(0, 1)[:, None].float() / 255
    tokens = torch.cat([pipe.conditioner(image=part)["main"] for part in views.split(128)])
    return write_cache(folder, clean, {"main": tokens}, empty=pipe.conditioner.unconditional_embedding(1))


def main() -> None:
    """Train or go on training; the adapter is written to WORK/blocks-refresh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--group-size", type=int, default=8, help="samples of a step, which share a timestep")
    parser.add_argument("--pipeline", type=Path, default=Path("build/shapes/teacher/pipeline.pt"))
    parser.add_argument("--latents", type=Path, default=Path("build/shapes/latents.pt"))
    parser.add_argument("--work", type=Path, default=Path("build/shapes/adapter"))
    args = parser.parse_args()
    pipe = shape_pipeline.open_pipeline(args.pipeline)
    cache = build_cache(pipe, args.latents, args.work / "cache")
    routing = sl.RoutingConfig(None, sl.BlockRouting(closed="reuse", widths=(1.0,)), reuse=sl.Reuse())
    config = TrainingConfig(
        router_steps=args.steps // 4, policy_steps=0, joint_steps=args.steps - args.steps // 4, groups=1,
        group_size=args.group_size, gate_target=0.5, gate_signal="damage", lr_router=3e-3, lr_gates=5e-2,
        checkpoint_every=50, calibration_batches=32,
    )  # fmt: skip
    trainer = Trainer(pipe, routing, config, cache, args.work / "run", Accelerator(cpu=True))

    def tell(record: dict[str, float]) -> None:
        if record["step"] % 10 == 0:
            print({name: round(value, 4) for name, value in record.items()}, flush=True)

    folder = trainer.run(tell)
    shutil.rmtree(args.work / NAME, ignore_errors=True)
    shutil.copytree(folder, args.work / NAME)
    print(args.work / NAME)


if __name__ == "__main__":
    main()
