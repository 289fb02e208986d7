"""Latents and conditions, computed once and kept in shards of safetensors; a cache is complete or absent, never half.

Shapes: n samples of the cache, B of a batch. Nothing here knows what the latents' other dimensions mean.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shivelight.errors import DataError

FORMAT = 2
SHARD = 256
_CONDITION = "condition."


@dataclass(frozen=True)
class Sample:
    """A batch as the trainer needs it.

    Attributes:
        latents: [B, ...], as the denoiser of the family encodes them; fp32.
        conditions: by name, each [B, ...]; floating ones in fp32.
    """

    latents: Tensor
    conditions: dict[str, Tensor]


class LatentCache:
    """A cache on disk, read sample by sample.

    Args:
        folder: made by `write_cache` or `data.build_cache`.

    Attributes:
        captions: of the samples; fewer where none were given.
        options: arguments with which the pipeline draws what the cache trains.
        empty: by name, each [1, ...]: the conditions of no caption; None where the cache has none.
        shape: of one sample's latents.
    """

    def __init__(self, folder: Path) -> None:
        try:
            record = json.loads((folder / "cache.json").read_text())
            if record.get("format") != FORMAT:
                raise ValueError(f"its format is {record.get('format', 1)}, this version reads {FORMAT}")
            self.count, self.captions = int(record["count"]), list(record["captions"])
            self.options: dict[str, Any] = dict(record["options"])
            self._shards = [safe_open(folder / name, framework="pt") for name in record["shards"]]
            self.empty: dict[str, Tensor] | None = None
            if record["empty"]:
                self.empty = load_file(folder / "empty.safetensors")
            self.shape = torch.Size(self._shards[0].get_slice("latents").get_shape()[1:])
            names = self._shards[0].keys()
        except (OSError, KeyError, IndexError, ValueError, SafetensorError) as error:
            raise DataError(
                f"The latent cache {folder} cannot be read: {error}. Delete it to have it made anew."
            ) from error
        self.names = tuple(name.removeprefix(_CONDITION) for name in names if name.startswith(_CONDITION))
        if not self.names:
            self.empty = {}  # without conditions there is none to drop

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], dropped: Sequence[bool]) -> Sample:
        """The chosen samples; where `dropped`, without their caption. Shorter captions are padded with zeros at their end."""
        if any(dropped) and self.empty is None:
            raise DataError("The latent cache has no empty caption to drop captions to: give caption_drop=0.")
        latents = torch.stack([self._row(index, "latents") for index in indices]).float()
        conditions = {}
        for name in self.names:
            rows = [
                self.empty[name][0] if drop and self.empty is not None else self._row(index, _CONDITION + name)
                for index, drop in zip(indices, dropped, strict=True)
            ]
            rows = [row.float() if row.is_floating_point() else row for row in rows]
            conditions[name] = pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)
        return Sample(latents, conditions)

    def _row(self, index: int, name: str) -> Tensor:
        place = int(index) % SHARD
        return self._shards[int(index) // SHARD].get_slice(name)[place : place + 1][0]


class CacheWriter:
    """Collects samples and writes a shard whenever one is full; made by `writing`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self._parts: list[dict[str, Tensor]] = []
        self._names: list[str] = []
        self._shape: torch.Size | None = None
        self._first: set[str] = set()

    def add(self, latents: Tensor, conditions: Mapping[str, Tensor]) -> None:
        """Append samples: latents [B, ...] and each condition [B, ...]; they are kept in their dtypes, on the CPU."""
        part = {"latents": latents} | {_CONDITION + name: value for name, value in conditions.items()}
        if self._shape is None:
            self._shape, self._first = latents.shape[1:], set(part)
        wrong = {name: len(value) for name, value in part.items() if len(value) != len(latents)}
        if latents.shape[1:] != self._shape or set(part) != self._first or wrong:
            raise DataError(
                f"The samples from {self.count} on do not fit into the cache: latents {tuple(latents.shape)} with conditions "
                f"{ {name: tuple(value.shape) for name, value in conditions.items()} }; the first had latents "
                f"{tuple(self._shape)}, and every condition needs one row for each sample."
            )
        self.count += len(latents)
        self._parts.append({name: value.detach().cpu() for name, value in part.items()})
        while sum(len(held["latents"]) for held in self._parts) >= SHARD:
            self._write(SHARD)

    def finish(self, empty: Mapping[str, Tensor] | None, captions: Sequence[str], options: Mapping[str, Any]) -> None:
        """Write what is left, and the record that makes the cache one."""
        if self._parts:
            self._write(SHARD)
        if not self.count:
            raise DataError("A latent cache needs at least one sample.")
        if empty:
            rows = {name: value.detach().cpu().contiguous() for name, value in empty.items()}
            save_file(rows, self.folder / "empty.safetensors")
        record = {
            "format": FORMAT, "count": self.count, "shards": self._names, "captions": list(captions), "empty": bool(empty),
            "options": dict(options),
        }  # fmt: skip
        (self.folder / "cache.json").write_text(json.dumps(record))

    def _write(self, count: int) -> None:
        """One shard of the first samples that are held."""
        joined = {name: _joined([part[name] for part in self._parts]) for name in self._first}
        name = f"{len(self._names):05d}.safetensors"
        save_file({key: value[:count].contiguous() for key, value in joined.items()}, self.folder / name)
        self._names.append(name)
        rest = {key: value[count:] for key, value in joined.items()}
        self._parts = [rest] if len(rest["latents"]) else []


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[B, M, ...] of several lengths M, one after the other, with zeros at the ends of the shorter ones."""
    if parts[0].dim() < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts))
    return pad_sequence([row for part in parts for row in part], batch_first=True)


@contextmanager
def writing(folder: Path) -> Iterator[CacheWriter]:
    """A writer whose cache is put into `folder` at the end, whole, in the place of an earlier cache; nothing is left behind
    where it fails.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    if folder.exists() and not (folder / "cache.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} holds something that is no latent cache; choose another folder.")
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield CacheWriter(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"The latent cache could not be written to {folder}: {error}. Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_cache(
    folder: str | Path,
    latents: Tensor,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor] | None = None,
    captions: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> LatentCache:
    """A cache of tensors that someone has already: of a model that is not text-to-image, or encoded elsewhere.

    Args:
        folder: of this cache; one that is there is replaced.
        latents: [n, ...], clean, as the denoiser takes them.
        conditions: by name, each [n, ...]; the plain `Denoiser` hands them to the backbone as arguments of these names.
        empty: by name, each [1, ...], in place of a dropped caption; without it training needs caption_drop=0.
        captions: of the samples, for preview grids.
        options: arguments with which the pipeline draws such samples, for the same.
    """
    folder = Path(folder)
    with writing(folder) as writer:
        writer.add(latents, conditions)
        writer.finish(empty, captions, options or {})
    return LatentCache(folder)
