from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import shivelight as sl
from shivelight.backbones import sd3
from shivelight.backbones.spec import Mlp
from shivelight.execution.width import NarrowMlps, OwnForward, call_narrow
from shivelight.training.ranking import channel_importance, rank_channels

PLAIN = Mlp(up=("net.0.proj",), down="net.2")
GATED = Mlp(up=("net.0.proj",), down="net.2", halves=2)
FUSED = Mlp(up=("proj_mlp",), down="proj_out")
D, B, BATCHES = 8, 3, 2


def everywhere(mlp: Mlp) -> dict[int, Mlp]:
    """The same in every block."""
    return defaultdict(lambda: mlp)


class Chain:
    """Two blocks after one another in float64, and the losses of single samples."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        build: Callable[[], nn.Module]
        if name == "joint":
            build, self.mlp = (lambda: JointTransformerBlock(D, 2, 4)), sd3.SPEC.blocks[0].mlp
        elif name == "fused":
            build, self.mlp = (lambda: FluxSingleTransformerBlock(D, 2, 4, mlp_ratio=2)), FUSED
        else:
            build, self.mlp = (lambda: FeedForward(D, mult=2, activation_fn="geglu")), GATED
        self.alone = name == "gated"
        self.blocks = {index: build().double().requires_grad_(False).eval() for index in (2, 5)}
        self.inputs = [
            [torch.randn(B, n, D, dtype=torch.float64) for n in (6, 4)] + [torch.randn(B, D, dtype=torch.float64)]
            for _ in range(BATCHES)
        ]
        self.readout = torch.randn(D, dtype=torch.float64)

    def losses(self, batch: int) -> Tensor:
        """[B], one loss for each sample."""
        x, text, time = self.inputs[batch]
        for block in self.blocks.values():
            if self.alone:
                x = x + block(x)
            else:
                text, x = block(x, text, time)
        return (x * self.readout).mean(1).sin().sum(1)

    def loss(self, batch: int) -> Tensor:
        return self.losses(batch).sum()

    def damped(self, index: int, channel: int, factor: float, batch: int) -> Tensor:
        """The losses [B] where one hidden channel of one block is multiplied by a factor."""
        down = self.blocks[index].get_submodule(self.mlp.down)
        gate = torch.ones(down.in_features, dtype=torch.float64)
        gate[self.mlp.offset(self.blocks[index]) + channel] = factor
        handle = down.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
        try:
            return self.losses(batch)
        finally:
            handle.remove()


NAMES = ("joint", "fused", "gated")


@pytest.mark.parametrize("name", NAMES)
def test_taylor_importance_is_what_damping_a_channel_changes(name: str) -> None:
    chain = Chain(name)
    found = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES)
    step = 1e-6
    for index, block in chain.blocks.items():
        hidden = chain.mlp.channels(block)
        assert found[index].shape == (hidden,)
        expected = torch.zeros(hidden, dtype=torch.float64)
        for channel in range(hidden):
            for batch in range(BATCHES):
                upper = chain.damped(index, channel, 1 + step, batch)
                lower = chain.damped(index, channel, 1 - step, batch)
                expected[channel] += ((upper - lower) / (2 * step)).abs().sum()
        torch.testing.assert_close(found[index], expected / (B * BATCHES), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_norm_importance_is_the_mean_activation_times_the_norm_of_its_column(name: str) -> None:
    chain = Chain(name)
    seen: dict[int, list[Tensor]] = {index: [] for index in chain.blocks}
    handles = [
        block.get_submodule(chain.mlp.down).register_forward_pre_hook(
            lambda module, args, kept=seen[index]: kept.append(args[0])
        )
        for index, block in chain.blocks.items()
    ]
    for batch in range(BATCHES):
        chain.loss(batch)
    for handle in handles:
        handle.remove()
    found = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES, criterion="norm")
    for index, block in chain.blocks.items():
        hidden = chain.mlp.channels(block)
        activations = torch.cat(seen[index])[..., -hidden:].abs().mean((0, 1))
        columns = block.get_submodule(chain.mlp.down).weight[:, -hidden:].norm(dim=0)
        torch.testing.assert_close(found[index], activations * columns, rtol=1e-12, atol=0)


@pytest.mark.parametrize("criterion", ["taylor", "norm"])
@pytest.mark.parametrize("name", NAMES)
def test_the_order_is_a_permutation_from_the_most_important_down_and_always_the_same(name: str, criterion: str) -> None:
    chain = Chain(name)
    orders = rank_channels(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES, criterion)  # type: ignore[arg-type]
    importance = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES, criterion)  # type: ignore[arg-type]
    again = rank_channels(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES, criterion)  # type: ignore[arg-type]
    for index, order in orders.items():
        assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(order)))
        assert (importance[index][order].diff() <= 0).all() and torch.equal(order, again[index])
    assert not torch.equal(orders[2], orders[5])


def test_equal_channels_keep_their_own_order() -> None:
    block = FeedForward(D, inner_dim=6, activation_fn="gelu-approximate").requires_grad_(False)
    with torch.no_grad():
        for parameter in (block.net[0].proj.weight, block.net[0].proj.bias, block.net[2].weight):
            parameter.fill_(0.5)
        block.net[2].weight[:, 4].mul_(-3)
    order = rank_channels({0: block}, everywhere(PLAIN), lambda batch: block(torch.ones(1, 2, D)).sum(), 1)[0]
    assert order.tolist() == [4, 0, 1, 2, 3, 5]


def test_opposite_tokens_cancel_within_a_sample_but_samples_do_not() -> None:
    block = FeedForward(1, inner_dim=2, activation_fn="linear-silu", bias=False).double().requires_grad_(False)
    sign = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]], dtype=torch.float64)  # cancels over tokens
    assert (
        channel_importance({0: block}, everywhere(PLAIN), lambda batch: (block(sign.abs()) * sign).sum(), 1)[0].max()
        < 1e-12
    )
    sign = sign.transpose(0, 1)  # cancels over samples
    assert (
        channel_importance({0: block}, everywhere(PLAIN), lambda batch: (block(sign.abs()) * sign).sum(), 1)[0].min()
        > 1e-3
    )


@pytest.mark.parametrize("criterion", ["taylor", "norm"])
def test_ranked_a_quarter_of_the_channels_is_closer_to_the_whole(criterion: str) -> None:
    torch.manual_seed(0)
    block = FeedForward(D, inner_dim=32, activation_fn="gelu-approximate").double().requires_grad_(False)
    block.net[2].weight[:, :24] *= 0.02  # what matters comes last
    x = torch.randn(4, 5, D, dtype=torch.float64)
    whole = block(x)
    loss = lambda batch: (block(x) - 1).square().mean()  # noqa: E731
    order = rank_channels({0: block}, everywhere(PLAIN), loss, 1, criterion)  # type: ignore[arg-type]

    def error(orders: dict[int, Tensor] | None) -> float:
        replacements = NarrowMlps({0: block}, everywhere(PLAIN), orders).replacements(0, 0.25)
        return float((call_narrow(OwnForward(block, block.forward), replacements, x) - whole).square().mean())

    assert set(order[0][:8].tolist()) == set(range(24, 32))
    assert error(order) < 0.05 * error(None)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("criterion", ["taylor", "norm"])
def test_nothing_is_left_behind(pipe: StableDiffusion3Pipeline, frozen: bool, criterion: str) -> None:
    model = pipe.transformer.requires_grad_(not frozen)
    blocks = dict(list(enumerate(model.transformer_blocks))[1:])
    marked = model.transformer_blocks[1].ff.net[2].weight
    marked.grad = torch.full_like(marked, 7.0)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 32, generator=generator)

    def loss(batch: int) -> Tensor:
        return model(x, text, torch.ones(2, 32), torch.tensor([500.0, 20.0])).sample.square().mean()

    assert sd3.SPEC.blocks[0].mlp is not None
    with torch.no_grad():  # as a caller may have it
        orders = rank_channels(blocks, everywhere(sd3.SPEC.blocks[0].mlp), loss, 1, criterion)  # type: ignore[arg-type]
        assert not torch.is_grad_enabled()
    assert sorted(orders) == [1, 2, 3] and all(order.shape == (128,) for order in orders.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None or parameter is marked
    assert (marked.grad == 7).all()
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_gradient_checkpointing_changes_nothing(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer.double()
    blocks = dict(enumerate(model.transformer_blocks))
    x, text = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 5, 32).double()

    def loss(batch: int) -> Tensor:
        return model(x, text, torch.ones(2, 32).double(), torch.tensor([500.0, 20.0])).sample.square().mean()

    assert sd3.SPEC.blocks[0].mlp is not None
    plain = channel_importance(blocks, everywhere(sd3.SPEC.blocks[0].mlp), loss, 1)
    model.train().enable_gradient_checkpointing()
    for index, values in channel_importance(blocks, everywhere(sd3.SPEC.blocks[0].mlp), loss, 1).items():
        torch.testing.assert_close(values, plain[index], rtol=1e-12, atol=0)


def test_a_lora_on_the_down_projection_does_not_hide_the_channels() -> None:
    chain = Chain("gated")
    plain = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, 1, "norm")
    taylor = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, 1)
    for block in chain.blocks.values():  # a fresh LoRA changes nothing
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["net.2"]), block)
    for index, values in channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, 1, "norm").items():
        assert torch.equal(values, plain[index])
    for index, values in channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, 1).items():
        torch.testing.assert_close(values, taylor[index], rtol=1e-5, atol=1e-9)


def test_half_precision_is_summed_in_fp32() -> None:
    chain = Chain("gated")
    exact = channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES)
    for block in chain.blocks.values():
        block.bfloat16()
    chain.inputs = [[part.bfloat16() for part in inputs] for inputs in chain.inputs]
    chain.readout = chain.readout.bfloat16()
    for index, values in channel_importance(chain.blocks, everywhere(chain.mlp), chain.loss, BATCHES).items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), exact[index], rtol=0.2, atol=0.02)


def test_what_cannot_be_ranked_says_why() -> None:
    chain = Chain("gated")
    with pytest.raises(sl.TrainingError, match="at least one batch"):
        rank_channels(chain.blocks, everywhere(chain.mlp), chain.loss, 0)
    with pytest.raises(sl.TrainingError, match="'size' is unknown; choose 'taylor' or 'norm'"):
        rank_channels(chain.blocks, everywhere(chain.mlp), chain.loss, 1, "size")  # type: ignore[arg-type]
    with pytest.raises(sl.TrainingError, match="batch 0.*no gradient.*'norm'"):
        rank_channels(chain.blocks, everywhere(chain.mlp), lambda batch: chain.loss(batch).detach(), 1)
    with pytest.raises(sl.TrainingError, match=r"shape \(3,\).*scalar"):
        rank_channels(chain.blocks, everywhere(chain.mlp), chain.losses, 1)
    for criterion in ("taylor", "norm"):
        with pytest.raises(sl.TrainingError, match="block 7 never ran"):
            idle = FeedForward(D, mult=2, activation_fn="geglu")
            rank_channels({**chain.blocks, 7: idle}, everywhere(chain.mlp), chain.loss, 1, criterion)  # type: ignore[arg-type]
    with pytest.raises(sl.TrainingError, match="block 2 is not finite"):
        rank_channels(chain.blocks, everywhere(chain.mlp), lambda batch: chain.loss(batch) * float("nan"), 1)
    chain.blocks[5].net[2].weight = nn.Parameter(torch.zeros(D, 2 * D, dtype=torch.int8), requires_grad=False)
    chain.blocks[5].net[2].forward = lambda x: x[..., :D]
    with pytest.raises(sl.TrainingError, match="block 5 is quantised.*'taylor'"):
        rank_channels(chain.blocks, everywhere(chain.mlp), chain.loss, 1, "norm")
    assert not [m for block in chain.blocks.values() for m in block.modules() if m._forward_pre_hooks]
