"""Rotary embeddings that follow gathered tokens: against diffusers' own, and against each sample's tokens run by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec
from shivelight.execution.rotary import turn

N, M = 16, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return build("flux").transformer, {
        "hidden_states": drawn(batch, N, 4), "encoder_hidden_states": drawn(batch, M, 32, seed=1),
        "pooled_projections": drawn(batch, 32, seed=2), "timestep": torch.linspace(0.9, 0.3, batch), "img_ids": ids,
        "txt_ids": torch.zeros(M, 3), "guidance": torch.full((batch,), 3.0),
    }  # fmt: skip


def flux2(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    place = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1))
    return model.requires_grad_(False).eval(), {
        "hidden_states": drawn(batch, N, 4), "encoder_hidden_states": drawn(batch, M, 32, seed=1),
        "timestep": torch.linspace(0.9, 0.3, batch), "img_ids": place, "txt_ids": torch.randint(0, 9, (M, 4)).float(),
        "guidance": torch.full((batch,), 3.0),
    }  # fmt: skip


def qwen_image(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    mask = torch.ones(batch, M, dtype=torch.bool)
    mask[1:, 3:] = False
    return build("qwen-image").transformer, {
        "hidden_states": drawn(batch, N, 16), "encoder_hidden_states": drawn(batch, M, 32, seed=1),
        "encoder_hidden_states_mask": mask, "timestep": torch.linspace(0.9, 0.3, batch),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }  # fmt: skip


def wan(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    return build("wan").transformer, {
        "hidden_states": drawn(batch, 16, 1, 8, 8), "encoder_hidden_states": drawn(batch, M, 32, seed=1),
        "timestep": torch.linspace(900.0, 300.0, batch),
    }  # fmt: skip


def wan_per_token(batch: int) -> tuple[nn.Module, dict[str, Any]]:
    """Wan 2.2 TI2V: the first tokens are given, at timestep 0."""
    model, call = wan(batch)
    times = call["timestep"][:, None].repeat(1, N)
    times[:, :4] = 0
    return model, call | {"timestep": times}


MODELS: dict[str, Callable[[int], tuple[nn.Module, dict[str, Any]]]] = {
    "flux": flux, "flux2": flux2, "qwen-image": qwen_image, "wan": wan, "wan per token": wan_per_token,
}  # fmt: skip


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    return model(**call, return_dict=False)[0]


def of_sample(call: dict[str, Any], sample: int) -> dict[str, Any]:
    shared = ("img_ids", "txt_ids")
    return {name: value if name in shared else value[sample : sample + 1] for name, value in call.items()}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_turning_is_what_diffusers_computes(batch: int, tokens: int, heads: int, half: int, seed: int) -> None:
    x, angles = drawn(batch, tokens, heads, 2 * half, seed=seed), drawn(tokens, half, seed=seed + 1)
    cosines, sines = angles.cos(), angles.sin()
    table = cosines.repeat_interleave(2, 1), sines.repeat_interleave(2, 1)
    wanted = apply_rotary_emb(x, table, sequence_dim=1)
    torch.testing.assert_close(turn(x, cosines, sines), wanted)
    torch.testing.assert_close(turn(x.flatten(2), cosines, sines), wanted.flatten(2))
    each = (cosines.expand(batch, -1, -1), sines.expand(batch, -1, -1))
    assert torch.equal(turn(x, *each), turn(x, cosines, sines))
    assert turn(x.bfloat16(), cosines, sines).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_each_block_runs_as_if_it_had_been_given_each_samples_tokens_alone(name: str) -> None:
    model, call = MODELS[name](3)
    spec = find_spec(model)
    torch.manual_seed(3)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    sl.set_budget(model, keep=0.5)
    given: dict[int, dict[str, Any]] = {}
    outputs: dict[int, tuple[Tensor, Tensor, Any]] = {}
    blocks = spec.block_list(model)
    watches = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index, kind=kind: given.update(
                {index: dict(zip(kind.arguments, args, strict=False)) | kwargs}
            ),
            with_kwargs=True,
        )
        for index, (kind, block) in enumerate(blocks)
    ]
    routed_of(model).observer = lambda block, x, out, indices, text: outputs.update({block: (x, out, text)})
    chosen: dict[tuple[int, int], Tensor] = {}
    scores = routed_of(model).scores

    def noting(block: int, x: Tensor, samples: slice = slice(None)) -> Tensor:
        found = scores(block, x, samples)
        for sample, row in enumerate(found):
            chosen[block, sample] = row
        return found

    routed_of(model).scores = noting
    run(model, call)
    routed_of(model).enable(False)
    for watch in watches:
        watch.remove()
    checked = 0
    for index, (kind, block) in enumerate(blocks):
        if index not in routed_of(model).routed:
            continue
        x, out, text = outputs[index]
        for sample in range(3):
            moved = (out[sample] != x[sample]).any(-1)
            indices = moved.nonzero().flatten()
            if len(indices) == N:
                continue
            assert set(chosen[index, sample].topk(len(indices)).indices.tolist()) == set(indices.tolist())
            one = alone(kind, given[index], sample, indices)
            with torch.no_grad():
                result = block(**one)
            if kind.joined:
                own_text, own = result[:, :M], result[:, M:]
            elif kind.returns == ("image",):
                own_text, own = None, result
            else:
                own_text, own = result
            torch.testing.assert_close(out[sample, indices], own[0], atol=1e-5, rtol=1e-4)
            if own_text is not None:
                torch.testing.assert_close(text[1][sample : sample + 1], own_text, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked >= 3


def alone(kind: Any, arguments: dict[str, Any], sample: int, indices: Tensor) -> dict[str, Any]:
    """A block's arguments for some tokens of one sample, by hand."""
    one = {}
    for name, value in arguments.items():
        if name in ("image_rotary_emb", "rotary_emb"):
            if kind.rotary.angles.__module__.endswith("wan"):
                one[name] = tuple(part[:, indices] for part in value)
            elif value[0].is_complex():
                one[name] = (value[0][indices], value[1])
            else:
                one[name] = tuple(torch.cat([part[:M], part[M:][indices]]) for part in value)
        elif not isinstance(value, Tensor):
            one[name] = value
        else:
            one[name] = value[sample : sample + 1] if len(value) == 3 else value
    stream = one[kind.image_argument]
    if kind.joined:
        one[kind.image_argument] = torch.cat([stream[:, :M], stream[:, M:][:, indices]], dim=1)
    else:
        one[kind.image_argument] = stream[:, indices]
    if "temb" in one and one["temb"].ndim == 4:
        one["temb"] = one["temb"][:, indices]
    return one


class Loop:
    """A loop of one's own: the same input at every step, so that what is reused is what would be computed."""

    def __init__(self, model: nn.Module) -> None:
        self.transformer, self.scheduler = model, FlowMatchEulerDiscreteScheduler()

    def __call__(self, call: dict[str, Any], steps: int = 4) -> list[Tensor]:
        self.scheduler.set_timesteps(steps)
        outputs = []
        for time in self.scheduler.timesteps:
            outputs.append(run(self.transformer, call))
            self.scheduler.step(outputs[-1], time, torch.zeros_like(outputs[-1]))
        self.transformer._reset_stateful_cache()
        return outputs


@pytest.mark.parametrize("name", [name for name in MODELS if name != "flux2"])
def test_with_keys_and_residuals_reused_an_unchanged_input_gives_the_dense_output(name: str) -> None:
    model, call = MODELS[name](2)
    dense = run(model, call)
    loop = Loop(model)
    sl.attach(loop, sl.RoutingConfig.training_free(0.5, warmup=0.25))
    outputs = loop(call)
    assert routed_of(model).spending.ratio < 0.95
    for output in outputs:
        torch.testing.assert_close(output, dense, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis", ["tokens", "blocks"])
def test_a_batch_is_its_samples_and_everything_on_is_dense(name: str, axis: Any) -> None:
    model, call = MODELS[name](2)
    dense = run(model, call)
    loop = Loop(model)
    sl.attach(loop, sl.RoutingConfig.training_free(compute=0.6, axis=axis))
    together = loop(call)
    for sample in range(2):
        for one, many in zip(loop(of_sample(call, sample)), together, strict=True):
            torch.testing.assert_close(one, many[sample : sample + 1], atol=1e-4, rtol=1e-3)
    sl.set_budget(loop, compute=1.0)
    assert all(torch.equal(output, dense) for output in loop(call))


def test_an_attention_that_leaves_the_norms_out_is_an_error_and_hooks_go_away() -> None:
    model, call = flux(1)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    sl.set_budget(model, keep=0.5)

    class Plain:
        def __call__(
            self, attn: Any, hidden: Tensor, text: Tensor | None = None, mask: Any = None, places: Any = None
        ) -> Any:
            return (hidden, text) if text is not None else hidden

    model.set_attn_processor(Plain())
    with pytest.raises(sl.ShivelightError, match="ran without attn.norm"):
        run(model, call)
    sl.detach(model)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_an_ip_adapter_in_the_attention_is_refused_where_tokens_are_left_out() -> None:
    model, call = flux(1)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    sl.set_budget(model, keep=0.5)
    model.transformer_blocks[1].attn.processor = FluxIPAdapterAttnProcessor(32, 16)
    with pytest.raises(sl.UnsupportedBackboneError, match="IP-Adapter"):
        run(model, call)


def test_keys_and_values_kept_by_the_model_itself_are_refused() -> None:
    model, call = flux2(1)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting()))
    with pytest.raises(sl.UnsupportedBackboneError, match="reference pictures"):
        run(model, call | {"kv_cache_mode": "extract", "num_ref_tokens": 4})
