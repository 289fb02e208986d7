"""What all blocks together add: segments against the sum over blocks, and one residual for any depth."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.span import Passage, Segments


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.lists(st.sampled_from(["straight", "added", "in place"]), min_size=1, max_size=6))
def test_segments_are_the_sum_over_blocks(seed: int, joins: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments, x, wanted = Segments(), torch.randn(1, 3, 2, generator=generator, dtype=torch.float64), 0
    for join in joins:
        out = x + torch.randn(x.shape, generator=generator, dtype=torch.float64)
        segments.follow(x, out)
        wanted = wanted + (out - x)
        extra = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = {"straight": lambda: out, "added": lambda: out + extra, "in place": lambda: out.add_(extra)}[join]()  # noqa: B023
        if join == "in place":  # what was the block's own is gone: the addition counts as its own
            wanted = wanted + extra
    torch.testing.assert_close(segments.finish(), wanted)
    assert Segments().finish() is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_a_passage_adds_up_both_streams_however_they_are_kept(seed: int, apart: int, joined: int, ends: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(tokens: int) -> Tensor:
        return torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)

    passage, image, text = Passage(), drawn(5), drawn(2)
    begun = image, text
    for block in range(apart):
        last = ends and not joined and block == apart - 1  # gives no text back
        out, text_out = image + drawn(5), None if last else text + drawn(2)
        passage.follow(image, out, text, text_out)
        image, text = out, text if last else text_out
    stream = torch.cat([text, image], dim=1)
    for _ in range(joined):
        out = stream + drawn(7)
        passage.follow_joined(stream, out, 2)
        stream = out
    images, texts = passage.finish()
    if apart or joined:
        torch.testing.assert_close(images, stream[:, 2:] - begun[0])
    if texts is not None:
        torch.testing.assert_close(texts, stream[:, :2] - begun[1])
    assert (texts is None) == (joined == 0 and apart - ends <= 0) and (images is None) == (apart + joined == 0)


def test_what_flows_straight_on_is_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    sub = Tensor.__sub__
    monkeypatch.setattr(Tensor, "__sub__", lambda a, b: made.append(1) or sub(a, b))
    with torch.inference_mode():  # where tensors count no changes
        segments, x = Segments(), torch.randn(1, 3, 2)
        for _ in range(5):
            out = x * 2
            segments.follow(x, out)
            x = out
        segments.finish()
    assert len(made) == 1


@pytest.mark.parametrize("layers", [3, 6])
def test_memory_does_not_grow_with_depth(pipe: StableDiffusion3Pipeline, layers: int) -> None:
    config = dict(pipe.transformer.config) | {"num_layers": layers}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    held = []
    routed = routed_of(pipe)
    routed.observer = lambda *_: held.append(routed.residuals.megabytes)
    walk(pipe, tiny_inputs(2), 12)  # fewer steps are not forecast, which would take half of it
    assert held[-1] * 1e6 == BlockResiduals(torch.zeros(2, 64, 32), torch.zeros(2, 7, 32), 1.0).bytes
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks", max_cache_mb=1e-6))
    walk(pipe, tiny_inputs(2), 4)
    assert routed_of(pipe).spending.ratio == 1.0


@torch.no_grad()
@pytest.mark.parametrize("controls", [0, 2, 4])
def test_what_a_controlnet_adds_is_not_added_twice(pipe: StableDiffusion3Pipeline, controls: int) -> None:
    call: dict[str, Any] = tiny_inputs(2, 500.0)
    added = torch.randn(controls, 2, 64, 32, generator=torch.Generator().manual_seed(4))
    call["block_controlnet_hidden_states"] = list(added) or None
    pipe._guidance_scale = 0.0
    dense = pipe.transformer(**call, return_dict=False)[0]
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    pipe.scheduler.set_timesteps(6)
    for time in pipe.scheduler.timesteps:  # nothing moves, so what is reused is exact
        out = pipe.transformer(**call, return_dict=False)[0]
        torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)
        pipe.scheduler.step(out, time, call["hidden_states"])
    assert routed_of(pipe).spending.actions["reuse"] > 0
