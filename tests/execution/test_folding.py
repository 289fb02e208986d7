import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import shivelight as sl
from shivelight.backbones import sd3
from shivelight.execution.folding import Delta, FoldedWeights, base_linear


class QuantisedTensor(torch.Tensor):
    """As torchao stores weights: a subclass that says it is floating point."""


def random_delta(linear: nn.Linear, rank: int = 2, seed: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(
        down=torch.randn(rank, linear.in_features, generator=generator),
        up=torch.randn(linear.out_features, rank, generator=generator),
        magnitude=torch.rand(linear.out_features, generator=generator) + 0.5,
    )


def two_linears(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(dtype)


def test_folded_weights_are_pefts_own_dora_merge(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer
    names = [name for name, _ in model.named_modules() if re.fullmatch(sd3.SPEC.delta_targets, name)]
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    # The spec's pattern finds every attention and MLP linear: 6 + 2 a joint attention, 4 a dual one, 2 an MLP.
    assert len(names) == 3 * 8 + 7 + 2 * 4 + 4 * 2 + 3 * 2 and not [n for n in names if "norm" in n]
    config = LoraConfig(
        r=3, lora_alpha=5.0, target_modules=sd3.SPEC.delta_targets, use_dora=True, init_lora_weights=True
    )
    inject_adapter_in_model(config, model, adapter_name="theirs")
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for name in names:
        layer = model.get_submodule(name)
        up, magnitude = layer.lora_B["theirs"].weight, layer.lora_magnitude_vector["theirs"].weight
        with torch.no_grad():
            up.copy_(torch.randn(up.shape, generator=generator))
            magnitude.mul_(1 + 0.3 * torch.rand(magnitude.shape, generator=generator))
        deltas[name] = Delta(
            layer.lora_A["theirs"].weight.detach().clone(), up.detach().clone(), magnitude.detach().clone()
        )

    folded = FoldedWeights(model, deltas, scale=5.0 / 3)
    folded.apply(True)
    ours = {name: model.get_submodule(name).base_layer.weight.detach().clone() for name in names}
    folded.apply(False)
    for name in names:
        layer = model.get_submodule(name)
        assert torch.equal(layer.base_layer.weight, before[name])
        layer.merge(safe_merge=True)
        torch.testing.assert_close(ours[name], layer.base_layer.weight, rtol=1e-5, atol=1e-6)
        assert (ours[name] - before[name]).abs().max() > 0.01


def test_a_fresh_delta_changes_nothing_but_rounding() -> None:
    linear = nn.Linear(6, 4)
    delta = Delta(torch.randn(2, 6), torch.zeros(4, 2), linear.weight.detach().norm(dim=1))
    torch.testing.assert_close(delta.fold(linear.weight.data, 3.0), linear.weight.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swapping_is_exact_any_number_of_times(dtype: torch.dtype) -> None:
    model = two_linears(dtype)
    before = [layer.weight.detach().clone() for layer in model]
    delta = random_delta(model[0])
    folded = FoldedWeights(model, {"0": delta}, 0.5)
    assert torch.equal(model[0].weight, before[0])  # nothing is swapped before it is asked for
    for _ in range(3):
        folded.apply(True)
        folded.apply(True)
        assert model[0].weight.dtype == dtype and torch.equal(model[0].weight, delta.fold(before[0], 0.5))
        assert torch.equal(folded.originals()["0"], before[0])
        folded.apply(False)
        folded.apply(False)
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, before, strict=True))
        assert torch.equal(folded.originals()["0"], before[0])
    assert torch.equal(model[1].weight, before[1])


def test_folding_in_bf16_rounds_once() -> None:
    weight = torch.randn(4, 6).bfloat16()
    delta = random_delta(nn.Linear(6, 4))
    assert torch.equal(delta.fold(weight, 0.5), delta.fold(weight.float(), 0.5).bfloat16())


def test_a_model_cast_while_folded_gives_its_originals_in_the_new_dtype() -> None:
    model = two_linears()
    before = model[0].weight.detach().clone()
    folded = FoldedWeights(model, {"0": random_delta(model[0])}, 0.5)
    folded.apply(True)
    model.bfloat16()
    assert torch.equal(folded.originals()["0"], before.bfloat16())
    folded.apply(False)
    assert torch.equal(model[0].weight, before.bfloat16())


@pytest.mark.parametrize(
    ("part", "shape"),
    [("down", (2, 5)), ("up", (3, 2)), ("up", (4, 3)), ("magnitude", (1,)), ("magnitude", (4, 1)), ("down", (6,))],
)
def test_a_delta_of_another_shape_is_refused_by_name(part: str, shape: tuple[int, ...]) -> None:
    model = two_linears()
    delta = random_delta(model[0])
    setattr(delta, part, torch.ones(shape))
    with pytest.raises(sl.AdapterError, match="'0'.*4 x 6"):
        FoldedWeights(model, {"1": random_delta(model[1]), "0": delta}, 1.0)


def test_a_layer_that_cannot_be_folded_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(sl.AdapterError, match="no layer '7'"):
        base_linear(model, "7")
    with pytest.raises(sl.AdapterError, match="'1' is a LayerNorm"):
        base_linear(model, "1")
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(sl.AdapterError, match="before quantising"):
        base_linear(model, "0")
    model[0].weight = nn.Parameter(torch.zeros(4, 4).as_subclass(QuantisedTensor))
    with pytest.raises(sl.AdapterError, match="QuantisedTensor.*before quantising"):
        base_linear(model, "0")


def test_an_offloaded_weight_is_refused_with_what_to_do() -> None:
    model = two_linears()
    folded = FoldedWeights(model, {"0": random_delta(model[0])}, 0.5)
    model[0].to("meta")
    with pytest.raises(sl.ShivelightError, match="before enable_sequential_cpu_offload"):
        folded.apply(True)


def test_weights_that_come_back_from_copies_are_not_swapped(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    model, cpu = pipe.transformer, torch.device("cpu")
    name = "transformer_blocks.0.attn.to_q"
    folded = FoldedWeights(model, {name: random_delta(model.get_submodule(name))}, scale=1.0)
    folded.apply(True)
    blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(model, cpu, **blocks, offload_to_disk_path=str(tmp_path))
    folded.apply(True)  # nothing to do
    with pytest.raises(sl.ShivelightError, match="in groups through a stream or to disk"):
        folded.apply(False)
    module = model.transformer_blocks[0]
    config = module._diffusers_hook.get_hook("group_offloading").config
    config.offload_to_disk_path = None
    folded.apply(False)
    config.stream = object()  # as on a GPU
    with pytest.raises(sl.ShivelightError, match="in groups through a stream or to disk"):
        folded.apply(True)
