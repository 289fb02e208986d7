"""Nothing of ours waits for the device inside the sampling loop, where the decisions are known before it."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import shivelight as sl
from shivelight.adapter import routed_of

ROUTINGS = {
    "tokens": sl.RoutingConfig(sl.TokenRouting()),
    "tokens with reuse": sl.RoutingConfig.training_free(),
    "static blocks": sl.RoutingConfig(None, sl.BlockRouting(decide="static")),
    "static tokens and blocks": sl.RoutingConfig(sl.TokenRouting(), sl.BlockRouting(decide="static"), reuse=sl.Reuse()),
}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUTINGS)
def test_static_decisions_never_wait_for_the_device(pipe: StableDiffusion3Pipeline, name: str) -> None:
    pipe.to("cuda")
    pipe._guidance_scale = 0.0
    sl.attach(pipe, ROUTINGS[name])
    routed = routed_of(pipe)
    if routed.gates is not None:
        routed.gates.records.add(torch.rand(64) * 1000, torch.randn(64, 3), torch.randn(64, 3, 4))
        routed.gates.set_orders(pipe.transformer, {block: torch.randperm(128) for block in routed.routed})
    sl.set_budget(pipe, compute=0.7)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 16, 16, device="cuda"),
        "encoder_hidden_states": torch.randn(2, 7, 32, device="cuda"),
        "pooled_projections": torch.randn(2, 32, device="cuda"),
    }
    pipe.scheduler.set_timesteps(6, device="cuda")
    try:
        with torch.no_grad():
            for step, time in enumerate(pipe.scheduler.timesteps):
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                velocity = pipe.transformer(**call, timestep=time.expand(2), return_dict=False)[0]
                torch.cuda.set_sync_debug_mode("default")
                pipe.scheduler.step(velocity, time, call["hidden_states"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert routed.spending.ratio is not None and routed.spending.ratio < 0.8
