"""What tells routed generations from dense ones: worked out by hand, what it learns, and what it makes of a tuner's gradients."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import CAPTIONED, SIDES, captioned
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.nn.functional import softplus

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.config import DeltaConfig, RoutingConfig
from shivelight.errors import TrainingError
from shivelight.execution.compiled import Regions
from shivelight.pipelines import draw
from shivelight.training.deltas import LiveDeltas
from shivelight.training.denoisers import denoiser_for
from shivelight.training.discriminator import Discriminator, Verdict
from shivelight.training.tuner import TuneConfig, Tuner
from shivelight.training.walk import CheckpointedRegions

PROMPTS = ["a red apple", "blue bird"]


def drawn(pipe: StableDiffusion3Pipeline, guidance: float = 1.0) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"output_type": "latent", "max_sequence_length": 16}
    return pipe(PROMPTS, num_inference_steps=4, guidance_scale=guidance, generator=noise, **options).images


class Case:
    """A pipeline whose blocks rest, deltas that change it, and an untouched copy of its backbone."""

    def __init__(self, pipe: StableDiffusion3Pipeline, guidance: float) -> None:
        self.own = deepcopy(pipe.transformer)
        self.dense = drawn(pipe, guidance)
        sl.attach(pipe, RoutingConfig.training_free(compute=0.6, axis="blocks"))
        self.routed = routed_of(pipe)
        self.live = LiveDeltas(pipe.transformer, self.routed.spec, DeltaConfig(2, 2.0), {})
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.live.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(0)
        self.discriminator = Discriminator(pipe.transformer, self.routed, self.live, pipe.scheduler, blocks=2)
        with self.discriminator.listening():
            self.made = drawn(pipe, guidance)


@pytest.fixture(params=[1.0, 3.0])
def case(pipe: StableDiffusion3Pipeline, request: Any) -> Iterator[Case]:
    own = Case(pipe, request.param)
    yield own
    own.live.remove()


def test_it_is_what_the_equations_say(pipe: StableDiffusion3Pipeline, case: Case) -> None:
    discriminator, asked = case.discriminator, {}
    handle = case.own.register_forward_pre_hook(lambda module, args, given: asked.update(given), with_kwargs=True)
    features: dict[int, torch.Tensor] = {}
    for block in discriminator.blocks:
        case.own.transformer_blocks[block].register_forward_hook(
            lambda module, args, output, block=block: features.update({block: output[1]})
        )
    plain, pipe.transformer = pipe.transformer, case.own
    drawn(pipe, 3.0 if len(discriminator._asked["hidden_states"]) == 4 else 1.0)
    pipe.transformer = plain
    handle.remove()
    assert len(discriminator.blocks) == 2 and discriminator.blocks[-1] == len(case.own.transformer_blocks) - 1

    generator = torch.Generator().manual_seed(7)
    sigmas = 0.6 * torch.rand(2, generator=generator)
    noise = torch.randn(case.made.shape, generator=generator)

    def read(latents: torch.Tensor) -> list[torch.Tensor]:
        shares = sigmas.view(2, 1, 1, 1)
        twice = len(asked["hidden_states"]) // 2
        noisy = torch.cat([(1 - shares) * latents + shares * noise] * twice)
        case.own(**asked | {"hidden_states": noisy, "timestep": torch.cat([1000 * sigmas] * twice)})
        return [features[block] for block in discriminator.blocks]

    def told(real: list[torch.Tensor], made: list[torch.Tensor]) -> torch.Tensor:
        heads = zip(discriminator.heads, real, made, strict=True)
        return torch.stack([(head(one) - head(other)).squeeze(-1) for head, one, other in heads])

    made = case.made.clone().requires_grad_()
    real, false = read(case.dense), read(made)
    wanted = torch.autograd.grad(softplus(told(real, false)).mean(), made)[0]
    real, false = ([value.detach().requires_grad_() for value in side] for side in (real, false))
    margins = told(real, false)
    slopes = torch.autograd.grad(margins.sum(), (*real, *false), create_graph=True)
    steep = sum(slope.square().sum(-1).mean() for slope in slopes) / len(slopes)
    learned = torch.autograd.grad(softplus(-margins).mean() + 0.1 * steep, list(discriminator.parameters()))

    verdict = discriminator.judge(case.made, case.dense, torch.Generator().manual_seed(7))
    torch.testing.assert_close(verdict.gradient, wanted / wanted.norm(), atol=1e-5, rtol=1e-4)
    assert verdict.told_apart == pytest.approx(float((margins > 0).float().mean()), abs=0.01)
    for parameter, gradient in zip(discriminator.parameters(), learned, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)


def test_it_leaves_no_trace(pipe: StableDiffusion3Pipeline, case: Case) -> None:
    before = drawn(pipe)
    case.discriminator.judge(case.made, case.dense, torch.Generator())
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())
    assert all(parameter.requires_grad for _, parameter in case.live.named_parameters())
    assert case.routed.enabled and case.routed.observer is None
    assert torch.equal(drawn(pipe), before)


def test_gradient_checkpointing_asks_the_same_model(case: Case) -> None:
    """Blocks that run a second time in the backward pass are the dense ones too."""
    verdicts = []
    for regions in (Regions(), CheckpointedRegions()):
        case.routed.regions = regions
        verdicts.append(case.discriminator.judge(case.made, case.dense, torch.Generator().manual_seed(7)))
    torch.testing.assert_close(verdicts[0].gradient, verdicts[1].gradient)
    assert verdicts[0].told_apart == verdicts[1].told_apart


def test_who_watches_goes_on_watching(case: Case) -> None:
    seen: list[int] = []
    case.routed.observer = lambda block, *rest: seen.append(block)
    case.discriminator.judge(case.made, case.dense, torch.Generator())
    assert not seen and case.routed.observer is not None
    case.routed.observer = None


def test_what_goes_in_beside_the_latents_is_refused(case: Case) -> None:
    given = case.discriminator._asked["hidden_states"]
    case.discriminator._asked["hidden_states"] = torch.cat([given, given], dim=1)
    with pytest.raises(TrainingError, match="go in beside them"):
        case.discriminator.judge(case.made, case.dense, torch.Generator())


def test_what_differs_is_told_apart_and_what_does_not_is_not(case: Case) -> None:
    optimizer = torch.optim.Adam(case.discriminator.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    first = case.discriminator.judge(case.made, case.dense, generator).told_apart
    optimizer.zero_grad()
    for _ in range(40):
        verdict = case.discriminator.judge(case.made, case.dense, generator)
        optimizer.step()
        optimizer.zero_grad()
    assert verdict.told_apart > max(0.9, first)
    nearer = case.made - 0.5 * case.made.norm() * verdict.gradient
    after = case.discriminator.judge(nearer, case.dense, torch.Generator().manual_seed(3)).told_apart
    assert after < case.discriminator.judge(case.made, case.dense, torch.Generator().manual_seed(3)).told_apart


@pytest.mark.parametrize("name", CAPTIONED)
def test_every_family_is_asked_in_its_own_time(name: str) -> None:
    pipe = captioned(name)
    sl.attach(pipe, RoutingConfig.training_free(compute=0.6, axis="blocks"))
    backbone, routed = pipe.transformer, routed_of(pipe)
    live = LiveDeltas(backbone, routed.spec, DeltaConfig(2, 2.0), {})
    discriminator = Discriminator(backbone, routed, live, pipe.scheduler)
    captions = ["3", "500"] if name == "dit" else ["a b", "c d e f"]
    with discriminator.listening():
        draw(pipe, captions, (0, 1), 4, 1.0, height=SIDES[name], width=SIDES[name], output_type="latent")
    latents = discriminator._asked["hidden_states"]
    seen: list[torch.Tensor] = []
    backbone.register_forward_pre_hook(lambda module, args, given: seen.append(given["timestep"]), with_kwargs=True)
    discriminator.judge(latents, latents + 1, torch.Generator().manual_seed(7))
    sigmas = 0.6 * torch.rand(2, generator=torch.Generator().manual_seed(7))
    denoiser = denoiser_for(pipe)
    wanted = denoiser.timesteps(sigmas)
    assert len(seen) == 2
    for given in seen:
        rounded = 0.0 if given.is_floating_point() else 1.0  # as their schedulers do
        torch.testing.assert_close(given.double(), wanted.double(), rtol=1e-5, atol=1e-7 + rounded)


def tuner(pipe: StableDiffusion3Pipeline, out: Path, **settings: Any) -> Tuner:
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    config = {
        "steps": 4, "computes": (0.6,), "guidance": 1.0, "iterations": 4, "batch": 2, "trajectories": 4, "rank": 2, "warmup": 1,
        "mixed_precision": "no",
    } | settings  # fmt: skip
    return Tuner(pipe, PROMPTS, TuneConfig(**config), out, max_sequence_length=16)


def test_a_run_goes_on_exactly(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    whole = tuner(pipe, tmp_path / "whole", adversarial=0.5)
    whole.run()
    assert all(0 <= record["told_apart"] <= 1 for record in whole.history)
    for until in (2, None):
        sl.detach(pipe)
        tuner(pipe, tmp_path / "part", adversarial=0.5).run(until=until)
    first, second = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("whole", "part"))
    assert first.keys() == second.keys() and not any("discriminator" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(key.startswith("discriminator") for key in pipe.transformer.state_dict())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_at_the_end_has_both_parts(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Against a verdict that says nothing, a run is one without; against one that does, its share is in the gradient."""
    plain = tuner(pipe, tmp_path / "plain", checkpointing=checkpointing)
    plain.run()
    seen: list[tuple[torch.Tensor, ...]] = []
    says = torch.zeros(())

    def judge(own: Discriminator, routed: torch.Tensor, dense: torch.Tensor, generator: torch.Generator) -> Verdict:
        routed.register_hook(lambda slope: seen.append((slope, routed.detach() - dense)))
        return Verdict(says.expand_as(routed), 0.5)

    monkeypatch.setattr(Discriminator, "judge", judge)
    sl.detach(pipe)
    silent = tuner(pipe, tmp_path / "silent", adversarial=0.5, checkpointing=checkpointing)
    silent.run()
    assert [record["loss"] for record in silent.history] == [record["loss"] for record in plain.history]
    assert [record["grad_norm"] for record in silent.history] == pytest.approx(
        [record["grad_norm"] for record in plain.history], rel=1e-4
    )
    assert len(seen) == 4
    says = torch.tensor(0.25)
    sl.detach(pipe)
    tuner(pipe, tmp_path / "loud", adversarial=0.5, iterations=1, checkpointing=checkpointing).run()
    slope, missed = seen[-1]
    missed = 2 * missed / missed.numel()
    torch.testing.assert_close(slope, missed + 0.5 * missed.norm() * 0.25)


def test_an_unknown_kind_of_noise_is_refused_and_leaves_the_model_as_it_was(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = drawn(pipe), type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.register_to_config(prediction_type="other")
    monkeypatch.setattr(pipe, "scheduler", other)
    own = tuner(pipe, tmp_path, adversarial=0.5)
    with pytest.raises(TrainingError, match="prediction_type 'other'"):
        own.run()
    assert not routed_of(pipe).deltas and "peft_config" not in vars(pipe.transformer)
    sl.detach(pipe)
    assert torch.equal(drawn(pipe), before)


def test_gradients_that_are_no_numbers_reach_no_delta(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tuner(pipe, tmp_path, adversarial=0.5, checkpoint_every=1)
    own.run(until=1)
    monkeypatch.setattr(
        Discriminator, "judge", lambda own, routed, *_: Verdict(torch.full_like(routed, torch.nan), 0.5)
    )
    with pytest.raises(TrainingError, match="Gradients became.*dense generations in .*trajectories serve again"):
        own.run()
    assert own.done == 1


def test_a_backbone_that_lies_elsewhere_between_calls_is_refused(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion3Pipeline, "_execution_device", torch.device("meta"))
    with pytest.raises(TrainingError, match="instead of offloading"):
        tuner(pipe, tmp_path, adversarial=0.5)
    sl.detach(pipe)
    tuner(pipe, tmp_path)


def test_refusals() -> None:
    with pytest.raises(TrainingError, match="adversarial"):
        TuneConfig(4, (0.5,), adversarial=-1.0)
    with pytest.raises(TrainingError, match="discriminator_lr"):
        TuneConfig(4, (0.5,), discriminator_lr=0.0)
