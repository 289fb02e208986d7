import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shivelight import BudgetError, UnsupportedBackboneError
from shivelight.backbones import Streams, find_spec
from shivelight.backbones.spec import Mlp
from shivelight.cost import BlockCost, backbone_costs, block_cost, kept_channels, planned_ratio, step_flops
from shivelight.execution.width import NarrowMlps, OwnForward, call_narrow


def counted_flops(model: SD3Transformer2DModel, side: int, text_tokens: int) -> list[int]:
    """FLOPs of each block, by torch's own counter; one sample, side x side latents."""
    counter = FlopCounterMode(display=False)
    # Only the plain implementation's products are counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(
            hidden_states=torch.randn(1, 4, side, side),
            encoder_hidden_states=torch.randn(1, text_tokens, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([500.0]),
        )
    counts = counter.get_flop_counts()
    return [
        sum(counts[f"{type(model).__name__}.transformer_blocks.{i}"].values())
        for i in range(len(model.transformer_blocks))
    ]


@pytest.mark.parametrize(("side", "text_tokens"), [(16, 16), (16, 1), (8, 40), (2, 3)])
def test_every_blocks_plan_is_what_torch_counts(pipe: StableDiffusion3Pipeline, side: int, text_tokens: int) -> None:
    model = pipe.transformer  # dual attention in blocks 0 and 1, context_pre_only in the last
    planned = [c.flops((side // 2) ** 2, text_tokens) for c in backbone_costs(model, find_spec(model))]
    assert planned == counted_flops(model, side, text_tokens)


def test_the_plan_of_wider_heads_is_what_torch_counts() -> None:
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=32, caption_projection_dim=48, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    planned = [c.flops(64, 7) for c in backbone_costs(model, find_spec(model))]
    assert planned == counted_flops(model, 16, 7)


def test_a_lora_does_not_change_the_plan(pipe: StableDiffusion3Pipeline) -> None:
    spec = find_spec(pipe.transformer)
    before = backbone_costs(pipe.transformer, spec)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ff.net.2"]))
    assert backbone_costs(pipe.transformer, spec) == before


def test_a_blocks_cost_is_the_stated_formula() -> None:
    cost = BlockCost(image_weights=10, text_weights=3, sample_weights=7, joint_width=2, image_width=5)
    assert cost.flops(6, 4) == 2 * (10 * 6 + 3 * 4 + 7) + 4 * (2 * 10**2 + 5 * 6**2)
    assert cost.bytes_moved(6, 4, width=8, element_size=2) == 2 * (20 + 2 * 8 * 10)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)


def test_a_linear_layer_that_is_forgotten_or_claimed_twice_is_an_error() -> None:
    assert block_cost(Block(), Streams(image=("first",), text=("second",))).text_weights == 32
    with pytest.raises(UnsupportedBackboneError, match="'second' of Block is claimed by no stream"):
        block_cost(Block(), Streams(image=("first",)))
    with pytest.raises(UnsupportedBackboneError, match="'second'.*image.*text"):
        block_cost(Block(), Streams(image=("*",), text=("second",)))


def test_the_planned_ratio_is_the_share_of_the_dense_flops() -> None:
    costs = [BlockCost(10, 1, 1, 4, 0), BlockCost(20, 1, 1, 4, 4), BlockCost(30, 1, 1, 4, 0)]
    rows = ((8, 4), (16, 2))
    dense = 2 * sum(c.flops(16, 3) for c in costs)
    expected = sum(costs[0].flops(16, 3) + costs[1].flops(a, 3) + costs[2].flops(b, 3) for a, b in rows)
    assert planned_ratio(costs, rows, (1, 2), 16, 3) == expected / dense
    assert planned_ratio(costs, ((16, 16),), (1, 2), 16, 3) == 1.0
    assert step_flops(costs, (16, 8, 4), 3) == expected - step_flops(costs, (16, 16, 2), 3)
    with pytest.raises(ValueError):
        step_flops(costs, (16, 8), 3)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_the_plan_of_a_narrow_block_is_what_torch_counts(pipe: StableDiffusion3Pipeline, share: float) -> None:
    spec, blocks = find_spec(pipe.transformer), pipe.transformer.transformer_blocks
    narrow = NarrowMlps(dict(enumerate(blocks)), spec.mlps(pipe.transformer))
    for index, cost in enumerate(backbone_costs(pipe.transformer, spec)):
        counter = FlopCounterMode(display=False)
        inputs = (torch.randn(1, 12, 32), torch.randn(1, 5, 32), torch.randn(1, 32))
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call_narrow(OwnForward(blocks[index], blocks[index].forward), narrow.replacements(index, share), *inputs)
        assert cost.flops(12, 5, share) == counter.get_total_flops()


def test_a_gated_mlps_channel_costs_both_of_its_halves() -> None:
    mlp, streams = Mlp(up=("first",), down="second", halves=2), Streams(image=("first", "second"))
    block = nn.Module()
    block.first, block.second = nn.Linear(3, 16), nn.Linear(11, 5)  # 8 channels beside 3 other columns
    cost = block_cost(block, streams, mlp)
    assert (cost.channels, cost.channel_weights) == (8, 2 * 3 + 5)
    assert cost.flops(7, 0, 0.25) == 2 * 7 * (3 * 2 * 2 + (3 + 2) * 5)
    assert cost.bytes_moved(7, 0, 4, 2, 0.25) == 2 * (3 * 2 * 2 + (3 + 2) * 5 + 2 * 4 * 7)
    assert cost.flops(7, 0) == cost.flops(7, 0, 1.0) == block_cost(block, streams).flops(7, 0, 0.25)


def test_an_mlp_outside_the_image_stream_is_an_error() -> None:
    with pytest.raises(UnsupportedBackboneError, match=r"MLP of Block names \['second'\]"):
        block_cost(Block(), Streams(image=("first",), text=("second",)), Mlp(up=("first",), down="second"))


def test_narrow_widths_enter_the_planned_ratio() -> None:
    costs = [BlockCost(100, 1, 1, 4, 0, 8, 5), BlockCost(200, 1, 1, 4, 4, 8, 5)]
    dense = 2 * sum(c.flops(16, 3) for c in costs)
    expected = 2 * costs[0].flops(16, 3) + costs[1].flops(8, 3, 0.5) + costs[1].flops(16, 3, 0.25)
    assert planned_ratio(costs, ((8,), (16,)), (1,), 16, 3, ((0.5,), (0.25,))) == expected / dense
    assert step_flops(costs, (16, 8), 3, (1.0, 0.5)) == costs[0].flops(16, 3) + costs[1].flops(8, 3) - 2 * 8 * 4 * 5
    with pytest.raises(ValueError):
        planned_ratio(costs, ((8,), (16,)), (1,), 16, 3, ((0.5,),))
    with pytest.raises(ValueError):
        step_flops(costs, (16, 8), 3, (1.0,))


@given(st.integers(1, 100), st.integers(1, 5000))
@example(29, 100)
@example(57, 100)
def test_the_channels_of_a_width_are_the_exact_floor(hundredths: int, channels: int) -> None:
    assert kept_channels(hundredths / 100, channels) == max(1, hundredths * channels // 100)


def test_the_channels_of_a_width_forgive_rounding_and_are_at_least_one() -> None:
    assert [kept_channels(w, 100) for w in (0.29, 0.57, 0.58, 0.999, 1.0, 0.001)] == [29, 57, 58, 99, 100, 1]
    assert kept_channels(0.5, 7) == 3 and kept_channels(0.25, 0) == 0
    for width in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(BudgetError, match="MLP width"):
            kept_channels(width, 100)


class Whole(nn.Module):
    """A block that is its own attention."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        for name, size in sizes.items():
            setattr(self, name, size)


@pytest.mark.parametrize("size", ["inner_dim", "hidden_size"])
def test_an_attention_that_is_the_block_itself_is_counted(size: str) -> None:
    streams = Streams(image=("out",), image_attention=("",))
    cost = block_cost(Whole(**{size: 8}), streams)
    assert cost.image_width == 8 and cost.flops(5, 0) == 2 * 64 * 5 + 4 * 8 * 25
    with pytest.raises(UnsupportedBackboneError, match="neither `inner_dim` nor `hidden_size`"):
        block_cost(Whole(), streams)
