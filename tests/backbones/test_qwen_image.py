"""Qwen-Image by its spec: dense bit for bit, blocks per sample, tokens refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec, qwen_image


def tiny_model(**options: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=24, in_channels=16, out_channels=4,
        axes_dims_rope=(4, 14, 14), **options,
    )  # fmt: skip
    return model.requires_grad_(False).eval()


def inputs(batch: int, height: int = 4, width: int = 4, text: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, height * width, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "encoder_hidden_states_mask": torch.tensor([[True] * text, *[[True] * (text - 1) + [False]] * (batch - 1)]),
        "timestep": torch.linspace(0.9, 0.2, batch),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def of_sample(call: dict[str, Any], sample: int) -> dict[str, Any]:
    return {name: value[sample : sample + 1] for name, value in call.items()}


def run(model: QwenImageTransformer2DModel, call: dict[str, Any]) -> Tensor:
    return model(**call, return_dict=False)[0]


def test_a_fresh_adapter_is_the_dense_model_and_detach_leaves_nothing() -> None:
    model, call = tiny_model(), inputs(2)
    assert find_spec(model) is qwen_image.SPEC
    dense = run(model, call)
    for router in ("lean", "elastic-dit"):
        sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(router=router)))  # type: ignore[arg-type]
        sl.set_budget(model, threshold=0.5)
        assert routed_of(model).routed == (0, 1, 2)
        assert torch.equal(run(model, call), dense)
        assert routed_of(model).spending.actions["run"] == 6
        sl.detach(model)
        assert torch.equal(run(model, call), dense)
        assert not [name for name, module in model.named_modules() if "_diffusers_hook" in module.__dict__]


# The text, or the image, or both, are as long as the batch is large: nothing may take them for one another.
@pytest.mark.parametrize(("height", "width", "text"), [(4, 4, 3), (3, 1, 5), (3, 1, 3), (4, 4, 5)])
def test_a_batch_is_its_samples_whatever_its_size(height: int, width: int, text: int) -> None:
    model, call = tiny_model(), inputs(3, height, width, text)
    sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(router="elastic-dit", widths=(0.5, 1.0))))
    routed = routed_of(model)
    actions = []
    # Who goes where is told by the timestep: 0.9 and 0.2 run, whole and narrow, 0.55 does not, in turns.
    says = {0.9: (1.0, 1.0), 0.55: (-1.0, 1.0), 0.2: (1.0, -1.0)}

    def reading(block: int, x: Tensor, text: Tensor | None, first: int = 0) -> Tensor:
        times = [min(says, key=lambda time: abs(1000 * time - t)) for t in routed.context.timestep.tolist()]
        return torch.tensor([(says[t][0] * (-1.0 if block == 1 else 1.0), 0.0, says[t][1]) for t in times])

    routed.read_gates = reading
    routed.observer = lambda block, *_: actions.append(dict(routed.spending.actions))
    sl.set_budget(model, threshold=0.5)
    together = run(model, call)
    assert actions[-1] == {"run": 5, "reuse": 0, "skip": 4}
    for sample in range(3):
        torch.testing.assert_close(run(model, of_sample(call, sample))[0], together[sample], atol=1e-5, rtol=1e-4)


def test_a_skipped_block_passes_both_streams() -> None:
    model, call = tiny_model(), inputs(2)
    sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(router="elastic-dit", widths=(1.0,))))
    with torch.no_grad():
        routed_of(model).gates.router.routers["1"].gate_head.bias.fill_(-1.0)
    sl.set_budget(model, threshold=0.5)
    skipped = run(model, call)
    sl.detach(model)
    del model.transformer_blocks[1]
    assert torch.equal(run(model, call), skipped)


def test_the_plan_counts_what_runs() -> None:
    model, call = tiny_model(), inputs(1) | {"encoder_hidden_states_mask": None}
    sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(widths=(0.25, 1.0))))

    def counted() -> int:
        # The fused attention of a CPU is not counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(model, call)
        return counter.get_total_flops()

    whole = counted()
    words = {0: (1.0, 1.0, 0.0), 1: (1.0, 0.0, 1.0), 2: (-1.0, 0.0, 1.0)}  # narrow, whole, not at all
    routed_of(model).read_gates = lambda block, *_: torch.tensor([words[block]])
    sl.set_budget(model, threshold=0.5)
    costs = routed_of(model).planner.costs
    saved = costs[0].flops(16, 5) - costs[0].flops(16, 5, 0.25) + costs[2].flops(16, 5)
    assert whole - counted() == saved > 0


def edited(zero_cond_t: bool, batch: int = 3) -> tuple[QwenImageTransformer2DModel, dict[str, Any]]:
    """A picture's 16 tokens and 16 of the one to edit, which zero_cond_t gives the modulation of timestep 0."""
    call = inputs(batch)
    call["hidden_states"] = torch.randn(batch, 32, 16, generator=torch.Generator().manual_seed(4))
    call["img_shapes"] = [[(1, 4, 4), (1, 4, 4)]] * batch
    return tiny_model(zero_cond_t=zero_cond_t), call


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("axis", ["tokens", "blocks"])
def test_reference_tokens_and_their_modulation_follow_samples_and_tokens(axis: str, zero_cond_t: bool) -> None:
    model, call = edited(zero_cond_t)
    dense = run(model, call)
    torch.manual_seed(2)
    if axis == "tokens":
        sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
        sl.set_budget(model, keep=0.6)
    else:
        sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(widths=(0.5, 1.0))))
        words = {0: (1.0, -1.0, 1.0), 1: (-1.0, 1.0, 1.0), 2: (1.0, 1.0, 1.0)}
        state = {"at": [0, 1, 2]}
        routed_of(model).read_gates = lambda block, x, *_: torch.tensor(
            [(words[block][sample], 0.0, 1.0) for sample in state["at"]]
        )
        sl.set_budget(model, threshold=0.5)
    together = run(model, call)
    assert not torch.allclose(together, dense)
    for sample in range(3):
        if axis == "blocks":
            state["at"] = [sample]
        torch.testing.assert_close(
            run(model, of_sample(call, sample)), together[sample : sample + 1], atol=1e-5, rtol=1e-4
        )


def test_routers_see_each_samples_own_timestep() -> None:
    model, call = edited(True, 2)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting()))
    run(model, call)
    seen = routed_of(model).context.time_embedding
    plain = tiny_model()
    sl.attach(plain, sl.RoutingConfig(sl.TokenRouting()))
    run(plain, inputs(2))
    torch.testing.assert_close(seen, routed_of(plain).context.time_embedding)


def test_an_activation_is_refused_where_the_spec_names_none(pipe: Any) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match="'sd3' names no module"):
        sl.attach(pipe, sl.RoutingConfig(activation="quick-gelu"))
    with pytest.raises(sl.AdapterError, match="RoutingConfig.activation is 'relu'"):
        sl.RoutingConfig(activation="relu")  # type: ignore[arg-type]
    config = sl.RoutingConfig(None, sl.BlockRouting(), activation="quick-gelu")
    assert sl.RoutingConfig.from_dict(config.to_dict()) == config
