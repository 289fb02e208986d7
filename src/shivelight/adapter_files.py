"""Adapters on disk and on the Hub: `adapter_config.json` and `adapter_model.safetensors`, laid out as PEFT does.

Never a copy of the backbone, never a pickle. Files are written under a temporary name and renamed.
"""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shivelight.adapter import backbone_of, install, prepare, routed_of
from shivelight.backbones import find_spec
from shivelight.config import FORMAT_VERSION, Reuse, RoutingConfig
from shivelight.errors import AdapterError
from shivelight.execution.folding import Delta, FoldedWeights
from shivelight.execution.routed import Routed

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_DELTA_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
# What makes two backbones of one family incompatible, wherever their configs have it.
_SHAPE_FIELDS = (
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "caption_projection_dim",
    "in_channels",
)


def save_adapter(model: Any, directory: str | Path, training: dict[str, Any] | None = None) -> Path:
    """Write what is attached to `model` into `directory` (made if missing).

    Args:
        model: an attached pipeline or transformer.
        directory: where both files go; files of an earlier adapter there are replaced.
        training: what to remember of the training run (command, steps, measured losses), JSON-ready.

    Returns:
        The directory.
    """
    backbone, routed = backbone_of(model), routed_of(model)
    directory = Path(directory)
    config = adapter_config(backbone, routed, training)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in routed.state_dict().items()}
    for name, delta in routed.deltas.items():
        for part, suffix in _DELTA_PARTS.items():
            tensors[f"deltas.{name}.{suffix}"] = getattr(delta, part).detach().cpu().contiguous()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_together(
            {
                directory / WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                directory / CONFIG_NAME: lambda path: path.write_text(json.dumps(config, indent=2) + "\n"),
            }
        )
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The adapter could not be written to {directory}: {error}. Free some space or choose another folder."
        ) from error
    return directory


def adapter_config(backbone: Any, routed: Routed, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `adapter_config.json` says of a backbone and what is (or is about to be) attached to it."""
    source = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    return {
        "peft_type": "SHIVELIGHT",
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": None if source is None else str(source),  # diffusers keeps a Path that it was given
        "base_model_class": type(backbone).__name__,
        "base_model_shape": backbone_shape(backbone),
        "spec": routed.spec.name,
        "routed_blocks": list(routed.routed),
        "routing": routed.config.to_dict(),
        "training": training or {},
    }


def load_adapter(
    model: Any,
    source: str | Path,
    revision: str | None = None,
    reuse: Reuse | None = None,
    *,
    pipeline: Any | None = None,
) -> Any:
    """Attach the adapter in a local folder or Hub repository; the budget is its config's: keep=1.0 as training leaves it.

    Args:
        model: a diffusers pipeline, or its transformer.
        source: a folder, or a repository's name.
        revision: of the repository.
        reuse: let what does not run add its last residual, in the place of what the adapter says.
        pipeline: where `model` is one of a pipeline's two transformers, that pipeline.

    Raises:
        AdapterError: a file is missing, truncated, a pickle, of another backbone or of a newer format. The model is then
            as it was before.
    """
    install(model, *read_adapter(model, source, revision, reuse, pipeline=pipeline))
    return model


def read_adapter(
    model: Any,
    source: str | Path,
    revision: str | None = None,
    reuse: Reuse | None = None,
    *,
    pipeline: Any | None = None,
) -> tuple[Routed, dict[str, Delta]]:
    """What `adapter.install` puts on the model; arguments and errors as for `load_adapter`. Nothing is changed yet."""
    config_path, weights_path = _locate(source, revision)
    stored, tensors = _read_config(config_path), _read_tensors(weights_path)
    backbone = backbone_of(model)
    _check_backbone(stored, backbone, source)
    config = RoutingConfig.from_dict(stored["routing"])
    if reuse is not None:
        config = replace(config, reuse=reuse)
    # Everything is checked before the model, or an adapter that it has already, is touched.
    routed = prepare(model, config, pipeline)
    own = {name: t for name, t in tensors.items() if not name.startswith("deltas.")}
    _check_tensors(own, routed.state_dict(), weights_path)
    routed.load_state_dict(own)
    if routed.gates is not None:
        routed.gates.set_orders(backbone, {})
    deltas = _read_deltas(tensors, weights_path)
    if deltas and config.deltas is None:
        raise AdapterError(f"{weights_path} holds DoRA deltas, but {config_path.name} has no delta settings.")
    return routed, deltas


def read_deltas(model: Any, source: str | Path, revision: str | None = None) -> FoldedWeights:
    """Only the DoRA deltas of an adapter, for the backbone of `model`, without attaching it: `apply(True)` swaps them in."""
    config_path, weights_path = _locate(source, revision)
    stored, tensors = _read_config(config_path), _read_tensors(weights_path)
    backbone = backbone_of(model)
    _check_backbone(stored, backbone, source)
    config, deltas = RoutingConfig.from_dict(stored["routing"]), _read_deltas(tensors, weights_path)
    if config.deltas is None or not deltas:
        raise AdapterError(f"The adapter {source} has no DoRA deltas.")
    attached = routed_of(model, missing_ok=True)
    # Folded from the backbone's own weights, not from those of an adapter that is attached now.
    with attached.switched(False) if attached is not None else nullcontext():
        return FoldedWeights(backbone, deltas, config.deltas.alpha / config.deltas.rank)


def push_to_hub(model: Any, repo_id: str, card: str | None = None, private: bool = False) -> str:
    """Upload the attached adapter with a model card; needs a Hugging Face login.

    Args:
        model: an attached pipeline or transformer.
        repo_id: "user/name" on the Hub; created if missing.
        card: Markdown of the card's body (training command, measured table); a short one by default.
        private: visibility of a new repository.

    Returns:
        URL of the commit.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_adapter(model, scratch)
        (folder / "README.md").write_text(model_card(json.loads((folder / CONFIG_NAME).read_text()), card))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)


def model_card(config: dict[str, Any], body: str | None = None) -> str:
    """A model card for the Hub: base model, how to load, then `body`."""
    base = config.get("base_model_name_or_path") or "unknown"
    return (
        f"---\nlibrary_name: shivelight\nbase_model: {base}\ntags: [shivelight, diffusers, adapter]\n---\n"
        f"# Shivelight adapter for {config['base_model_class']}\n\n"
        "```python\nimport shivelight as sl\nsl.load_adapter(pipe, REPO_ID)\nsl.set_budget(pipe, keep=0.6)\n```\n\n"
        + (body or f"Training: `{json.dumps(config.get('training', {}))}`")
        + "\n"
    )


def backbone_shape(backbone: nn.Module) -> dict[str, Any]:
    """The fields of the backbone's config that its adapters depend on."""
    config = getattr(backbone, "config", {})
    return {name: config[name] for name in _SHAPE_FIELDS if name in config}


def _write_together(writers: dict[Path, Callable[[Path], object]]) -> None:
    """All files or none: an earlier adapter's config never stands beside new weights because the disk was full."""
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writers}
    try:
        for path, writer in writers.items():
            writer(unfinished[path])
        for path, part in unfinished.items():
            os.replace(part, path)
    finally:
        for part in unfinished.values():
            part.unlink(missing_ok=True)


def _locate(source: str | Path, revision: str | None) -> tuple[Path, Path]:
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
                hint = f" It holds {', '.join(pickles)}: pickles are never loaded." if pickles else ""
                raise AdapterError(
                    f"The adapter folder {folder} has no {name}.{hint} Save it with shivelight.save_adapter."
                )
        return folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if folder.is_absolute() or str(source).count("/") != 1 or str(source).startswith((".", "~")):
        raise AdapterError(f"There is no adapter folder {source}; check the path.")
    try:
        paths = [Path(hf_hub_download(str(source), name, revision=revision)) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except Exception as error:  # the Hub client raises a dozen kinds: network, access, missing
        raise AdapterError(
            f"There is no adapter folder {source}, and the Hub could not give {source}"
            f"{f' at revision {revision}' if revision else ''}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return paths[0], paths[1]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}. Copy the adapter again.") from error
    if not isinstance(stored, dict) or stored.get("peft_type") != "SHIVELIGHT" or "routing" not in stored:
        kind = stored.get("peft_type") if isinstance(stored, dict) else type(stored).__name__
        raise AdapterError(
            f"{path} is not a Shivelight adapter (peft_type {kind!r}); LoRAs load with pipe.load_lora_weights."
        )
    version = stored.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {version!r}, this Shivelight reads {FORMAT_VERSION}; update the package."
        )
    return stored


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is not a readable safetensors file (truncated, or a pickle): {error}. Copy the adapter again."
        ) from error


def _check_backbone(stored: dict[str, Any], backbone: nn.Module, source: str | Path) -> None:
    spec = find_spec(backbone)
    if stored.get("spec") != spec.name:
        raise AdapterError(f"The adapter {source} is for a {stored.get('spec')!r} backbone, this one is {spec.name!r}.")
    theirs, ours = stored.get("base_model_shape") or {}, backbone_shape(backbone)
    if not isinstance(theirs, dict):
        raise AdapterError(
            f"The adapter {source} has base_model_shape {theirs!r}, not a JSON object; copy the adapter again."
        )
    differing = [f"{name} {theirs[name]} (here {ours.get(name)})" for name in theirs if theirs[name] != ours.get(name)]
    if differing:
        raise AdapterError(
            f"The adapter {source} was trained for another {type(backbone).__name__}: {', '.join(differing)}."
        )


def _check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"holds an unknown {extra[0]!r}"
        raise AdapterError(
            f"{path} {what} ({len(missing)} missing, {len(extra)} unknown): not what its config describes."
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise AdapterError(
                f"{name!r} in {path} has shape {tuple(tensor.shape)}, the backbone needs {tuple(wanted[name].shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{name!r} in {path} holds NaN or infinite values: the adapter is broken; train it anew."
            )


def _read_deltas(tensors: dict[str, Tensor], path: Path) -> dict[str, Delta]:
    found = {key for key in tensors if key.startswith("deltas.")}
    names = {key.removeprefix("deltas.").rsplit(".lora_", 1)[0] for key in found}
    extra = sorted(found - {f"deltas.{name}.{suffix}" for name in names for suffix in _DELTA_PARTS.values()})
    if extra:
        raise AdapterError(
            f"{path} holds an unknown {extra[0]!r} ({len(extra)} unknown): not what its config describes."
        )
    deltas = {}
    for name in sorted(names):
        try:
            parts = {part: tensors[f"deltas.{name}.{suffix}"] for part, suffix in _DELTA_PARTS.items()}
        except KeyError as error:
            raise AdapterError(
                f"{path} lacks {error.args[0]!r}: the file is incomplete; copy the adapter again."
            ) from error
        if not all(bool(torch.isfinite(t).all()) for t in parts.values()):
            raise AdapterError(f"The delta of {name!r} in {path} holds NaN or infinite values; train the adapter anew.")
        deltas[name] = Delta(**parts)
    return deltas
