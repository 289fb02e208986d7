"""Deltas tuned along the generation: the loss in closed form, what is learned, exact resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.config import RoutingConfig
from shivelight.errors import TrainingError
from shivelight.evaluation.standard import method_name
from shivelight.execution.reuse import BlockResiduals
from shivelight.training.tuner import TuneConfig, Tuner

PROMPTS = ["a red apple", "blue bird", "c d"]


def tuner(pipe: StableDiffusion3Pipeline, out: Path, fit: bool = True, **settings: Any) -> Tuner:
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    if fit:
        sl.fit_stand_ins(pipe, PROMPTS, steps=4, computes=(0.5,), rank=3, guidance=1.0, max_sequence_length=16)
    config = {
        "steps": 4, "computes": (0.6,), "guidance": 1.0, "iterations": 3, "batch": 2, "trajectories": 4, "rank": 2, "warmup": 1,
        "mixed_precision": "no",
    } | settings  # fmt: skip
    return Tuner(pipe, PROMPTS, TuneConfig(**config), out, max_sequence_length=16)


def drawn(pipe: StableDiffusion3Pipeline, seeds: range, guidance: float = 1.0) -> torch.Tensor:
    prompts = [PROMPTS[place % 3] for place in range(len(seeds))]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompts,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=noise,
        output_type="latent",
        max_sequence_length=16,
    ).images


def test_the_first_loss_is_what_the_rests_miss(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """Fresh deltas change nothing: the loss is the mean square difference of both generations where runs begin, and at the end."""
    own = tuner(pipe, tmp_path, iterations=1, trajectories=2, warmup=0)
    own.run()
    first = json.loads((tmp_path / "losses.jsonl").read_text())
    chosen = torch.randint(2, (2,), generator=torch.Generator().manual_seed(6_000_000)).tolist()
    sl.detach(pipe)
    tuner(pipe, tmp_path / "other")
    latents: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    sl.set_budget(pipe, compute=0.6)
    for routes, seen in latents.items():
        with routed_of(pipe).switched(routes):
            noise = [torch.Generator().manual_seed(6_000_000 + place) for place in chosen]
            pipe(
                [PROMPTS[place] for place in chosen], num_inference_steps=4, guidance_scale=1.0, generator=noise,
                output_type="latent", max_sequence_length=16,
                callback_on_step_end=lambda pipe, step, time, given, seen=seen: seen.append(given["latents"]) or {},
            )  # fmt: skip
    assert routed_of(pipe).config.stand_ins.plans[0].runs == (0, 2)
    missed = [float((latents[True][step] - latents[False][step]).square().mean()) for step in (1, 3)]
    assert missed[0] > 0 and missed[1] > 0
    assert first["loss"] == pytest.approx(sum(missed), rel=1e-3) and first["last"] == pytest.approx(missed[1], rel=1e-3)
    for place in range(2):  # what is kept are the dense ones' latents after each step
        stored = load_file(tmp_path / "trajectories" / f"{place:06d}.safetensors")["latents"]
        if place in chosen:
            row = chosen.index(place)
            torch.testing.assert_close(
                stored, torch.stack([seen[row] for seen in latents[False]]), atol=1e-5, rtol=1e-4
            )


def drawn_at(pipe: StableDiffusion3Pipeline, seeds: range) -> dict[float, torch.Tensor]:
    """By budgets under which two of four steps run, three, all, and two again."""
    made = {}
    for compute in (0.6, 0.8, 1.0, 0.6):
        sl.set_budget(pipe, compute=compute)
        one = drawn(pipe, seeds)
        assert torch.equal(made.setdefault(compute, one), one)
    return made


@pytest.mark.parametrize("fit", [True, False])
def test_what_is_tuned_is_nearer_and_dense_is_as_it_was(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, fit: bool
) -> None:
    seeds = range(100, 104)
    dense = drawn(pipe, seeds)
    own = tuner(pipe, tmp_path, fit, iterations=40, batch=4, trajectories=16, lr=3e-3)
    before = drawn_at(pipe, seeds)
    made = own.run()
    assert routed_of(pipe).config.deltas.plans == (sl.RestPlan(4, (0, 2)),)
    assert "linears with DoRA deltas, in force where so many steps run: 2 of 4" in sl.summary(pipe)
    sl.set_budget(pipe, compute=0.6)
    assert method_name(routed_of(pipe).config) == ("blocks-tuned" if fit else "blocks")
    after = drawn(pipe, seeds)
    assert float((after - dense).square().mean()) < 0.9 * float((before[0.6] - dense).square().mean())
    now = drawn_at(pipe, seeds)  # in force under the budget that they were tuned for, and no other
    assert torch.equal(now[0.6], after) and not torch.equal(after, before[0.6])
    assert torch.equal(now[0.8], before[0.8]) and torch.equal(now[1.0], dense)
    assert own.history[-1]["loss"] < own.history[0]["loss"]
    assert sl.planned_ratio(pipe, 4) == pytest.approx(routed_of(pipe).spending.ratio)  # folded: deltas cost nothing
    with sl.dense(pipe):
        assert torch.equal(drawn(pipe, seeds), dense)
    sl.detach(pipe)
    assert torch.equal(drawn(pipe, seeds), dense)
    sl.load_adapter(pipe, made)
    assert all(torch.equal(one, now[compute]) for compute, one in drawn_at(pipe, seeds).items())
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_run_goes_on_exactly(pipe: StableDiffusion3Pipeline, tmp_path: Path, guidance: float) -> None:
    whole = tuner(pipe, tmp_path / "whole", iterations=4, guidance=guidance)
    whole.run()
    sl.detach(pipe)
    part = tuner(pipe, tmp_path / "part", iterations=4, guidance=guidance)
    assert part.run(until=2) == tmp_path / "part" and part.done == 2
    (tmp_path / "part" / "trajectories" / "000001.safetensors").unlink()  # as if it had not been made yet
    sl.detach(pipe)
    tuner(pipe, tmp_path / "part", iterations=4, guidance=guidance).run()
    names = "adapter/adapter_model.safetensors"
    first, second = load_file(tmp_path / "whole" / names), load_file(tmp_path / "part" / names)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.startswith("deltas.") and bool(first[name].any()) for name in first if "lora_B" in name)
    steps = [json.loads(line)["step"] for line in (tmp_path / "part" / "losses.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_checkpointing_changes_nothing_but_memory(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        own = tuner(pipe, tmp_path / str(checkpointing), checkpointing=checkpointing, lr=1e-2)
        own.run()
        losses.append([record["loss"] for record in own.history])
        sl.detach(pipe)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][1] != losses[0][0]


def test_gradients_end_where_a_run_begins(pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: Any) -> None:
    """What went in and came out at earlier runs is among the known values, and has no way back by then."""
    own = tuner(pipe, tmp_path, iterations=1)
    seen = []
    known = BlockResiduals.history

    def history(entry: BlockResiduals) -> Any:
        found = known(entry)
        seen.append([value.requires_grad for pair in found for value in pair])
        return found

    own.record_dense()
    monkeypatch.setattr(BlockResiduals, "history", history)
    own.run()
    # Of what was learned from: at rest after the first run; after the second, whose values alone still record.
    assert seen[-2:] == [[False, True], [False, True, False, False]] and len(seen) == 4


def test_deltas_that_are_there_are_tuned_on(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    made = tuner(pipe, tmp_path / "first", lr=1e-2).run()
    before = load_file(made / "adapter_model.safetensors")
    own = Tuner(
        pipe, PROMPTS, TuneConfig(4, (0.6,), 1.0, iterations=1, batch=2, trajectories=2, rank=7, lr=1e-9), tmp_path / "next",
        max_sequence_length=16,
    )  # fmt: skip
    after = load_file(own.run() / "adapter_model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-4)


def test_an_interruption_leaves_the_model_as_it_was(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    dense = drawn(pipe, range(2))
    own = tuner(pipe, tmp_path, iterations=5)

    def stop(record: dict[str, float]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.run(stop)
    assert own.done == 2 and not routed_of(pipe).deltas
    assert "step" not in vars(pipe.scheduler)
    sl.detach(pipe)
    assert torch.equal(drawn(pipe, range(2)), dense)


def test_refusals(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="shares of the dense"):
        TuneConfig(4, (1.5,))
    with pytest.raises(TrainingError, match="steps is 1"):
        TuneConfig(1, (0.5,))
    with pytest.raises(TrainingError, match="lr"):
        TuneConfig(4, (0.5,), lr=0.0)
    sl.attach(pipe)
    with pytest.raises(TrainingError, match="run or rest together"):
        Tuner(pipe, PROMPTS, TuneConfig(4, (0.5,)), tmp_path)
    sl.attach(pipe.transformer, RoutingConfig(deltas=sl.DeltaConfig(), tokens=None))
    with pytest.raises(TrainingError, match="run or rest together"):
        Tuner(pipe.transformer, PROMPTS, TuneConfig(4, (0.5,)), tmp_path)
    own = tuner(pipe, tmp_path)
    with pytest.raises(TrainingError, match="no prompts"):
        Tuner(pipe, [], own.config, tmp_path)
    own.run(until=1)
    sl.detach(pipe)
    with pytest.raises(TrainingError, match="trajectories.*other settings .dense.guidance was 1.0, is 2.0"):
        tuner(pipe, tmp_path, guidance=2.0)
    sl.detach(pipe)
    with pytest.raises(TrainingError, match="lr was 0.0005, is 0.001"):  # the dense generations would serve
        tuner(pipe, tmp_path, lr=1e-3).run()
    for place in range(4):
        (tmp_path / "trajectories" / f"{place:06d}.safetensors").write_bytes(b"half")
    sl.detach(pipe)
    with pytest.raises(TrainingError, match="cannot be read.*made anew"):
        tuner(pipe, tmp_path, iterations=3).run()


def test_dense_generations_are_of_one_model(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    made = tuner(pipe, tmp_path, iterations=1, lr=1e-2, warmup=0).run()
    sl.detach(pipe)
    sl.load_adapter(pipe, made)  # deltas on top are no other model
    config = TuneConfig(4, (0.6,), 1.0, iterations=1, batch=2, trajectories=4)
    Tuner(pipe, PROMPTS, config, tmp_path, max_sequence_length=16)
    sl.detach(pipe)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[3] += 1e-3
    with pytest.raises(TrainingError, match="trajectories.*other settings"):
        tuner(pipe, tmp_path)


def test_a_rest_that_is_none_is_refused(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    own = tuner(pipe, tmp_path, fit=False)
    routed_of(pipe).residuals.max_mb = 1e-3
    with pytest.raises(TrainingError, match="All blocks ran at step 1.*max_cache_mb=0.001.*2 samples"):
        own.run()


def test_a_backbone_in_float16_is_refused(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    pipe.transformer.half()
    try:
        with pytest.raises(TrainingError, match="float16"):
            tuner(pipe, tmp_path, fit=False)
    finally:
        pipe.transformer.float()


def test_another_batch_shares_dense_generations(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    tuner(pipe, tmp_path / "first", iterations=1).run()
    sl.detach(pipe)
    config = TuneConfig(4, (0.6,), 1.0, iterations=1, batch=1, trajectories=4, mixed_precision="no")
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    Tuner(
        pipe, PROMPTS, config, tmp_path / "second", dense=tmp_path / "first/trajectories", max_sequence_length=16
    ).run()
    assert not (tmp_path / "second" / "trajectories").exists()


def test_a_call_that_records_nothing_is_refused(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    own = tuner(pipe, tmp_path)

    def silent(call: Any, chosen: Any) -> None:
        with torch.no_grad():
            own._draw(call, chosen)

    own._generate = silent
    with pytest.raises(TrainingError, match="records no gradients"):
        own.run()
    assert not routed_of(pipe).deltas and "peft_config" not in vars(pipe.transformer)
