"""Denoisers say of each family what its own pipeline does: the reference is the call that a pipeline makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captioned import CAPTIONED, SIDES, captioned
from diffusers import FlowMatchEulerDiscreteScheduler

import shivelight as sl
from shivelight.backbones import find_spec
from shivelight.errors import DataError, TrainingError
from shivelight.pipelines import draw
from shivelight.training.denoisers import Denoiser, denoiser_for
from shivelight.training.denoisers.flow import PackedDenoiser, pack, unpack
from shivelight.training.losses import shift_sigmas

TEXT = 16


def captions_of(name: str) -> list[str]:
    return ["3", "500"] if name == "dit" else ["a b", "c d e f"]


def last_call(pipe: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents, timestep, output) of the backbone's last call, without guidance by a second pass."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def note(module: Any, args: tuple, call: dict, output: Any) -> None:
        latents = args[0] if args else call["hidden_states"]
        seen.append((latents, call["timestep"], output[0] if isinstance(output, tuple) else output.sample))

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    side = SIDES[name]
    scale = 3.0 if name == "flux" else 1.0  # a distilled model is told its scale
    draw(pipe, captions_of(name), (0, 1), 3, scale, height=side, width=side, max_sequence_length=TEXT)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("name", CAPTIONED)
def test_a_prediction_is_what_the_pipeline_computes(name: str) -> None:
    pipe = captioned(name)
    if name in ("pixart", "dit"):  # DDPM's own whole timesteps
        assert int(pipe.scheduler.config.num_train_timesteps) == 1000
    latents, timestep, output = last_call(pipe, name)
    denoiser = denoiser_for(pipe, 3.0)
    with torch.no_grad():
        conditions = denoiser.collate(denoiser.encode_captions(captions_of(name), TEXT))
        clean = denoiser.encode_images(torch.zeros(2, 3, SIDES[name], SIDES[name]))
        # Half a timestep later is the same one of whole timesteps.
        later = 0.5 if denoiser.loss == "noise" else 0.0
        sigmas = (timestep.float() * denoiser.spec.timestep_scale + later).expand(2) / 1000
        noisy = denoiser.unpack(latents, clean.shape) if isinstance(denoiser, PackedDenoiser) else latents
        found = denoiser.predict(pipe.transformer, noisy, sigmas, conditions)
    assert found.shape == clean.shape
    wanted = (
        denoiser.unpack(output, clean.shape) if isinstance(denoiser, PackedDenoiser) else output[:, : clean.shape[1]]
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # and it depends on all that it is told
        assert not torch.allclose(found, denoiser.predict(pipe.transformer, noisy, (sigmas + 0.5) % 1, conditions))
        other = denoiser.collate(denoiser.encode_captions(captions_of(name)[::-1], TEXT))
        assert not torch.allclose(found, denoiser.predict(pipe.transformer, noisy, sigmas, other))


@pytest.mark.parametrize("name", CAPTIONED)
def test_latents_are_what_the_pipeline_decodes(name: str) -> None:
    """The pipeline's own last lines get back what the encoder said."""
    pipe = captioned(name)
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        channels = pipe.vae.config.z_dim
        mean, deviation = [0.1 * i for i in range(channels)], [1.0 + i for i in range(channels)]
        pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    if "shift_factor" in pipe.vae.config:
        pipe.vae.register_to_config(shift_factor=0.2, scaling_factor=0.7)
    if name in ("pixart", "dit", "sana"):  # whose pipelines know no shift
        pipe.vae.register_to_config(**({"shift_factor": None} if name != "sana" else {}))
    decoded: list[torch.Tensor] = []
    original = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: decoded.append(latents) or original(latents, **options)
    side, denoiser = SIDES[name], denoiser_for(pipe)
    # Nearly no steps from nothing: what the pipeline decodes is then the noise that it started from.
    with torch.no_grad():
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        encoded = denoiser.encode_images(images)
    pipe.scheduler.step = lambda output, time, latents, **_: _Stepped(
        denoiser.pack(encoded) if isinstance(denoiser, PackedDenoiser) else encoded
    )
    draw(pipe, captions_of(name), (0, 1), 1, 1.0, height=side, width=side, max_sequence_length=TEXT)
    video = images[:, :, None] if decoded[0].dim() == 5 else images
    with torch.no_grad():
        raw = pipe.vae.encode(video)
    plain = getattr(raw, "latents", getattr(raw, "latent", None))
    torch.testing.assert_close(decoded[0], raw.latent_dist.mode() if plain is None else plain, atol=1e-5, rtol=1e-5)


class _Stepped(tuple):
    """What a scheduler's step returns, as a tuple and with `prev_sample`."""

    def __new__(cls, latents: torch.Tensor) -> _Stepped:
        return super().__new__(cls, (latents,))

    @property
    def prev_sample(self) -> torch.Tensor:
        return self[0]


def test_packing_is_that_of_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    pipe = captioned("flux")
    assert torch.equal(pack(latents), pipe._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(latents), latents.shape), latents)


def test_a_dynamic_schedule_goes_by_the_tokens() -> None:
    pipe = captioned("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    denoiser = denoiser_for(pipe)
    assert denoiser.tokens(torch.Size((1, 16, 32))) == 128
    assert denoiser.shift(torch.Size((1, 16, 16))) < denoiser.shift(torch.Size((1, 32, 32)))
    assert denoiser_for(captioned("wan")).tokens(torch.Size((16, 2, 4, 4))) == 8


def test_flux2_shifts_as_its_pipeline_does_by_default() -> None:
    pipe = captioned("flux2")
    pipe(prompt=["a"], height=16, width=16, max_sequence_length=TEXT, guidance_scale=1.0, output_type="latent")
    denoiser = denoiser_for(pipe)
    plain = torch.linspace(1, 1 / 50, 50)
    torch.testing.assert_close(shift_sigmas(plain, denoiser.shift(torch.Size((8, 4, 4)))), pipe.scheduler.sigmas[:50])


def test_the_largest_pixart_is_told_the_size() -> None:
    pipe = captioned("pixart")
    wider = {"num_attention_heads": 3, "cross_attention_dim": 24, "use_additional_conditions": True}
    settings = dict(pipe.transformer.config) | wider
    pipe.transformer = type(pipe.transformer).from_config(settings)
    seen: dict[str, Any] = {}
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, call: seen.update(call["added_cond_kwargs"]), with_kwargs=True
    )
    denoiser = denoiser_for(pipe)
    conditions = denoiser.encode_captions(["a", "b"], TEXT)
    with torch.no_grad():
        denoiser.predict(pipe.transformer, torch.zeros(2, 4, 8, 4), torch.tensor([0.5, 0.5]), conditions)
    assert seen["resolution"].tolist() == [[16, 8]] * 2 and seen["aspect_ratio"].tolist() == [[2.0]] * 2


def test_classes_are_numbers_or_names() -> None:
    pipe = captioned("dit")
    pipe.labels = {"white shark": 2}
    denoiser = denoiser_for(pipe)
    assert denoiser.encode_captions(["7", "white shark"], None)["class_labels"].tolist() == [7, 2]
    assert denoiser.encode_empty(None)["class_labels"].tolist() == [1000]
    for caption in ("a shark", "1000", "-1"):
        with pytest.raises(DataError, match=f"{caption}.*0 to 999.*white shark"):
            denoiser.encode_captions([caption], None)


def test_a_size_that_does_not_fit_is_named() -> None:
    denoiser = denoiser_for(captioned("flux"))
    denoiser.check_side(32)
    with pytest.raises(DataError, match="30 pixels.*multiple of 4, such as 32"):
        denoiser.check_side(30)


def test_a_family_without_a_denoiser_is_named() -> None:
    pipe = captioned("sd3")
    spec = find_spec(pipe.transformer)
    try:
        sl.register_backbone(type(spec)(**(vars(spec) | {"name": "of-my-own"})))
        with pytest.raises(TrainingError, match="'of-my-own'.*register_denoiser"):
            denoiser_for(pipe)
        with pytest.raises(TrainingError, match="encode_captions.*write_cache"):
            Denoiser(pipe).encode_captions(["a"], None)
    finally:
        sl.register_backbone(spec)


@pytest.mark.parametrize("name", CAPTIONED)
def test_levels_of_a_few_steps_are_those_that_the_backbone_is_asked_at(name: str) -> None:
    pipe, asked = captioned(name), []
    side = {"height": SIDES[name], "width": SIDES[name]}
    denoiser = denoiser_for(pipe)

    def note(module: Any, args: tuple, call: dict) -> None:
        asked.append(float(call["timestep"].reshape(-1)[0]))

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    levels = denoiser.levels(3, side | {"max_sequence_length": TEXT})
    handle.remove()
    assert len(levels) == 3 and list(levels) == sorted(levels, reverse=True)
    found = denoiser.timesteps(torch.tensor(levels)).float()
    torch.testing.assert_close(found, torch.tensor(asked), rtol=1e-3, atol=1e-3)
