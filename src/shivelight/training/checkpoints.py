"""Checkpoints of a training run: whole or absent, and refused by a run with other settings."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shivelight.errors import TrainingError
from shivelight.execution.routed import NAME
from shivelight.files import replacing

KEPT = 2
_TOLD_BY = 16


@dataclass
class State:
    """What a checkpoint holds."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]


def save(out: Path, step: int, tensors: dict[str, Tensor], optimizer: dict[str, Any], identity: dict[str, Any]) -> Path:
    """Write `out`/checkpoint-STEP under a temporary name, rename it, and drop all but the newest two."""
    folder = out / f"checkpoint-{step:08d}"
    unfinished = out / f".{folder.name}.{os.getpid()}.part"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, unfinished / "tensors.safetensors")
        torch.save(optimizer, unfinished / "optimizer.pt")
        (unfinished / "run.json").write_text(json.dumps({"step": step, "identity": identity}))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(
            f"The checkpoint of step {step} could not be written to {out}: {error}. Free some space and start the same command "
            "again: it goes on from the checkpoint before."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in sorted(out.glob("checkpoint-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None."""
    found = sorted(out.glob("checkpoint-*"))
    return found[-1] if found else None


def load(folder: Path, identity: dict[str, Any]) -> State:
    """Read a checkpoint; TrainingError if it is broken or belongs to a run with other settings."""
    try:
        run = json.loads((folder / "run.json").read_text())
        tensors = load_file(folder / "tensors.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        # torch's own message is a page long and advises to read it as a pickle.
        reason = "optimizer.pt is damaged" if isinstance(error, UnpicklingError) else error
        raise TrainingError(
            f"The checkpoint {folder} cannot be read: {reason}. Delete it to go on from the one before."
        ) from error
    if run["identity"] != identity:
        raise TrainingError(
            f"{folder} was made with other settings ({difference(run['identity'], identity)}). Use the same ones to go on, or "
            "another output folder to start anew."
        )
    return State(int(run["step"]), tensors, optimizer)


def resume(
    out: Path, identity: dict[str, Any], named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> int | None:
    """Take over the newest checkpoint in a run's folder, in place; its step, or None where there is none.

    Raises:
        TrainingError: it is broken, or belongs to a run with other settings or parameters.
    """
    found = newest(out)
    if found is None:
        return None
    state = load(found, identity)
    if set(named) != set(state.tensors):
        raise TrainingError(f"The checkpoint {found} holds other parameters than this run; use another output folder.")
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            named[name].copy_(tensor)
    optimizer.load_state_dict(state.optimizer)
    return state.step


def append_log(path: Path, record: dict[str, float]) -> None:
    """One more record of a run's losses.jsonl."""
    with path.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def truncate_log(path: Path, step: int, write: bool) -> list[dict[str, float]]:
    """Records up to `step` of a run's losses.jsonl; later ones, written after the checkpoint, are dropped from the file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off while it was written
        if record["step"] <= step:
            records.append(record)
    if write:
        with replacing(path) as unfinished:
            unfinished.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def weights_fingerprint(model: nn.Module) -> str:
    """Tells a model from another of its class: names, shapes and the first numbers of every parameter but those of what is attached
    to it, where they are at hand (offloaded and quantised ones count by their shapes)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name.startswith(f"{NAME}."):
            continue
        digest.update(f"{name}|{tuple(parameter.shape)}".encode())
        if type(parameter.data) is Tensor and not parameter.is_meta:
            digest.update(parameter.detach().reshape(-1)[:_TOLD_BY].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """What tells two runs' settings apart, in words."""
    for key in sorted(set(old) | set(new)):
        mine, theirs = old.get(key), new.get(key)
        if mine != theirs:
            if isinstance(mine, dict) and isinstance(theirs, dict):
                return difference(mine, theirs, f"{prefix}{key}.")
            return f"{prefix}{key} was {mine!r}, is {theirs!r}"
    return "nothing"
