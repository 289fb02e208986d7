from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import FeedForward, JointTransformerBlock, LuminaFeedForward
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.func import functional_call

import shivelight as sl
from shivelight.backbones import flux2, sd3
from shivelight.backbones.spec import Mlp
from shivelight.execution.folding import Delta, FoldedWeights
from shivelight.execution.width import NarrowMlps, OwnForward, call_narrow, resized

PLAIN = Mlp(up=("net.0.proj",), down="net.2")
GATED = Mlp(up=("net.0.proj",), down="net.2", halves=2)
SEPARATE = Mlp(up=("linear_1", "linear_3"), down="linear_2")
FUSED = Mlp(up=("proj_mlp",), down="proj_out")
PARALLEL = flux2.SPEC.blocks[1].mlp
SHARES = (0.25, 0.5, 0.75)
D, H = 16, 40


@dataclass
class Case:
    """A real block in float64, what its MLP is, and inputs for it."""

    block: nn.Module
    mlp: Mlp
    inputs: tuple[Tensor, ...]
    hidden: int = H

    def narrow(self, orders: dict[int, Tensor] | None = None) -> NarrowMlps:
        return NarrowMlps({3: self.block}, {3: self.mlp}, orders)

    def order(self) -> dict[int, Tensor]:
        return {3: torch.randperm(self.hidden, generator=torch.Generator().manual_seed(5))}


def make(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    x, text, time = torch.randn(2, 6, D), torch.randn(2, 3, D), torch.randn(2, D)
    activations = {"gelu": "gelu-approximate", "geglu": "geglu", "swiglu": "swiglu"}
    if name in activations:
        block: nn.Module = FeedForward(D, inner_dim=H, activation_fn=activations[name])
        case = Case(block, PLAIN if name == "gelu" else GATED, (x,))
    elif name == "separate":
        block = LuminaFeedForward(D, H, multiple_of=1)
        block.silu = nn.SiLU()  # its own computes in fp32, where a result depends on its place in a vector
        case = Case(block, SEPARATE, (x,))
    elif name == "joint":
        case = Case(JointTransformerBlock(D, 2, 8), sd3.SPEC.blocks[0].mlp, (x, text, time), 4 * D)
    elif name == "parallel":  # queries, keys and values are rows of the same projection
        case = Case(Flux2SingleTransformerBlock(D, 2, 8, mlp_ratio=H / D), PARALLEL, (x, text, torch.randn(2, 3 * D)))
    else:
        case = Case(FluxSingleTransformerBlock(D, 2, 8, mlp_ratio=H / D), FUSED, (x, text, time))
    case.block.to(dtype).requires_grad_(False).eval()
    case.inputs = tuple(tensor.to(dtype) for tensor in case.inputs)
    return case


CASES = ("gelu", "geglu", "swiglu", "separate", "joint", "fused", "parallel")


def flat(output: Any) -> Tensor:
    return torch.cat([o.flatten() for o in output]) if isinstance(output, tuple) else output


def masked(case: Case, kept: Tensor) -> Tensor:
    """The full block with every hidden channel that is not kept set to zero before the down-projection."""
    down = case.block.get_submodule(case.mlp.down)
    gate = torch.ones(down.in_features, dtype=down.weight.dtype)
    hidden = gate[down.in_features - case.hidden :]
    hidden.zero_()
    hidden[kept] = 1
    handle = down.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    try:
        return flat(case.block(*case.inputs))
    finally:
        handle.remove()


def narrowed(case: Case, narrow: NarrowMlps, share: float) -> Tensor:
    replacements = narrow.replacements(3, share)
    with resized(case.block, narrow.sizes(3, share)):
        return flat(call_narrow(OwnForward(case.block, case.block.forward), replacements, *case.inputs))


def kept_of(case: Case, order: dict[int, Tensor] | None, share: float) -> Tensor:
    order_of_block = torch.arange(case.hidden) if order is None else order[3]
    return order_of_block[: round(share * case.hidden)]


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_narrow_block_is_the_full_block_without_the_other_channels(name: str, ranked: bool) -> None:
    case = make(name)
    before = {key: value.clone() for key, value in case.block.state_dict().items()}
    order = case.order() if ranked else None
    narrow = case.narrow(order)
    full = flat(case.block(*case.inputs))
    before_them = case.mlp.rows_before(case.block)
    for share in (*SHARES, 0.25):  # and in any order of asking
        expected = masked(case, kept_of(case, order, share))
        torch.testing.assert_close(narrowed(case, narrow, share), expected, rtol=0, atol=1e-12)
        assert (expected - full).abs().max() > 1e-3
        weights = narrow.replacements(3, share)
        rows = {weights[f"{up}.weight"].shape[0] for up in case.mlp.up}
        assert rows == {before_them + case.mlp.halves * round(share * case.hidden)}  # true slices, no masks
    after = case.block.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert all(type(p) is nn.Parameter for p in case.block.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_full_width_touches_nothing(name: str) -> None:
    case = make(name)
    narrow = case.narrow(case.order())
    assert narrow.replacements(3, 1.0) == {} and narrow.memory() == 0 and narrow.can_narrow(3) is None
    assert torch.equal(narrowed(case, narrow, 1.0), flat(case.block(*case.inputs)))


def test_only_the_image_streams_mlp_of_sd3_is_narrowed(pipe: StableDiffusion3Pipeline) -> None:
    blocks = dict(enumerate(pipe.transformer.transformer_blocks))
    narrow = NarrowMlps(blocks, dict.fromkeys(blocks, sd3.SPEC.blocks[0].mlp))
    for index in blocks:  # dual attention in 0 and 1, context_pre_only in 3
        assert {name: tuple(part.shape) for name, part in narrow.replacements(index, 0.25).items()} == {
            "ff.net.0.proj.weight": (32, 32), "ff.net.0.proj.bias": (32,), "ff.net.2.weight": (32, 32)
        }  # fmt: skip


def test_narrower_widths_are_views_of_one_copy() -> None:
    case = make("fused")
    narrow = case.narrow(case.order())
    parts = {share: narrow.replacements(3, share) for share in SHARES}
    for name in parts[0.25]:
        assert len({part[name].data_ptr() for part in parts.values()}) == 1
    # 75% of the channels' rows and biases, and their columns beside those of the attention: 8 bytes each.
    assert narrow.memory() == 8 * (30 * D + 30 + D * (D + 30))
    assert all(part["proj_mlp.weight"].is_contiguous() for part in parts.values())
    narrow.forget()
    assert narrow.memory() == 0


@pytest.mark.parametrize("ranked", [True, False])
def test_stacked_halves_have_a_copy_of_each_width_that_was_asked_for(ranked: bool) -> None:
    case = make("geglu")
    narrow = case.narrow(case.order() if ranked else None)
    down = 8 * D * 30
    for share, rows in ((0.5, 40), (0.25, 60), (0.5, 60), (0.75, 120)):
        narrow.replacements(3, share)
        assert narrow.memory() == down + 8 * rows * (D + 1)


def test_channels_in_their_own_order_need_no_copy() -> None:
    case = make("joint")
    narrow = case.narrow()
    for share in SHARES:
        for name, part in narrow.replacements(3, share).items():
            assert part.data_ptr() == case.block.get_parameter(name).data_ptr()
    assert narrow.memory() == 0


def test_the_copies_are_gathered_once() -> None:
    case = make("joint")
    narrow = case.narrow(case.order())
    first = narrow.replacements(3, 0.5)
    narrowed(case, narrow, 0.5)
    again = narrow.replacements(3, 0.5)
    assert all(again[name] is first[name] for name in first)
    again.clear()  # the caller's own dict
    assert len(narrow.replacements(3, 0.5)) == 3


def in_place(case: Case) -> None:
    with torch.no_grad():
        case.block.get_submodule(case.mlp.down).weight.mul_(-2)


def bias_in_place(case: Case) -> None:
    with torch.no_grad():
        case.block.get_submodule(case.mlp.up[0]).bias.add_(1)


def swapped_data(case: Case) -> None:
    layer = case.block.get_submodule(case.mlp.up[-1])
    layer.weight.data = layer.weight.data.flip(0).clone()


def other_parameter(case: Case) -> None:
    layer = case.block.get_submodule(case.mlp.down)
    layer.weight = nn.Parameter(layer.weight.data * 3, requires_grad=False)


def loaded(case: Case) -> None:
    case.block.load_state_dict({name: value + 0.1 for name, value in case.block.state_dict().items()})


def assigned(case: Case) -> None:
    case.block.load_state_dict({name: value + 0.1 for name, value in case.block.state_dict().items()}, assign=True)


def cast_and_back(case: Case) -> None:
    case.block.to(torch.bfloat16).to(torch.float64)


def stepped(case: Case) -> None:
    weight = case.block.get_submodule(case.mlp.down).weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    flat(case.block(*case.inputs)).square().mean().backward()
    optimizer.step()
    weight.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [in_place, bias_in_place, swapped_data, other_parameter, loaded, assigned, cast_and_back, stepped]
)
@pytest.mark.parametrize("name", ["joint", "geglu"])
def test_changed_weights_are_never_served_stale(name: str, change: Callable[[Case], None]) -> None:
    case = make(name)
    order = case.order()
    narrow = case.narrow(order)
    before = narrowed(case, narrow, 0.5)
    change(case)
    after = narrowed(case, narrow, 0.5)
    torch.testing.assert_close(after, masked(case, kept_of(case, order, 0.5)), rtol=0, atol=1e-12)
    assert (after - before).abs().max() > 1e-6


def test_another_weight_at_the_same_address_is_noticed() -> None:
    case = make("gelu")
    order, layer = case.order(), case.block.get_submodule("net.2")
    narrow = case.narrow(order)
    memory = layer.weight.numpy().copy()
    layer.weight.data = torch.from_numpy(memory)
    narrowed(case, narrow, 0.5)
    seen = (layer.weight.data_ptr(), layer.weight._version)
    memory[:] = np.random.default_rng(0).normal(size=memory.shape)
    layer.weight.data = torch.from_numpy(memory)
    assert seen == (layer.weight.data_ptr(), layer.weight._version)
    torch.testing.assert_close(narrowed(case, narrow, 0.5), masked(case, kept_of(case, order, 0.5)), rtol=0, atol=1e-12)


def test_folded_deltas_reach_the_narrow_weights() -> None:
    case = make("joint", torch.float32)
    order, layer = case.order(), case.block.get_submodule("ff.net.2")
    narrow = case.narrow(order)
    delta = Delta(torch.randn(2, layer.in_features), torch.randn(D, 2), torch.rand(D) + 0.5)
    folded = FoldedWeights(case.block, {"ff.net.2": delta}, 1.0)
    outputs = []
    for active in (False, True, False):
        folded.apply(active)
        outputs.append(narrowed(case, narrow, 0.25))
        torch.testing.assert_close(outputs[-1], masked(case, kept_of(case, order, 0.25)), rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_writing_through_data_needs_forget() -> None:
    case = make("joint")
    order = case.order()
    narrow = case.narrow(order)
    narrowed(case, narrow, 0.5)
    case.block.get_submodule("ff.net.2").weight.data += 1  # as peft merges; PyTorch does not count it
    narrow.forget()
    torch.testing.assert_close(narrowed(case, narrow, 0.5), masked(case, kept_of(case, order, 0.5)), rtol=0, atol=1e-12)


def test_forgetting_one_block_leaves_the_others() -> None:
    case = make("gelu")
    narrow = NarrowMlps(
        {1: case.block, 2: make("gelu").block}, {1: PLAIN, 2: PLAIN}, {1: case.order()[3], 2: case.order()[3]}
    )
    narrow.replacements(1, 0.5)
    one = narrow.memory()
    narrow.replacements(2, 0.5)
    assert narrow.memory() == 2 * one
    narrow.forget(1)
    assert narrow.memory() == one


class OtherLinear(nn.Linear):
    """As bitsandbytes and torch's parametrisations do: a subclass with a forward of its own."""


class QuantisedTensor(torch.Tensor):
    """As torchao stores weights."""


def wrap_in_lora(layer: nn.Linear, block: nn.Module) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["net.2"]), block)


def subclass(layer: nn.Linear, block: nn.Module) -> None:
    block.net[2] = OtherLinear(layer.in_features, layer.out_features).double()


def quantise(layer: nn.Linear, block: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(QuantisedTensor), requires_grad=False)


def to_integers(layer: nn.Linear, block: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)


def hook_the_layer(layer: nn.Linear, block: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(ModelHook(), "offload")


def offload(layer: nn.Linear, block: nn.Module) -> None:
    layer.to("meta")


def make_in_inference_mode(layer: nn.Linear, block: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrap_in_lora, "'net.2' of block 3 carries a LoRA"),
        (subclass, "'net.2' of block 3 is a OtherLinear"),
        (quantise, "'net.2' of block 3 is quantised"),
        (to_integers, "'net.2' of block 3 is quantised"),
        (hook_the_layer, "'net.2' of block 3 has a hook"),
        (offload, "'net.2' of block 3 is offloaded"),
        (make_in_inference_mode, "inference mode"),
    ],
)
def test_a_layer_that_cannot_be_sliced_keeps_the_full_width_and_says_why(change: Callable, reason: str) -> None:
    case = make("gelu")
    narrow = case.narrow(case.order())
    assert narrow.can_narrow(3) is None and narrow.replacements(3, 0.5)
    change(case.block.net[2], case.block)
    assert reason in (narrow.can_narrow(3) or "")
    assert narrow.replacements(3, 0.5) == {} and narrow.memory() == 0
    # A backbone may come like this from the start.
    assert reason in (case.narrow(case.order()).can_narrow(3) or "")


class Counting(ModelHook):
    """Runs the block narrow, in the place of its forward, and counts how often it is entered."""

    def __init__(self, narrow: NarrowMlps, directly: bool) -> None:
        super().__init__()
        self.narrow, self.directly, self.entered = narrow, directly, 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.entered += 1
        inner = self.fn_ref.original_forward
        if self.entered > 1:  # functional_call on the block itself comes back here
            return inner(*args, **kwargs)
        replacements = self.narrow.replacements(3, 0.5)
        if self.directly:
            return functional_call(module, replacements, args, kwargs, tie_weights=False)
        return call_narrow(OwnForward(module, inner), replacements, *args, **kwargs)


@pytest.mark.parametrize("directly", [False, True])
@pytest.mark.parametrize("name", ["joint", "fused"])
def test_a_hooked_block_runs_narrow_and_call_narrow_enters_the_hook_once(name: str, directly: bool) -> None:
    case = make(name)
    order = case.order()
    expected = masked(case, kept_of(case, order, 0.5))
    hook = Counting(case.narrow(order), directly)
    HookRegistry.check_if_exists_or_initialize(case.block).register_hook(hook, "narrow")
    x, text, time = case.inputs
    found = case.block(x, encoder_hidden_states=text, temb=time)
    torch.testing.assert_close(flat(found), expected, rtol=0, atol=1e-12)
    assert hook.entered == (2 if directly else 1)
    assert all(type(p) is nn.Parameter for p in case.block.parameters())


def test_weights_are_put_back_when_the_block_fails() -> None:
    case = make("joint")
    before = dict(case.block.named_parameters())

    def fail(*args: Tensor) -> None:
        assert case.block.ff.net[2].weight.shape == (D, 32)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        call_narrow(OwnForward(case.block, fail), case.narrow(case.order()).replacements(3, 0.5), *case.inputs)
    assert all(parameter is before[name] for name, parameter in case.block.named_parameters())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["joint", "fused", "swiglu", "separate"])
def test_gradients_are_those_of_the_masked_block(name: str, trained: bool) -> None:
    case = make(name)
    order = case.order()
    narrow = case.narrow(order)
    with torch.inference_mode():
        narrowed(case, narrow, 0.5)  # copies made here must serve autograd below
    held = narrow.memory()
    case.block.requires_grad_(trained)
    case.inputs[0].requires_grad_()
    wanted = [case.inputs[0], *(p for p in case.block.parameters() if trained)]
    weights = torch.randn(1, dtype=torch.float64)
    expected = torch.autograd.grad((masked(case, kept_of(case, order, 0.5)) * weights).square().sum(), wanted)
    found = torch.autograd.grad((narrowed(case, narrow, 0.5) * weights).square().sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert narrow.memory() == held  # what is gathered for training is not kept


@pytest.mark.parametrize("name", CASES)
def test_bf16_weights_stay_bf16(name: str) -> None:
    case = make(name, torch.bfloat16)
    order = case.order()
    narrow = case.narrow(order)
    assert {part.dtype for part in narrow.replacements(3, 0.5).values()} == {torch.bfloat16}
    with torch.no_grad():
        torch.testing.assert_close(
            narrowed(case, narrow, 0.5), masked(case, kept_of(case, order, 0.5)), rtol=2e-2, atol=2e-2
        )


def test_a_compiled_block_runs_narrow_and_notices_new_weights() -> None:
    case = make("joint")
    order = case.order()
    narrow = case.narrow(order)
    run = torch.compile(lambda: narrowed(case, narrow, 0.5), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(run(), masked(case, kept_of(case, order, 0.5)), rtol=0, atol=1e-12)
        in_place(case)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(H - 1), "block 3.*40 hidden channels"),
        (torch.zeros(H, dtype=torch.int64), "no permutation"),
        (torch.arange(H).float(), "float32"),
        (torch.arange(H)[None], r"\(1, 40\)"),
    ],
)
def test_an_order_that_is_no_permutation_is_refused(order: Tensor, message: str) -> None:
    with pytest.raises(sl.AdapterError, match=message):
        make("gelu").narrow({3: order})


def test_an_order_of_a_block_that_is_not_routed_is_refused() -> None:
    with pytest.raises(sl.AdapterError, match=r"block 9, but only \[3\]"):
        make("gelu").narrow({9: torch.arange(H)})


def test_a_width_that_was_not_prepared_is_refused() -> None:
    narrow = make("gelu").narrow()
    with pytest.raises(sl.ShivelightError, match=r"0\.6 is none of the widths \(0\.25, 0\.5, 0\.75, 1\.0\)"):
        narrow.replacements(3, 0.6)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (Mlp(up=("net.9.proj",), down="net.2"), "FeedForward has no layer 'net.9.proj'"),
        (Mlp(up=("net.0",), down="net.2"), "'net.0' of FeedForward is a GELU"),
        (Mlp(up=("net.0.proj",), down="net.2", halves=3), "does not fit.*in 3 parts"),
        (Mlp(up=("net.2", "net.0.proj"), down="net.2"), "does not fit"),
        (Mlp(up=(), down="net.2"), "does not fit"),
        (Mlp(up=("net.0.proj",), down="net.0.proj"), "cannot be the last of the 16 inputs"),
    ],
)
def test_a_spec_that_does_not_fit_the_block_is_refused(mlp: Mlp, message: str) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match=message):
        NarrowMlps({3: make("gelu").block}, {3: mlp})
