"""`shivelight train`: an adapter for a pipeline, from a folder of captioned images."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shivelight.adapter import prepare
from shivelight.cli import common
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.errors import DataError, TrainingError
from shivelight.evaluation.results import new_results, new_row
from shivelight.pipelines import call_default
from shivelight.training.data import build_cache, read_folder
from shivelight.training.denoisers import denoiser_for
from shivelight.training.estimate import estimate
from shivelight.training.stages import EstimatorName, TrainingConfig
from shivelight.training.trainer import Trainer

_DEFAULT = TrainingConfig()


def train(
    images: Annotated[
        Path, typer.Argument(help="Folder of images with captions (name.txt beside each, or metadata.jsonl).")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of checkpoints, log and adapter; a run there is gone on with.")
    ] = Path("runs/adapter"),
    pipeline: common.PipelineOption = None,
    method: Annotated[
        Literal["tokens", "blocks", "tokens+blocks", "dense-finetuned"],
        typer.Option(help="What is routed; dense-finetuned is the same deltas without routing."),
    ] = "tokens",
    router_steps: Annotated[int, typer.Option(min=0, help="Steps of stage 1: routers.")] = _DEFAULT.router_steps,
    policy_steps: Annotated[
        int, typer.Option(min=0, help="Steps of stage 2: routers and policy.")
    ] = _DEFAULT.policy_steps,
    joint_steps: Annotated[int, typer.Option(min=0, help="Steps of stage 3: everything.")] = _DEFAULT.joint_steps,
    groups: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = _DEFAULT.groups,
    group_size: Annotated[int, typer.Option(min=1, help="Samples per micro-batch.")] = _DEFAULT.group_size,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the DoRA deltas; 0 for none.")] = 8,
    estimator: Annotated[
        EstimatorName, typer.Option(help="How the loss reaches the token routers; input is the paper's estimator.")
    ] = _DEFAULT.estimator,
    budget: Annotated[
        Literal["anchor", "loss"], typer.Option(help="Solve for the budget, or the paper's budget loss.")
    ] = _DEFAULT.budget,
    target: Annotated[float, typer.Option(help="Keep ratio of the budget loss.")] = _DEFAULT.target,
    ratios: Annotated[
        Literal["policy", "fixed"], typer.Option(help="Keep ratios per timestep and block, or one for all.")
    ] = "policy",
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Train with the residuals of earlier steps, which all that is left out adds."),
    ] = False,
    gate_signal: Annotated[
        Literal["gradient", "damage"],
        typer.Option(
            help="What gates learn from: the paper's gradient, or what reuse was measured to cost (needs --reuse)."
        ),
    ] = _DEFAULT.gate_signal,
    sampling_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a few-step model (turbo, schnell, lightning): train at the noise levels of so many steps alone.",
        ),
    ] = None,
    keep_low: Annotated[float, typer.Option(help="Lowest sampled keep ratio.")] = _DEFAULT.keep_low,
    keep_high: Annotated[float, typer.Option(help="Highest sampled keep ratio.")] = _DEFAULT.keep_high,
    gate_target: Annotated[
        float, typer.Option(help="Mean probability of running a block (rho_g).")
    ] = _DEFAULT.gate_target,
    width_target: Annotated[float, typer.Option(help="Mean share of its MLP (rho_w).")] = _DEFAULT.width_target,
    lr_router: Annotated[float, typer.Option(help="Peak learning rate of the routers.")] = _DEFAULT.lr_router,
    lr_gates: Annotated[
        float, typer.Option(help="Peak learning rate of the block routers' heads.")
    ] = _DEFAULT.lr_gates,
    lr_policy: Annotated[float, typer.Option(help="Peak learning rate of the policy.")] = _DEFAULT.lr_policy,
    lr_deltas: Annotated[float, typer.Option(help="Peak learning rate of the deltas.")] = _DEFAULT.lr_deltas,
    flow_weight: Annotated[
        float | None,
        typer.Option(
            help=f"Weight of the loss to the data beside distillation: flow matching, or noise; {_DEFAULT.flow_weight:g}, and 0 "
            "with --sampling-steps."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale that a guidance-distilled model (FLUX.1-dev) is told; the pipeline's default."),
    ] = None,
    size: common.SizeOption = None,
    max_sequence_length: common.TextOption = None,
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Autocast.")] = "bf16",
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.")
    ] = _DEFAULT.checkpoint_every,
    preview_every: Annotated[int, typer.Option(min=0, help="Steps between preview grids; 0 for none.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached latents; OUT/cache by default.")] = None,
    log_with: Annotated[str | None, typer.Option(help="An accelerate tracker, such as tensorboard.")] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate", help="Print time, memory and adapter size, then stop.")
    ] = False,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = common.DEFAULT_DEVICE,
    json: common.JsonOption = None,
) -> None:
    """Train an adapter. Resumable: the same command goes on where it stopped, exactly.

    Example: shivelight train photos/ --pipeline stabilityai/stable-diffusion-3.5-medium --out runs/sd35
    """
    routed, tokens, blocks = method != "dense-finetuned", "tokens" in method, "blocks" in method
    config = TrainingConfig(
        router_steps=router_steps if routed else 0,
        policy_steps=policy_steps if tokens and ratios == "policy" else 0,
        joint_steps=joint_steps, groups=groups, group_size=group_size, estimator=estimator, budget=budget, target=target,
        keep_low=keep_low, keep_high=keep_high, lr_router=lr_router, lr_gates=lr_gates, lr_policy=lr_policy, lr_deltas=lr_deltas,
        flow_weight=_DEFAULT.flow_weight if flow_weight is None else flow_weight,
        gate_target=gate_target, width_target=width_target, gate_signal=gate_signal,
        checkpoint_every=checkpoint_every, preview_every=preview_every, seed=seed,
    )  # fmt: skip
    found = read_folder(images)
    common.quiet_libraries()
    common.check_device(device)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=device == "cpu",
        log_with=log_with,
        project_dir=str(out) if log_with else None,
    )
    pipe = common.open_pipeline(pipeline, str(accelerator.device))
    denoiser = denoiser_for(pipe, guidance)
    # Measured damage is of the backbone's own blocks, run whole: neither deltas nor widths go with it.
    measures = gate_signal == "damage"
    narrows = not measures and denoiser.spec.mlps(pipe.transformer)
    widths = BlockRouting.widths if narrows else (1.0,)
    block_routing = BlockRouting(widths=widths, closed="reuse" if reuse else "pass")
    routing = RoutingConfig(
        tokens=TokenRouting(ratios=ratios, sees_drift=reuse) if tokens else None,
        blocks=block_routing if blocks else None,
        deltas=DeltaConfig(rank, float(rank)) if rank and not measures else None,
        reuse=Reuse() if reuse and routed else None,
    )
    prepare(pipe, routing)  # what cannot be routed is said before anything is encoded
    side = size or denoiser.side()
    options = common.call_options(pipe, pipeline, side, max_sequence_length)
    text = options.get("max_sequence_length", call_default(pipe, "max_sequence_length"))
    if sampling_steps is not None:
        # Such models are drawn without an empty caption, and predict no velocity towards the data.
        levels, data = denoiser.levels(sampling_steps, options), flow_weight or 0.0
        config = dataclasses.replace(config, levels=levels, caption_drop=0.0, flow_weight=data)
    with accelerator.main_process_first(), common.progress_bar("encoding", len(found)) as advance:
        latents = build_cache(pipe, found, cache or out / "cache", side, text, lambda done, total: advance(), denoiser)
    trainer = Trainer(pipe, routing, config, latents, out, accelerator, denoiser)
    if estimate_only:
        figures = estimate(trainer)
        trainer.close()
        common.say(
            f"{figures['steps']:.0f} steps, about {figures['hours']:.2f} hours, {figures['peak_memory_mb']:.0f} MB peak memory, "
            f"adapter {figures['adapter_mb']:.2f} MB"
        )
        if json is not None:
            results = new_results(
                seed=seed, device=device, backbone={"class": type(pipe.transformer).__name__}, estimate=figures
            )
            common.save_json(json, results)
        return
    if log_with:
        accelerator.init_trackers("shivelight")
    folder = run_with_progress(trainer)
    accelerator.end_training()
    common.say(f"adapter: {folder}")
    if json is not None and accelerator.is_main_process:
        results = new_results(
            seed=seed, device=device, backbone={"class": type(pipe.transformer).__name__}, losses=trainer.history
        )
        results["rows"] = [new_row(method, steps=None)]
        common.save_json(json, results)


def run_with_progress(trainer: Trainer) -> Path:
    """Run to the end behind a bar with loss, mean keep (gates, width) and the time left."""
    if not len(trainer.cache):
        raise DataError("The data set is empty.")
    total = trainer.config.total_steps
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=common.console, disable=not trainer.accelerator.is_main_process,
    ) as bar:  # fmt: skip
        task = bar.add_task("training", total=total)

        def on_step(record: dict[str, float]) -> None:
            stage = trainer.config.stage(max(0, int(record["step"]) - 1))[0]
            shares = "".join(f" {name} {record[name]:.2f}" for name in ("keep", "gates", "width") if name in record)
            bar.update(task, completed=record["step"], description=f"{stage}: loss {record['loss']:.4f}{shares}")

        try:
            return trainer.run(on_step)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "The device ran out of memory. Use --group-size 1, --mixed-precision bf16 or a smaller --size; the run goes on "
                "from its last checkpoint."
            ) from error
