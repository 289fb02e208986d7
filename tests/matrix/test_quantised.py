"""Quantised weights: torchao's int8 and GGUF files, with blocks, widths and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, decided, free, gated, kept, widths_of
from torch import Tensor, nn

import shivelight as sl
from shivelight.backbones import find_spec
from shivelight.execution.folding import Delta


def int8(pipe: Any, folder: Path) -> None:
    """torchao's weight-only int8 of every linear in the blocks."""
    quantization = pytest.importorskip("torchao.quantization")
    for _, block in find_spec(pipe.transformer).block_list(pipe.transformer):
        quantization.quantize_(block, quantization.Int8WeightOnlyConfig())


def gguf_file(pipe: Any, folder: Path) -> None:
    """A file as llama.cpp's tools write it, read back by diffusers."""
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    model = pipe.transformer
    if type(model).__name__ not in SINGLE_FILE_LOADABLE_CLASSES:
        pytest.skip(f"diffusers reads no GGUF files of {type(model).__name__}")
    linears = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear) and "blocks" in name
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", "tiny")
    for name, tensor in model.state_dict().items():
        quantised = name in linears and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    model.save_config(folder)
    loaded = type(model).from_single_file(
        str(folder / "model.gguf"), config=str(folder), dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    assert any(type(part).__name__ == "GGUFLinear" for part in loaded.modules())
    pipe.register_modules(transformer=loaded.requires_grad_(False).eval())


def pictures(pipe: Any, name: str) -> Tensor:
    return FAMILIES[name](pipe, 0, steps=4)


@pytest.mark.parametrize("quantise", [int8, gguf_file])
def test_quantised_weights_are_routed(name: str, quantise: Any, tmp_path: Path) -> None:
    pipe = build(name)
    whole = pictures(pipe, name)
    quantise(pipe, tmp_path)
    dense = pictures(pipe, name)
    assert torch.isfinite(dense).all() and not torch.equal(dense, whole)
    ways = [free, lambda pipe: gated(pipe, widths=(1.0,))] + ([kept] if name in TOKENS else [])
    for attach in ways:
        attach(pipe)
        routed = pictures(pipe, name)
        assert torch.isfinite(routed).all() and not torch.equal(routed, dense)
        assert torch.equal(pictures(pipe, name), routed)
        with sl.dense(pipe):
            assert torch.equal(pictures(pipe, name), dense)
    sl.detach(pipe)
    assert torch.equal(pictures(pipe, name), dense)


@pytest.mark.parametrize("quantise", [int8, gguf_file])
def test_quantised_mlps_run_whole(name: str, quantise: Any, tmp_path: Path) -> None:
    if widths_of(name) == (1.0,):
        return  # refused, which a test of its own shows
    pipe = build(name)
    quantise(pipe, tmp_path)
    routed = gated(pipe, widths=(0.25, 0.5, 1.0), seed=3)
    seen = decided(routed)
    first = pictures(pipe, name)
    assert {parts.width for _, _, samples in seen for parts in samples if parts.action == "run"} == {1.0}
    for block in routed.routed:
        assert "quantised" in (reason := routed.gates.narrow.can_narrow(block)) or "not a plain" in reason
    assert torch.equal(pictures(pipe, name), first)


@pytest.mark.parametrize("quantise", [int8, gguf_file])
def test_deltas_of_quantised_weights_are_refused(name: str, quantise: Any, tmp_path: Path) -> None:
    pipe = build(name)
    quantise(pipe, tmp_path)
    model = pipe.transformer
    dense = pictures(pipe, name)
    sl.attach(pipe, sl.RoutingConfig(None, deltas=sl.DeltaConfig(rank=2)))
    linear = next(
        name for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "blocks" in name and type(getattr(part, "weight", None)) is not nn.Parameter
        or type(part).__name__ == "GGUFLinear" and "blocks" in name
    )  # fmt: skip
    part = model.get_submodule(linear)
    delta = Delta(torch.randn(2, part.in_features), torch.randn(part.out_features, 2), torch.ones(part.out_features))
    with pytest.raises(sl.AdapterError, match="quantis"):
        model.shivelight.set_deltas(model, {linear: delta})
    sl.detach(pipe)
    assert torch.equal(pictures(pipe, name), dense)
