"""What people do to a pipeline before they serve it: offloading, casting layer by layer, copies."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from families import FAMILIES, build
from matrix_help import TOKENS, gated, kept, widths_of
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of

CPU = torch.device("cpu")
# The files of a group are read at each use and its weights dropped, so that what reads them too early finds nothing.
WAYS: dict[str, Callable[[Any, Path], object]] = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "blocks": lambda pipe, folder: apply_group_offloading(
        pipe.transformer, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "leaves": lambda pipe, folder: apply_group_offloading(
        pipe.transformer, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


def learned(pipe: Any, name: str) -> Any:
    """Tokens where the family has them, else blocks, by routers that read their input."""
    return kept(pipe) if name in TOKENS else gated(pipe, widths=widths_of(name))


def whole_gates(pipe: Any, name: str) -> Any:
    """Blocks at full width, which layers under hooks of their own keep anyway."""
    return gated(pipe, widths=(1.0,))


def pictures(pipe: Any, name: str) -> Tensor:
    return FAMILIES[name](pipe, 0, steps=3)


@functools.cache
def expected_of(name: str) -> tuple[Tensor, Tensor]:
    """Pictures without offloading, dense and routed."""
    pipe = build(name)
    dense = pictures(pipe, name)
    whole_gates(pipe, name)
    return dense, pictures(pipe, name)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_offloading_changes_nothing_whichever_comes_first(name: str, way: str, order: str, tmp_path: Path) -> None:
    if name == "dit" and way == "blocks":
        pytest.skip(
            "DiTTransformer2DModel reads an embedding of its first block before that block is brought to its device"
        )
    dense, expected = expected_of(name)
    assert not torch.equal(expected, dense)
    pipe = build(name)
    steps = [lambda: whole_gates(pipe, name), lambda: WAYS[way](pipe, tmp_path)]
    for step in steps if order == "before" else reversed(steps):
        step()
    if way == "leaves" and order == "before":
        with pytest.raises(
            sl.UnsupportedBackboneError, match="routers are offloaded layer by layer.*Offload the backbone first"
        ):
            pictures(pipe, name)
        sl.detach(pipe)
        assert torch.equal(pictures(pipe, name), dense)
        return
    for _ in range(3 if way == "model" else 1):  # the pipeline takes its hooks off and puts them on after each picture
        assert torch.equal(pictures(pipe, name), expected)
    with sl.dense(pipe):
        assert torch.equal(pictures(pipe, name), dense)
    routed = routed_of(pipe)
    sl.detach(pipe)
    offloading = "_hf_hook" if way == "model" else "_diffusers_hook"
    assert [part for part in pipe.transformer.modules() if offloading in part.__dict__]
    routed.begin = None  # nothing of ours may run any more
    for _ in range(2):
        assert torch.equal(pictures(pipe, name), dense)


@pytest.mark.parametrize("name", TOKENS)
def test_offloading_changes_no_tokens(name: str, tmp_path: Path) -> None:
    plain = build(name)
    kept(plain)
    expected = pictures(plain, name)
    for way in WAYS:
        if name == "dit" and way == "blocks":
            continue  # see above
        pipe = build(name)
        WAYS[way](pipe, tmp_path / way)
        kept(pipe)
        for _ in range(2):
            assert torch.equal(pictures(pipe, name), expected)


def test_widths_under_offloading_run_whole_and_are_counted_so(tmp_path: Path) -> None:
    spent = []
    for way in (None, *WAYS):
        pipe = build("sd3")
        if way is not None:
            WAYS[way](pipe, tmp_path / way)
        routed = gated(pipe, widths=(0.25, 0.5, 1.0))
        one, two = pictures(pipe, "sd3"), pictures(pipe, "sd3")
        assert torch.equal(one, two)
        spent.append(routed.spending.ratio)
        narrow = routed.gates.narrow
        reasons = {narrow.can_narrow(block) for block in routed.routed}
        assert (reasons == {None}) == (way in (None, "model"))
    assert spent[0] == spent[1] < spent[2] == spent[3] < 1


def test_routers_live_where_groups_are_brought_to() -> None:
    pipe = build("sd3")
    apply_group_offloading(pipe.transformer, CPU, CPU, "block_level", 1)
    for module in pipe.transformer.modules():
        if (registry := module.__dict__.get("_diffusers_hook")) is not None:
            registry.get_hook("group_offloading").config.onload_device = torch.device("meta")  # stands for a GPU
    sl.attach(pipe)
    assert {p.device.type for p in routed_of(pipe).parameters()} == {"meta"}
    assert {p.device.type for p in pipe.transformer.transformer_blocks.parameters()} == {"cpu"}


@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_stored_in_eight_bits_are_routed(name: str, order: str) -> None:
    def cast(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    pipe = build(name)
    whole, never = pictures(pipe, name), pipe.transformer._skip_layerwise_casting_patterns
    for step in (lambda: learned(pipe, name), lambda: cast(pipe))[:: 1 if order == "before" else -1]:
        step()
    assert {p.dtype for p in routed_of(pipe).parameters()} <= {torch.float32}
    assert torch.float8_e4m3fn in {p.dtype for p in pipe.transformer.parameters()}
    routed = pictures(pipe, name)
    assert torch.isfinite(routed).all() and torch.equal(pictures(pipe, name), routed)
    with sl.dense(pipe):
        dense = pictures(pipe, name)
    assert not torch.equal(dense, whole) and not torch.equal(dense, routed)
    sl.detach(pipe)
    assert torch.equal(pictures(pipe, name), dense)
    assert pipe.transformer._skip_layerwise_casting_patterns == never


def test_a_copy_is_refused_while_routed_and_right_after(name: str) -> None:
    pipe = build(name)
    learned(pipe, name)
    expected = pictures(pipe, name)
    for thing in (pipe, pipe.transformer):
        with pytest.raises(sl.ShivelightError, match="cannot be deep-copied.*detach"):
            copy.deepcopy(thing)
    assert torch.equal(pictures(pipe, name), expected)
    sl.detach(pipe)
    twin = copy.deepcopy(pipe.transformer)
    learned(pipe, name)
    dense_twin = build(name)
    dense = pictures(dense_twin, name)
    dense_twin.register_modules(transformer=twin)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():  # what the original becomes is none of the copy's business
            parameter.zero_()
    assert torch.equal(pictures(dense_twin, name), dense)
    learned(dense_twin, name)
    assert torch.equal(pictures(dense_twin, name), expected)
