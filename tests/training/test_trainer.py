"""The trainer on a tiny real pipeline: stages, exact resume, the teacher, budgets, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.config import RoutingConfig, TokenRouting
from shivelight.errors import TrainingError
from shivelight.execution.routed import Routed
from shivelight.routing import count_unit
from shivelight.training.cache import LatentCache
from shivelight.training.estimate import estimate
from shivelight.training.passes import Batch
from shivelight.training.session import TeacherRecord, TokenSession
from shivelight.training.stages import ESTIMATORS
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.named_parameters().items()}


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_trains_its_own_part(pipe, make_trainer: MakeTrainer) -> None:  # noqa: ANN001
    weights = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    trainer = make_trainer()
    moved = []
    for _ in range(3):
        before = parameters(trainer)
        trainer.train_step()
        trainer.train_step()
        moved.append(changed(before, parameters(trainer)))
    assert moved == [{"router"}, {"router", "policy"}, {"router", "policy", "deltas"}]
    trainer.finish()
    sl.detach(pipe)
    after = pipe.transformer.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[n], after[n]) for n in weights)


def test_a_run_that_was_killed_goes_on_exactly(pipe, make_trainer: MakeTrainer, tmp_path: Path) -> None:  # noqa: ANN001
    whole = make_trainer("whole")
    whole.run()
    sl.detach(pipe)
    for stop in (1, 3, 4, 6):
        part = make_trainer("parts")
        part.run(until=stop)
        if stop < 6:
            part.close()
    assert without_seconds(part.history) == without_seconds(whole.history)
    logged = [json.loads(line) for line in (tmp_path / "parts/losses.jsonl").read_text().splitlines()]
    assert without_seconds(logged) == without_seconds(whole.history)
    files = [(tmp_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_steps_after_the_last_checkpoint_are_trained_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer()
    first.run(until=4)
    first.close()
    with (tmp_path / "run/losses.jsonl").open("a") as handle:  # the process died here, one line and a half later
        handle.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    second = make_trainer()
    second.run()
    assert [r["step"] for r in second.history] == [1, 2, 3, 4, 5, 6]
    assert second.history[4]["loss"] < 9.0
    logged = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert logged == second.history


def test_ctrl_c_costs_no_step_that_was_finished(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def stop(record: dict[str, float]) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    first = make_trainer(checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-00000003", "losses.jsonl"}
    done = without_seconds(first.history)
    first.close()
    second = make_trainer(checkpoint_every=100)
    second.run(until=4)
    assert [r["step"] for r in second.history] == [1, 2, 3, 4]
    assert without_seconds(second.history[:3]) == done


def test_a_checkpoint_of_other_settings_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.run(until=2)
    trainer.close()
    with pytest.raises(TrainingError, match="lr_router was 0.001, is 0.5"):
        make_trainer(lr_router=0.5).run()


def test_the_teacher_is_the_dense_model_while_deltas_live(pipe, cache: LatentCache, make_trainer: MakeTrainer) -> None:  # noqa: ANN001
    batch = cache.batch([0, 1], [False, False])
    sigmas = torch.tensor([0.5, 0.5])
    same = Batch(batch.latents, batch.latents, sigmas, batch.conditions)  # half of each is the latents again
    with torch.no_grad():
        wanted = pipe.transformer(
            batch.latents, **batch.conditions, timestep=1000 * sigmas, return_dict=False
        )[0]  # fmt: skip
        trainer = make_trainer()
        for layer in trainer.deltas.layers.values():
            torch.nn.init.normal_(layer.lora_B["shivelight"].weight)
        with trainer.routed.switched(False), trainer.deltas.disabled():
            assert torch.equal(trainer.passes.predict(same), wanted)
        with trainer.routed.switched(False):
            assert not torch.equal(trainer.passes.predict(same), wanted)


def test_the_teacher_of_a_step_sees_no_deltas(make_trainer: MakeTrainer) -> None:
    trainer, losses = make_trainer(), []
    for _ in range(2):
        draw = trainer.draws.at(trainer.step)[0]
        draw.keep = 1.0  # every token runs, so that deltas are all that student and teacher can differ in
        losses.append(trainer.lessons.micro_batch("router", draw, 0)["output"].item())
        for layer in trainer.deltas.layers.values():
            torch.nn.init.normal_(layer.lora_B["shivelight"].weight)
    assert losses[0] < 1e-9 and losses[1] > 1e-4


def test_training_keeps_counts_that_inference_keeps(make_trainer: MakeTrainer) -> None:
    """In units of the adapter's granularity, within a unit of the ratio that was asked for."""
    trainer = make_trainer(groups=6, group_size=1, estimator="residual")  # its second order runs more passes
    unit = count_unit(64, trainer.routed.config.tokens.granularity)
    assert unit > 1
    seen: list[int] = []
    trainer.backbone.transformer_blocks[2].norm1.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].shape[1])
    )
    wanted = [64 * draw.keep for draw in trainer.draws.at(trainer.step)]
    trainer.train_step()
    assert seen[::2] == [64] * 6, "the teacher runs everything"
    kept = seen[1::2]
    assert all(k % unit == 0 and k <= asked < k + unit for k, asked in zip(kept, wanted, strict=True))
    assert len(set(kept)) == 6


def test_a_bf16_backbone_trains_fp32_routers_and_deltas(pipe, make_trainer: MakeTrainer) -> None:  # noqa: ANN001
    pipe.transformer.to(torch.bfloat16)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    trainer = make_trainer(accelerator=accelerator, router_steps=0, policy_steps=0)
    before = parameters(trainer)
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train_step()
    assert changed(before, parameters(trainer)) == {"router", "policy", "deltas"}


def test_the_saved_adapter_gives_what_training_saw(pipe, make_trainer: MakeTrainer, sample) -> None:  # noqa: ANN001
    folder = make_trainer().run()
    sl.set_budget(pipe, keep=0.5)
    before = sample(pipe, ["a b"])
    sl.detach(pipe)
    sl.load_adapter(pipe, folder)
    sl.set_budget(pipe, keep=0.5)
    assert torch.equal(sample(pipe, ["a b"]), before)


def test_selection_in_training_without_noise_is_that_of_inference(pipe, sample) -> None:  # noqa: ANN001
    """DESIGN.md, invariant 2, with the trainer's own session."""
    sl.attach(pipe)
    sl.set_budget(pipe, keep=0.5)
    routed: Routed = routed_of(pipe)
    arguments = {}
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: arguments.update(kwargs), with_kwargs=True, prepend=True
    )
    sample(pipe, ["a b", "c d"], steps=1)
    with torch.no_grad():
        sl.attach(pipe)
        routed = routed_of(pipe.transformer)
        sl.set_budget(pipe.transformer, keep=0.5)
        seen: dict[int, torch.Tensor] = {}
        routed.observer = lambda block, x, out, kept, text: seen.update({block: kept})
        half = {k: v for k, v in arguments.items() if k != "return_dict"}
        routed.clock._pipeline = None
        dense = TeacherRecord(())
        inference = pipe.transformer(**half, return_dict=False)[0]
        routed.observer = dense
        with routed.switched(False):
            pipe.transformer(**half, return_dict=False)
        routed.observer = None
        counts = {block: kept.shape[1] for block, kept in seen.items()}
        ratios = torch.tensor([[counts[block] / 64 for block in routed.routed]])
        routed.session = TokenSession(routed.routed, ratios, dense)
        training = pipe.transformer(**half, return_dict=False)[0]
        routed.session = None
    assert torch.equal(training, inference)


def test_the_anchor_meets_every_target_on_average_over_timesteps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.routed.policy.time_out.normal_()
        trainer.routed.policy.layer_out.normal_()
    for keep in (0.4, 0.8):
        rows = []
        for _ in range(40):
            for draw in trainer.draws.at(trainer.step):
                draw.keep = keep
                rows.append(trainer.lessons.ratios("joint", draw))
            trainer.step += 1
        ratios = torch.cat(rows)
        assert ratios.mean().item() == pytest.approx(keep, abs=0.05)
        assert ratios.std() > 0.05


class SpikyPolicy(torch.nn.Module):
    """Keeps next to nothing at the timesteps of one grid, and the same at all others."""

    def __init__(self, grid: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("grid", grid)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        on_grid = (timesteps[:, None] - self.grid).abs().min(1).values < 1.0
        return torch.where(on_grid, -6.0, 0.0)[:, None].expand(-1, 3)


def test_no_policy_can_hide_its_tokens_between_the_points_of_a_grid(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(schedule_points=5)
    trainer.routed.policy = SpikyPolicy(1000 * (1 - torch.arange(5) / 5))
    draws = [draw for step in range(20) for draw in trainer.draws.at(step)]
    for draw in draws:
        draw.keep = 0.5
    assert torch.cat([trainer.lessons.ratios("joint", draw) for draw in draws]).mean() < 0.6


def test_timesteps_and_ratios_are_stratified_over_the_groups(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(groups=8)
    draws, low = trainer.draws.at(trainer.step), trainer.config.keep_low
    assert sorted(int(d.sigma * 8) for d in draws) == list(range(8))
    width = (trainer.config.keep_high - low) / 8
    assert sorted(int((d.keep - low) / width) for d in draws) == list(range(8))


def test_the_baseline_without_routing_trains_its_deltas_only(make_trainer: MakeTrainer) -> None:
    routing = RoutingConfig(tokens=None, deltas=sl.DeltaConfig(rank=2, alpha=2.0))
    trainer = make_trainer(routing=routing, router_steps=0, policy_steps=0, joint_steps=2)
    before = parameters(trainer)
    assert {name.split(".")[0] for name in before} == {"deltas"}
    trainer.train_step()
    assert changed(before, parameters(trainer)) == {"deltas"}
    folder = trainer.run()
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["routing"]["tokens"] is None and stored["routed_blocks"] == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("budget", ["anchor", "loss"])
def test_every_estimator_and_budget_reaches_router_and_policy(
    make_trainer: MakeTrainer, estimator: str, budget: str
) -> None:
    routing = RoutingConfig(TokenRouting())
    trainer = make_trainer(routing=routing, router_steps=0, estimator=estimator, budget=budget, logit_noise=0.0)
    before = parameters(trainer)
    trainer.train_step()
    assert changed(before, parameters(trainer)) == {"router", "policy"}


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(caption_drop=0.99)
    trainer.cache.empty["pooled_projections"].fill_(float("nan"))
    with pytest.raises(TrainingError, match="became nan at step 0.*lower learning rates"):
        trainer.run()
    assert not (tmp_path / "run/adapter").exists()


def test_an_estimate_changes_nothing(make_trainer: MakeTrainer) -> None:
    plain = make_trainer("plain")
    first = plain.train_step()
    plain.close()
    trainer = make_trainer()
    figures = estimate(trainer)
    assert figures["hours"] > 0 and figures["steps"] == 6
    assert figures["adapter_mb"] == pytest.approx(sum(p.numel() for p in parameters(trainer).values()) * 4 / 2**20)
    again = trainer.train_step()
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_two_processes_agree_on_budget_average_and_weights(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """Two real gloo processes on the CPU: the same EMA, the same parameters, other samples."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, json, torch
            from pathlib import Path
            from accelerate import Accelerator
            from diffusers import StableDiffusion3Pipeline
            from shivelight.config import DeltaConfig, RoutingConfig
            from shivelight.training.data import build_cache, read_folder
            from shivelight.training.stages import TrainingConfig
            from shivelight.training.trainer import Trainer

            torch.set_num_threads(1)
            folder, images, out = map(Path, sys.argv[1:])
            accelerator = Accelerator(cpu=True)
            assert accelerator.num_processes == 2
            pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
            with accelerator.main_process_first():
                cache = build_cache(pipe, read_folder(images), out / "cache", 32, 16)
            config = TrainingConfig(router_steps=1, policy_steps=2, joint_steps=1, groups=1, group_size=2, budget="loss")
            trainer = Trainer(pipe, RoutingConfig(deltas=DeltaConfig(rank=2, alpha=2.0)), config, cache, out, accelerator)
            draws = trainer.draws.at(trainer.step)
            drawn = [(d.sigma, d.keep) for d in draws], [torch.rand((), generator=d.generator).item() for d in draws]
            trainer.run()
            digest = float(sum(p.double().abs().sum() for p in trainer.routed.parameters()))
            record = {"average": float(trainer.lessons.averages['budget_loss'].deviation), "digest": digest, "drawn": drawn}
            record["history"] = [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history]
            (out / f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
            """
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(tiny_folder), str(images), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "run" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["average"] == second["average"] != 0.0
    assert first["digest"] == second["digest"]
    assert first["history"] == second["history"] and len(first["history"]) == 4, "what is logged is the mean"
    for mine, other in zip(first["drawn"], second["drawn"], strict=True):
        assert mine[0] != other[0], "timesteps, ratios and noise are each process's own"


def test_deltas_run_only_where_they_train(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    layer = next(iter(trainer.deltas.layers.values()))
    seen: list[bool] = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.disable_adapters))
    expected = {"router": {True}, "policy": {True}, "joint": {True, False}}  # the teacher's passes are without
    for stage, values in expected.items():
        for _ in range(2):
            assert trainer.config.stage(trainer.step)[0] == stage
            seen.clear()
            trainer.train_step()
            assert set(seen) == values
    with trainer.deltas.disabled():
        with trainer.deltas.disabled():
            assert layer.disable_adapters
        assert layer.disable_adapters
    assert not layer.disable_adapters
