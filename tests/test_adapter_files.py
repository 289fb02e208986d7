import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

import shivelight as sl
from shivelight.adapter_files import CONFIG_NAME, WEIGHTS_NAME, model_card, read_deltas
from shivelight.execution.folding import Delta

Sample = Callable[..., Tensor]
PROMPTS = ["a red apple", "an owl"]
TUNED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.ff.net.2")


def trained(pipe: StableDiffusion3Pipeline, seed: int = 3, keep: float = 0.5) -> StableDiffusion3Pipeline:
    """Attached as training leaves it: random routers, an uneven policy, deltas."""
    torch.manual_seed(seed)
    sl.attach(pipe, sl.RoutingConfig(deltas=sl.DeltaConfig(rank=2)))
    model = pipe.transformer
    deltas = {}
    for name in TUNED:
        weight = model.get_submodule(name).weight
        deltas[name] = Delta(
            torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), weight.detach().norm(dim=1) * 2
        )
    model.shivelight.set_deltas(model, deltas)
    with torch.no_grad():
        model.shivelight.policy.time_out.normal_(std=0.3)
    return sl.set_budget(pipe, keep=keep)


@pytest.fixture
def folder(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> Path:
    """A good adapter's folder; the pipeline is dense again."""
    directory = sl.save_adapter(trained(pipe), tmp_path / "adapter")
    sl.detach(pipe)
    return directory


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = json.loads((folder / CONFIG_NAME).read_text())
    change(stored)
    (folder / CONFIG_NAME).write_text(json.dumps(stored))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# saving and loading


def test_what_is_saved_is_what_is_loaded(
    pipe: StableDiffusion3Pipeline, sample: Sample, tiny_folder: Path, tmp_path: Path
) -> None:
    dense = sample(pipe, PROMPTS)
    trained(pipe)
    expected, table = sample(pipe, PROMPTS), sl.current_schedule(pipe, 25)
    directory = sl.save_adapter(pipe, tmp_path / "new" / "folder", training={"command": "shivelight train", "steps": 5})
    assert directory == tmp_path / "new" / "folder"
    assert set(listing(directory)) == {CONFIG_NAME, WEIGHTS_NAME}
    other = StableDiffusion3Pipeline.from_pretrained(tiny_folder, text_encoder_3=None, tokenizer_3=None)
    other.set_progress_bar_config(disable=True)
    assert sl.load_adapter(other, directory) is other
    assert torch.equal(sample(other, PROMPTS, steps=2), sample(other, PROMPTS, steps=2))
    assert other.transformer.shivelight.budget.everything
    sl.set_budget(other, keep=0.5)
    assert sl.current_schedule(other, 25) == table and torch.equal(sample(other, PROMPTS), expected)
    with sl.dense(other):
        assert torch.equal(sample(other, PROMPTS), dense)
    stored = json.loads((directory / CONFIG_NAME).read_text())
    assert stored["training"] == {"command": "shivelight train", "steps": 5}
    assert stored["base_model_class"] == "SD3Transformer2DModel" and stored["routed_blocks"] == [1, 2, 3]


def test_the_file_is_laid_out_as_peft_does_and_holds_no_copy_of_the_backbone(folder: Path) -> None:
    names = set(load_file(folder / WEIGHTS_NAME))
    assert {
        f"deltas.{name}.{part}.weight" for name in TUNED for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    } <= names
    assert all(name.startswith(("router.", "policy.", "deltas.")) for name in names)


def test_saving_while_dense_or_after_lora_writes_the_same_file(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    trained(pipe)
    expected = listing(sl.save_adapter(pipe, tmp_path / "a"))
    with sl.dense(pipe):
        assert listing(sl.save_adapter(pipe, tmp_path / "b")) == expected
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert listing(sl.save_adapter(pipe, tmp_path / "a")) == expected


@pytest.mark.parametrize(
    "config",
    [
        sl.RoutingConfig(tokens=sl.TokenRouting(scores="norm", ratios="fixed")),
        sl.RoutingConfig(tokens=sl.TokenRouting(scores="random", seed=9), deltas=sl.DeltaConfig(rank=3)),
        sl.RoutingConfig(tokens=None, deltas=sl.DeltaConfig()),
        sl.RoutingConfig(tokens=sl.TokenRouting(bottleneck=8, share=3, policy_width=16)),
    ],
)
def test_every_kind_of_adapter_survives_the_disk(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, config: sl.RoutingConfig
) -> None:
    sl.save_adapter(sl.attach(pipe, config), tmp_path)
    state = pipe.transformer.shivelight.state_dict()
    sl.detach(pipe)
    loaded = sl.load_adapter(pipe, tmp_path).transformer.shivelight
    assert loaded.config == config
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)


def test_a_second_load_replaces_the_first(
    pipe: StableDiffusion3Pipeline, sample: Sample, folder: Path, tmp_path: Path
) -> None:
    second = sl.save_adapter(trained(pipe, seed=8), tmp_path / "second")
    sl.set_budget(sl.load_adapter(pipe, second), keep=0.5)
    expected = sample(pipe, PROMPTS)
    sl.set_budget(sl.load_adapter(pipe, folder), keep=0.5)
    assert not torch.allclose(sample(pipe, PROMPTS), expected, atol=1e-3)
    sl.set_budget(sl.load_adapter(pipe, second), keep=0.5)
    assert torch.equal(sample(pipe, PROMPTS), expected)


def test_deltas_are_read_without_attaching_and_from_the_backbones_own_weights(
    pipe: StableDiffusion3Pipeline, sample: Sample, folder: Path, tmp_path: Path
) -> None:
    dense = sample(pipe, PROMPTS)
    sl.load_adapter(pipe, folder)
    expected = sample(pipe, PROMPTS)
    while_attached = read_deltas(pipe, folder)
    sl.detach(pipe)
    for folded in (read_deltas(pipe, folder), while_attached):
        folded.apply(True)
        assert torch.equal(sample(pipe, PROMPTS), expected)
        folded.apply(False)
        assert torch.equal(sample(pipe, PROMPTS), dense)
    sl.save_adapter(sl.attach(pipe), tmp_path / "without")
    with pytest.raises(sl.AdapterError, match="without has no DoRA deltas"):
        read_deltas(pipe, tmp_path / "without")


def test_a_backbone_that_was_loaded_by_a_path_saves_its_name(
    pipe: StableDiffusion3Pipeline, tiny_folder: Path, tmp_path: Path
) -> None:
    transformer = type(pipe.transformer).from_pretrained(tiny_folder / "transformer")  # keeps the Path
    sl.attach(transformer)
    sl.save_adapter(transformer, tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored["base_model_name_or_path"] == str(tiny_folder / "transformer")


def test_the_model_card_names_the_base_and_the_way_to_load(folder: Path) -> None:
    card = model_card(json.loads((folder / CONFIG_NAME).read_text()), "| keep | PSNR |")
    assert "library_name: shivelight" in card and "sl.load_adapter" in card and "| keep | PSNR |" in card


# bad adapters: one clear error each, and the model as it was


def truncate(folder: Path, name: str, share: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])


def put_pickle(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps({"router": [1.0]}))


def put_torch_file(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_NAME), folder / "adapter_model.bin")
    (folder / WEIGHTS_NAME).unlink()


def put_lora(folder: Path) -> None:
    LoraConfig(r=2, target_modules=["to_q"]).save_pretrained(folder)


def first_to_nan(tensors: dict[str, Tensor], part: str) -> None:
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[0] = float("nan")


def reshape(tensors: dict[str, Tensor], part: str) -> None:
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name][..., :-1].contiguous()


def drop(tensors: dict[str, Tensor], part: str) -> None:
    del tensors[next(name for name in tensors if part in name)]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), f"has no {CONFIG_NAME}.*save_adapter"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
    "torch.save instead": (put_torch_file, "adapter_model.bin: pickles are never loaded"),
    "pickle under our name": (put_pickle, f"{WEIGHTS_NAME} is not a readable safetensors file"),
    "half of the weights": (lambda f: truncate(f, WEIGHTS_NAME, 0.5), "not a readable safetensors file.*Copy"),
    "all but a byte": (lambda f: truncate(f, WEIGHTS_NAME, 0.9999), "not a readable safetensors file"),
    "empty weights": (lambda f: truncate(f, WEIGHTS_NAME, 0), "not a readable safetensors file"),
    "half of the config": (lambda f: truncate(f, CONFIG_NAME, 0.5), "cannot be read as JSON"),
    "binary config": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list as config": (lambda f: (f / CONFIG_NAME).write_text("[]"), "not a Shivelight adapter"),
    "a LoRA's config": (put_lora, "'LORA'.*load_lora_weights"),
    "a newer version": (lambda f: change_config(f, lambda c: c.update(format_version=99)), "version 99.*update"),
    "no version": (lambda f: change_config(f, lambda c: c.pop("format_version")), "version None"),
    "a field of a newer version": (
        lambda f: change_config(f, lambda c: c["routing"]["tokens"].update(magic=1)), "no field magic.*newer",
    ),
    "a setting of a wrong type": (
        lambda f: change_config(f, lambda c: c["routing"]["tokens"].update(bottleneck="64")), "bottleneck is '64'",
    ),
    "nothing to attach": (lambda f: change_config(f, lambda c: c.update(routing={})), "nothing to attach"),
    "another family": (lambda f: change_config(f, lambda c: c.update(spec="flux")), "'flux' backbone.*'sd3'"),
    "another size": (
        lambda f: change_config(f, lambda c: c["base_model_shape"].update(num_layers=24)), r"num_layers 24 \(here 4\)",
    ),
    "a broken shape": (lambda f: change_config(f, lambda c: c.update(base_model_shape=[1])), "base_model_shape"),
    "another bottleneck": (
        lambda f: change_config(f, lambda c: c["routing"]["tokens"].update(bottleneck=32)), "has shape.*needs",
    ),
    "fewer routers": (
        lambda f: change_config(f, lambda c: c["routing"]["tokens"].update(share=1)), "lacks 'router.*missing",
    ),
    "deltas without settings": (
        lambda f: change_config(f, lambda c: c["routing"].update(deltas=None)), "holds DoRA deltas.*no delta settings",
    ),
    "a router tensor too few": (lambda f: change_weights(f, lambda t: drop(t, "from_time")), "lacks 'router"),
    "a tensor too many": (lambda f: change_weights(f, lambda t: t.update(x=torch.zeros(1))), "unknown 'x'"),
    "a router of another shape": (lambda f: change_weights(f, lambda t: reshape(t, "from_tokens")), "has shape"),
    "a router with NaN": (lambda f: change_weights(f, lambda t: first_to_nan(t, "router")), "NaN.*train it anew"),
    "a policy with NaN": (lambda f: change_weights(f, lambda t: first_to_nan(t, "policy.bias")), "'policy.bias'.*NaN"),
    "a delta with NaN": (lambda f: change_weights(f, lambda t: first_to_nan(t, "lora_B")), "delta.*NaN"),
    "a delta part too few": (lambda f: change_weights(f, lambda t: drop(t, "lora_magnitude")), "lacks 'deltas"),
    "a delta part too many": (
        lambda f: change_weights(f, lambda t: t.update({f"deltas.{TUNED[0]}.lora_C.weight": torch.zeros(2)})),
        "unknown 'deltas.*lora_C",
    ),
    "a delta of another shape": (lambda f: change_weights(f, lambda t: reshape(t, "lora_A")), "another backbone"),
    "a magnitude of another shape": (
        lambda f: change_weights(f, lambda t: reshape(t, "lora_magnitude")), "another backbone",
    ),
    "a delta of an unknown layer": (
        lambda f: change_weights(
            f, lambda t: [t.update({k.replace("blocks.2", "blocks.9"): t.pop(k)}) for k in list(t) if "deltas" in k]
        ),
        "no layer 'transformer_blocks.9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_and_the_model_stays_as_it_was(
    pipe: StableDiffusion3Pipeline, folder: Path, case: str
) -> None:
    spoil, said = BAD[case]
    spoil(folder)
    model = pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(sl.AdapterError, match=f"(?s){said}") as caught:
        sl.load_adapter(pipe, folder)
    assert str(folder) in str(caught.value) or "delta" in str(caught.value) or "." in str(caught.value)
    assert not hasattr(model, "shivelight")
    assert not [name for name, module in model.named_modules() if "_diffusers_hook" in module.__dict__]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "case", ["a router with NaN", "a delta of another shape", "fewer routers", "half of the weights"]
)
def test_a_bad_adapter_does_not_take_the_good_one_off(
    pipe: StableDiffusion3Pipeline, sample: Sample, folder: Path, case: str
) -> None:
    trained(pipe, seed=8)
    expected, routed = sample(pipe, PROMPTS), pipe.transformer.shivelight
    BAD[case][0](folder)
    with pytest.raises(sl.AdapterError):
        sl.load_adapter(pipe, folder)
    assert pipe.transformer.shivelight is routed and torch.equal(sample(pipe, PROMPTS), expected)
    with sl.dense(pipe), pytest.raises(sl.AdapterError):
        sl.load_adapter(pipe, folder)
    assert torch.equal(sample(pipe, PROMPTS), expected)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(pipe: StableDiffusion3Pipeline, source: str) -> None:
    with pytest.raises(sl.AdapterError, match=f"no adapter folder {source}; check the path"):
        sl.load_adapter(pipe, source)


def test_a_pickle_is_never_executed(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Touch()))
    with pytest.raises(sl.AdapterError):
        sl.load_adapter(pipe, folder)
    assert not (tmp_path / "executed").exists()


# a disk that is full, a folder that cannot be written


SAVE = """
import resource, signal, sys
import torch
from diffusers import SD3Transformer2DModel
import shivelight as sl
torch.manual_seed(0)
model = SD3Transformer2DModel.from_pretrained(sys.argv[1], subfolder="transformer")
sl.attach(model)
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        sl.save_adapter(model, sys.argv[2])
        print(limit, "saved")
    except sl.AdapterError as error:
        print(limit, error)
"""


def test_a_full_disk_is_one_clear_error_and_nothing_half_written(
    pipe: StableDiffusion3Pipeline, tiny_folder: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "adapter"
    size = (sl.save_adapter(sl.attach(pipe), tmp_path / "size") / WEIGHTS_NAME).stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    assert hard == resource.RLIM_INFINITY or hard > size
    limits = [0, 1, 4096, size - 1]  # from the first byte to the last one
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(tiny_folder), str(directory), *map(str, limits)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(limits), done.stderr
    for limit, line in zip(limits, lines, strict=True):
        assert line.startswith(f"{limit} The adapter could not be written to {directory}") and "Free some space" in line
    assert list(directory.iterdir()) == []


def test_a_save_that_fails_on_its_last_file_leaves_the_earlier_adapter_whole(
    pipe: StableDiffusion3Pipeline, folder: Path
) -> None:
    before = listing(folder)
    trained(pipe, seed=8)
    with pytest.raises(TypeError):
        sl.save_adapter(pipe, folder, training={"loss": torch.nn.Identity()})  # the config cannot be written
    assert listing(folder) == before


def test_a_folder_that_is_a_file_is_refused(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(sl.AdapterError, match="could not be written.*another folder"):
            sl.save_adapter(sl.attach(pipe), place)
    assert listing(tmp_path) == {"file": b"x"}
