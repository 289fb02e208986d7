"""A tiny random checkpoint, laid out as E-DiT's released one (methods/elastic-dit.md): 3 blocks of width 64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

TINY = {
    "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24, "in_channels": 16,
    "out_channels": 4, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
WIDTH = 64


def tiny_tensors(biases: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: tensor.clone() for name, tensor in QwenImageTransformer2DModel(**TINY).state_dict().items()}
    # Far enough from linear that one activation differs from another, and timesteps from each other.
    for name in tensors:
        if name.endswith(("img_mlp.net.0.proj.weight", "timestep_embedder.linear_2.weight", "img_mod.1.weight")):
            tensors[name] *= 4.0
    sizes = {"img_mod.1": (3 * WIDTH, WIDTH), "out.0": (128, WIDTH), "out.2": (1, 128), "width_head": (4, 128)}
    for block in range(TINY["num_layers"]):
        for part, (rows, columns) in sizes.items():
            tensors[f"gate_mlps.{block}.{part}.weight"] = torch.randn(rows, columns) * 2.0 * columns**-0.5
            if biases or part == "img_mod.1":
                tensors[f"gate_mlps.{block}.{part}.bias"] = torch.randn(rows) * 0.3
    return tensors


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    """Tensors in fp32, by the names of the released file; this module's own."""
    return tiny_tensors()


@pytest.fixture
def make_tensors() -> Callable[..., dict[str, Tensor]]:
    """The same, with or without the biases that the description leaves open."""
    return tiny_tensors


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in bf16, as the released one, and one tensor in fp32."""
    path = tmp_path_factory.mktemp("released") / "elastic.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_tensors().items()}
    save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"].float()}, path)
    return path
