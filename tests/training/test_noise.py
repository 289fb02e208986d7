"""Noise as the pipelines' schedulers add it: diffusers' own schedulers are the reference."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from shivelight.errors import TrainingError
from shivelight.training.losses import shift_sigmas
from shivelight.training.noise import Diffusion, FlowMatching, noise_process, schedule_shift


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_the_scheduler(predicts: str) -> None:
    scheduler = DDIMScheduler(prediction_type=predicts, beta_schedule="scaled_linear", clip_sample=False)
    process, (clean, noise) = noise_process(scheduler), _pair()
    assert isinstance(process, Diffusion)
    sigmas = torch.tensor([0.0005, 0.5008, 1.0])
    steps = process.timesteps(sigmas)
    assert steps.tolist() == [0, 500, 999]
    noisy = process.noisy(clean, noise, sigmas)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, steps))
    # A sampler that is told the target finds the data.
    scheduler.set_timesteps(1000)
    for i, step in enumerate(steps):
        target = process.target(clean, noise, sigmas)[i]
        found = scheduler.step(target, step, noisy[i]).pred_original_sample
        torch.testing.assert_close(found, clean[i], atol=2e-4, rtol=1e-4)


def test_what_a_scheduler_walks_is_read_from_it() -> None:
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for scheduler, shift in ((FlowMatchEulerDiscreteScheduler(shift=2.0), 2.0), (flow, 3.0)):
        assert isinstance(noise_process(scheduler), FlowMatching)
        assert schedule_shift(scheduler, 64) == shift
    for scheduler in (EulerDiscreteScheduler(), UniPCMultistepScheduler(flow_shift=3.0)):
        assert isinstance(noise_process(scheduler), Diffusion)
        assert schedule_shift(scheduler, 64) == 1.0
    with pytest.raises(TrainingError, match="'rectified'.*Denoiser of your own"):
        unknown = EulerDiscreteScheduler()
        unknown.register_to_config(prediction_type="rectified")
        noise_process(unknown)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_that_of_the_pipelines(kind: str) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    )
    for tokens in (64, 256, 4096):
        plain = [1.0, 0.7, 0.3]
        scheduler.set_timesteps(sigmas=plain, mu=calculate_shift(tokens, 256, 8192, 0.5, 0.9))
        shifted = shift_sigmas(torch.tensor(plain), schedule_shift(scheduler, tokens))
        torch.testing.assert_close(shifted, scheduler.sigmas[:3])
