"""Train adapters for the embedded pipeline, or for another that train_teacher.py exports: token routing, and the dense baseline
tuned the same way; on request, block routing and both together.

    python recipes/train_adapters.py --joint-steps 1500                     # tokens and dense-finetuned; resumes by itself
    python recipes/train_adapters.py --only blocks-refresh                  # block routers that learn measured damage
    python recipes/train_adapters.py --pipeline build/flux/pipeline --only tokens-reuse --only blocks-refresh

All see the same pictures in the same order with the same losses; the baseline takes the steps of all three stages. Pictures are
of what the teacher knows; adapters of another pipeline than the embedded one go into `adapters` beside it.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import checkpoint
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from teachers import concept_of, few_levels, known_concepts

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from shivelight.cli import common
from shivelight.cli.train import run_with_progress
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.demo import pipeline as embedded
from shivelight.demo.export import export_images
from shivelight.files import replacing
from shivelight.training.cache import LatentCache
from shivelight.training.data import build_cache, read_folder
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

# Joined from two of the others.
JOINED = "tokens+blocks-refresh"


def open_pipeline(source: Path, device: str, dtype: torch.dtype) -> Any:
    """The embedded pipeline, or a folder of any family."""
    return common.open_pipeline(None if source == embedded.PIPELINE else str(source), device, dtype)


def encoded(source: Path, work: Path, pictures: int) -> tuple[Any, LatentCache, Accelerator]:
    """(the pipeline, pictures of what it knows as latents and conditions, how it trains)."""
    # The frozen backbone in bf16: autocast would cast its weights anew in every pass. Routers and deltas stay in fp32.
    pipe = open_pipeline(source, common.DEFAULT_DEVICE, torch.bfloat16)
    known = known_concepts(source)
    drawn = read_folder(export_images(work / "images", pictures, "train", seed=100_000))
    images = [image for image in drawn if concept_of(image.caption) in known]
    with common.progress_bar("encoding", len(images)) as advance:
        cache = build_cache(pipe, images, work / "cache", 128, embedded.TEXT_TOKENS, lambda done, total: advance())
    return pipe, cache, Accelerator(mixed_precision="bf16", cpu=common.DEFAULT_DEVICE == "cpu")


def train(name: str, routing: RoutingConfig, config: TrainingConfig, source: Path, work: Path, pictures: int) -> Path:
    """One adapter into work/NAME/adapter."""
    pipe, cache, accelerator = encoded(source, work, pictures)
    trainer = Trainer(pipe, routing, config, cache, work / name, accelerator)
    return finished(trainer)


def finished(trainer: Trainer) -> Path:
    """The adapter's folder at the end of a run, whose last losses are shown."""
    folder = run_with_progress(trainer)
    tail = trainer.history[-50:]
    print({key: round(sum(r[key] for r in tail) / len(tail), 5) for key in tail[-1] if key != "step"})
    return folder


def join(tokens: Path, blocks: Path, source: Path, out: Path) -> Path:
    """One adapter with the token router of one and the block routers of another: both were trained on the backbone's own
    weights, which neither changes."""
    pipe = open_pipeline(source, "cpu", torch.float32)
    (first, _), (second, _) = read_adapter(pipe, tokens), read_adapter(pipe, blocks)
    sl.attach(pipe, RoutingConfig(first.config.tokens, second.config.blocks, reuse=second.config.reuse))
    joined = routed_of(pipe)
    assert (
        joined.router is not None and joined.gates is not None and first.router is not None and second.gates is not None
    )
    joined.router.load_state_dict(first.router.state_dict())
    joined.gates.load_state_dict(second.gates.state_dict())
    return sl.save_adapter(pipe, out)


def ship(folder: Path, target: Path) -> int:
    """Copy an adapter with its tensors in fp16, as all embedded weights are; returns its size in bytes. Its base model is named as
    it lies in the package, not on this machine."""
    tensors = load_file(folder / WEIGHTS_NAME)
    halved = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    with replacing(target / WEIGHTS_NAME) as unfinished:
        save_file(halved, unfinished, metadata={"format": "pt"})
    config, package = json.loads((folder / CONFIG_NAME).read_text()), Path(sl.__file__).parents[1]
    base = Path(config.get("base_model_name_or_path") or "")
    if base.is_relative_to(package):
        config["base_model_name_or_path"] = base.relative_to(package).as_posix()
    with replacing(target / CONFIG_NAME) as unfinished:
        unfinished.write_text(json.dumps(config, indent=2) + "\n")
    return sum(file.stat().st_size for file in target.iterdir())


def main() -> None:
    """Train both and put them beside the embedded pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router-steps", type=int, default=100)
    parser.add_argument("--policy-steps", type=int, default=100)
    parser.add_argument("--joint-steps", type=int, default=600)
    parser.add_argument("--groups", type=int, default=1, help="micro-batches of a step, each with its own timestep")
    parser.add_argument("--group-size", type=int, default=8, help="samples of each micro-batch")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--rank", type=int, default=6, help="of the DoRA deltas")
    parser.add_argument("--pipeline", type=Path, default=embedded.PIPELINE)
    parser.add_argument("--work", type=Path, help="build/adapters, or adapters-work beside another pipeline")
    parser.add_argument("--out", type=Path, help="beside the embedded pipeline, or adapters beside another one")
    parser.add_argument(
        "--only",
        action="append",
        choices=["tokens", "dense-finetuned", "tokens-reuse", "blocks", "tokens+blocks", "blocks-refresh", JOINED],
        help="repeat it; tokens and dense-finetuned by default",
    )
    parser.add_argument("--gate-target", type=float, default=0.5)
    parser.add_argument("--width-target", type=float, default=0.7)
    args = parser.parse_args()
    ours = args.pipeline == embedded.PIPELINE
    args.work = args.work or (Path("build/adapters") if ours else args.pipeline.parent / "adapters-work")
    args.out = args.out or (embedded.ADAPTER.parent if ours else args.pipeline.parent / "adapters")
    common.quiet_libraries()
    checkpoint.use_plain_attention(torch.device(common.DEFAULT_DEVICE))
    config = TrainingConfig(
        router_steps=args.router_steps,
        policy_steps=args.policy_steps,
        joint_steps=args.joint_steps,
        groups=args.groups,
        group_size=args.group_size,
        checkpoint_every=100,
        gate_target=args.gate_target,
        width_target=args.width_target,
    )
    if levels := few_levels(args.pipeline):
        # Drawn without guidance, so no caption is ever empty; and what it predicts is no velocity towards the data.
        config = dataclasses.replace(config, levels=levels, caption_drop=0.0, flow_weight=0.0)
    deltas = DeltaConfig(args.rank, float(args.rank))
    refreshing = BlockRouting(closed="reuse", widths=(1.0,))
    measured = dataclasses.replace(
        config,
        policy_steps=0,
        joint_steps=config.policy_steps + config.joint_steps,
        gate_signal="damage",
        lr_router=3e-3,
        lr_gates=5e-2,
    )
    runs = {
        "tokens": (RoutingConfig(TokenRouting(), deltas=deltas), config),
        "dense-finetuned": (
            RoutingConfig(None, deltas=deltas),
            dataclasses.replace(config, router_steps=0, policy_steps=0, joint_steps=config.total_steps),
        ),
        # The router alone: with residuals to add, neither deltas nor a policy brought more (docs/decisions/training-free.md).
        "tokens-reuse": (
            RoutingConfig(TokenRouting(sees_drift=True, ratios="fixed"), reuse=Reuse()),
            dataclasses.replace(config, policy_steps=0, joint_steps=config.policy_steps + config.joint_steps),
        ),
        # No policy to train; its steps go to the routers.
        "blocks": (
            RoutingConfig(None, BlockRouting(), deltas),
            dataclasses.replace(config, router_steps=config.router_steps + config.policy_steps, policy_steps=0),
        ),
        "tokens+blocks": (RoutingConfig(TokenRouting(), BlockRouting(), deltas), config),
        # Closed gates add the residuals of earlier steps, and learn what that costs.
        "blocks-refresh": (RoutingConfig(None, refreshing, reuse=Reuse()), measured),
    }
    for name, (routing, settings) in runs.items():
        if name in (args.only or ("tokens", "dense-finetuned")):
            folder = train(name, routing, settings, args.pipeline, args.work, args.pictures)
            print(f"{name}: {ship(folder, args.out / name) / 1e6:.2f} MB in {args.out / name}")
    if JOINED in (args.only or ()):
        parts = [args.work / name / "adapter" for name in ("tokens-reuse", "blocks-refresh")]
        folder = join(*parts, args.pipeline, args.work / JOINED / "adapter")
        print(f"{JOINED}: {ship(folder, args.out / JOINED) / 1e6:.2f} MB in {args.out / JOINED}")


if __name__ == "__main__":
    main()
