"""What the import of an E-DiT checkpoint writes: every bit of it, resumed, checked, and one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import shivelight as sl
from shivelight.importers import Checkpoint, ElasticDiTImport, elastic_dit, streaming

SHARD = 400_000
PARTS = {"modulation": "img_mod.1", "trunk": "out.0", "gate_head": "out.2", "width_head": "width_head"}


def bring(path: Path, out: Path, shard_bytes: int = SHARD) -> ElasticDiTImport:
    plan = ElasticDiTImport(Checkpoint(path), out, shard_bytes)
    plan.write().verify()
    return plan


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> Iterator[list[str]]:
    """Names of the tensors that are read from the checkpoint; Ctrl-C at one of them."""
    names: list[str] = []
    read = Checkpoint.read

    def noting(self: Checkpoint, name: str) -> Tensor:
        if len(names) == stop_at:
            raise KeyboardInterrupt
        names.append(name)
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", noting)
        yield names


def test_every_bit_arrives_under_the_names_that_diffusers_and_the_adapter_have(
    checkpoint: Path, tmp_path: Path
) -> None:
    plan, released = bring(checkpoint, tmp_path / "out"), load_file(checkpoint)
    backbone = {name: tensor for name, tensor in released.items() if not name.startswith("gate_mlps.")}
    shards = sorted((tmp_path / "out/transformer").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in backbone.values())
    found: dict[str, Tensor] = {}
    for path in shards:
        held = load_file(path)
        assert {index["weight_map"][name] for name in held} == {path.name} and not held.keys() & found.keys()
        assert sum(t.numel() * t.element_size() for t in held.values()) <= SHARD
        found |= held
    assert found.keys() == backbone.keys() == index["weight_map"].keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in backbone.items())
    assert plan.parameters == sum(t.numel() for t in backbone.values())

    model, info = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out/transformer", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[n], t.float()) for n, t in backbone.items())
    assert (model.config.num_layers, model.config.num_attention_heads, model.config.attention_head_dim) == (3, 2, 32)
    assert list(model.config.axes_dims_rope) == [4, 14, 14] and model.config.out_channels == 4

    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    for block in range(3):
        for ours, theirs in PARTS.items():
            for kind in ("weight", "bias"):
                stored = adapter[f"gates.router.routers.{block}.{ours}.{kind}"]
                assert stored.dtype == torch.bfloat16
                assert torch.equal(stored, released[f"gate_mlps.{block}.{theirs}.{kind}"])
        assert torch.equal(adapter[f"gates.order_{block}"], torch.arange(256))
    config = sl.load_adapter(model, tmp_path / "out/adapter").shivelight.config
    assert config.tokens is None and config.deltas is None and config.activation == "quick-gelu"
    blocks, reuse = config.blocks, config.reuse
    assert (blocks.router, blocks.threshold, blocks.widths) == ("elastic-dit", 0.5, (0.25, 0.5, 0.75, 1.0))
    assert (blocks.cfg_gates, blocks.decide) == ("each", "block")
    assert (reuse.margin, reuse.max_reuses, reuse.blocks_after) == (0.015, 10, 0.5)
    stored = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert stored["spec"] == "qwen-image" and stored["routed_blocks"] == [0, 1, 2]
    assert stored["training"]["imported"]["checkpoint"] == "elastic.safetensors"


def test_the_published_shapes_give_the_published_config() -> None:
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=2)
    entries = {n: streaming.Entry("BF16", tuple(t.shape)) for n, t in model.state_dict().items()}
    config = elastic_dit.backbone_config(entries, Path("file"))
    wanted = {**model.config, "num_layers": 2, "axes_dims_rope": [16, 56, 56]}
    assert config == {name: wanted[name] for name in config}


def test_one_small_file_needs_no_index_and_biases_may_be_missing(
    make_tensors: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(make_tensors(biases=False), tmp_path / "plain.safetensors")
    bring(tmp_path / "plain.safetensors", tmp_path / "out", 10**9)
    assert sorted(path.name for path in (tmp_path / "out/transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    model = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out/transformer")
    routers = sl.load_adapter(model, tmp_path / "out/adapter").shivelight.gates.router.state_dict()
    assert not any(routers[f"routers.1.{part}.bias"].any() for part in ("trunk", "gate_head", "width_head"))
    assert routers["routers.1.modulation.bias"].any() and routers["routers.1.trunk.weight"].any()


def test_never_more_than_two_tensors_are_in_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    most, read = 0, Checkpoint.read

    def counting(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        most = max(most, sum(storage.nbytes() for ref in alive if (storage := ref()) is not None))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    plan = bring(checkpoint, tmp_path / "out")
    largest = max(entry.bytes for entry in Checkpoint(checkpoint).entries.values())
    assert largest <= most <= 2 * largest < 0.2 * SHARD * len(plan.files)
    assert len(alive) == len(Checkpoint(checkpoint).entries)


def test_an_interrupted_import_goes_on_with_the_files_that_are_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bring(checkpoint, tmp_path / "straight")
    first, second, third, adapter = plan.files
    out = tmp_path / "out"
    for stop, whole in [(len(plan.files[first]) + 3, {first}), (len(plan.files[second]) + 2, {first, second})]:
        with reads(monkeypatch, stop) as names, pytest.raises(KeyboardInterrupt):
            bring(checkpoint, out)
        assert listing(out).keys() == whole | {"import.json"}, "no half file, no index, no config"
        assert json.loads((out / "import.json").read_text())["files"].keys() == whole
    with pytest.raises(OSError):
        QwenImageTransformer2DModel.from_pretrained(out / "transformer")
    with reads(monkeypatch) as names:
        bring(checkpoint, out)
    assert set(names) == {*plan.files[third], *(n for n in Checkpoint(checkpoint).entries if "gate_mlps" in n)}
    assert listing(out) == listing(tmp_path / "straight")
    with reads(monkeypatch) as names:
        bring(checkpoint, out)
    assert not names, "a finished import is only verified"
    assert listing(out) == listing(tmp_path / "straight")


def test_a_damaged_file_is_written_anew_and_no_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    plan = bring(checkpoint, out)
    before, second = listing(out), list(plan.files)[1]
    data = bytearray(before[second])
    data[-1000] ^= 1
    (out / second).write_bytes(data)
    with pytest.raises(sl.AdapterError, match="does not hold what was written"):
        streaming.ResumableFolder(
            out, {k: v for k, v in json.loads(before["import.json"]).items() if k != "files"}
        ).verify()
    with reads(monkeypatch) as names:
        bring(checkpoint, out)
    assert set(names) == set(plan.files[second]) and listing(out) == before
    (out / "adapter/adapter_config.json").write_text("{}")
    bring(checkpoint, out)
    assert listing(out) == before


def test_a_disk_that_holds_something_else_than_was_written_is_noticed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = elastic_dit.write_tensors

    def failing(path: Path, **options: Any) -> str:
        digest = write(path, **options)
        data = bytearray(path.read_bytes())
        data[-5] ^= 64
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(elastic_dit, "write_tensors", failing)
    with pytest.raises(sl.AdapterError, match="00001-of-00003.safetensors does not hold what was written"):
        bring(checkpoint, tmp_path / "out")


def test_too_little_space_is_said_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, needed = tmp_path / "out", 0
    plan = bring(checkpoint, tmp_path / "straight")
    needed = sum(entry.bytes for entries in plan.files.values() for entry in entries.values())
    usage = shutil.disk_usage(tmp_path)
    for free, enough in [(needed - 1, False), (needed, True)]:
        monkeypatch.setattr(elastic_dit.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if enough:
            bring(checkpoint, out)
        else:
            with reads(monkeypatch) as names, pytest.raises(sl.AdapterError, match="GB free.*Free some space"):
                bring(checkpoint, out)
            assert not names and listing(out).keys() == {"import.json"}
    monkeypatch.setattr(elastic_dit.shutil, "disk_usage", lambda _: usage._replace(free=0))
    bring(checkpoint, out)  # all there: none is needed


def test_another_checkpoint_or_another_layout_of_files_is_refused_in_the_same_folder(
    checkpoint: Path, make_tensors: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    bring(checkpoint, tmp_path / "out")
    before = listing(tmp_path / "out")
    with pytest.raises(sl.AdapterError, match="its shard_bytes is 400000, now 500000"):
        bring(checkpoint, tmp_path / "out", 500_000)
    other = {name: tensor for name, tensor in load_file(checkpoint).items()}
    other["proj_out.bias"][0] += 1
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(sl.AdapterError, match="another import: its checkpoint_fingerprint"):
        bring(tmp_path / "other.safetensors", tmp_path / "out")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.png").write_bytes(b"")
    with pytest.raises(sl.AdapterError, match=r"holds 'photo.png' and no import.json"):
        bring(checkpoint, tmp_path / "holiday")
    assert listing(tmp_path / "out") == before


def without(*starts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def with_(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: change(tensors.get(name, torch.zeros(3))).contiguous()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("transformer_blocks.1.attn.to_q.w"), r"lacks 'transformer_blocks.1.attn.to_q.weight' \(1 tensors missing"),
        (without("gate_mlps.1.out.0.bias"), r"lacks 'gate_mlps.1.out.0.bias'"),
        (without("gate_mlps.0.out.0"), r"lacks 'gate_mlps.0.out.0.weight' \(2 tensors missing"),
        (without("gate_mlps.2."), r"lacks 'gate_mlps.2.out.0.weight' \(8 tensors missing"),
        (without("transformer_blocks.2."), r"unknown 'gate_mlps.2"),
        (with_("time_text_embed.more", torch.clone), "unknown 'time_text_embed.more'"),
        (without("gate_mlps."), "no routers.*load them with diffusers"),
        (without("img_in."), "has no 'img_in.weight'.*no E-DiT checkpoint"),
        (with_("img_in.weight", torch.flatten), r"has shape \(1024,\) for 'img_in.weight'"),
        (with_("transformer_blocks.0.attn.norm_q.weight", lambda t: t[:24]), "fit no Qwen-Image transformer"),
        (with_("gate_mlps.2.out.0.weight", lambda t: t[:, :-1]), r"'gate_mlps.2.out.0.weight' .* shape \(128, 63\)"),
        (with_("gate_mlps.1.width_head.weight", lambda t: t[:3]), r"'gate_mlps.1.width_head.weight' .* shape \(3, 128\)"),
        (with_("txt_in.bias", lambda t: t[1:]), r"'txt_in.bias' .* shape \(63,\)"),
        (with_("txt_in.bias", lambda t: t.to(torch.int64)), "'txt_in.bias' .* type I64"),
        (with_("txt_in.weight", lambda t: t.to(torch.float8_e4m3fn)), "'txt_in.weight' .* type F8_E4M3"),
    ],
)  # fmt: skip
def test_another_layout_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    save_file(change(load_file(checkpoint)), tmp_path / "odd.safetensors")
    with pytest.raises(sl.AdapterError, match=said):
        ElasticDiTImport(Checkpoint(tmp_path / "odd.safetensors"), tmp_path / "out", SHARD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformer_blocks.1.attn.to_q.weight", "gate_mlps.1.out.0.bias"])
def test_what_is_not_finite_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(checkpoint)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(sl.AdapterError, match=f"'{name}' in .*NaN.*Download it again"):
        bring(tmp_path / "broken.safetensors", tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*part*")]
