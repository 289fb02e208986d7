"""Large safetensors files, one tensor in memory at a time, and folders whose writing can be interrupted and gone on with."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shivelight.errors import AdapterError
from shivelight.files import replacing

MANIFEST = "import.json"
_TYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# A fingerprint reads this many windows of this many bytes.
_WINDOWS, _WINDOW = 4096, 4096


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        """That of a tensor to be written."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _TYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return self.itemsize * prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether it holds numbers that weights are made of; 8-bit formats need scales that are not part of the tensor."""
        return self.dtype in _TYPES and _TYPES[self.dtype].is_floating_point


class Checkpoint:
    """A safetensors file, read tensor by tensor.

    Args:
        path: of the file.

    Attributes:
        entries: type and shape of every tensor, in the order in which they lie in the file.

    Raises:
        AdapterError: there is no such file, it is no safetensors file, or it is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            what = "is a folder; give the safetensors file in it" if path.is_dir() else "does not exist; check the path"
            raise AdapterError(f"The checkpoint {path} {what}.")
        try:
            # Mapped into memory, a file that is larger than the memory cannot be opened at all; read, it can.
            self._handle = safe_open(path, framework="pt", backend="pread")
            views = {name: self._handle.get_slice(name) for name in self._handle.offset_keys()}
            self.entries = {name: Entry(view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(
                f"{path} is no whole safetensors file (truncated, or another format): {error}. Download it again."
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor."""
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise AdapterError(
                f"{name!r} cannot be read from {self.path}: {error}. Check the disk, or download the file again."
            ) from error

    def fingerprint(self) -> str:
        """sha256 of the file's size and of windows all over it: tells files of one layout apart without reading them whole."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            for place in range(0, size, max(_WINDOW, size // _WINDOWS)):
                file.seek(place)
                digest.update(file.read(_WINDOW))
        return digest.hexdigest()


def write_tensors(path: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor]) -> str:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        path: of the file.
        entries: what it is to hold.
        read: gives the tensor of a name; it must be as its entry says.

    Returns:
        sha256 of what was meant to be written, to compare the disk with.
    """
    # Wide numbers first: every tensor then begins at a multiple of its own itemsize, which readers that map files rely on.
    names = sorted(entries, key=lambda name: -entries[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + entries[name].bytes
        header[name] = {"dtype": entries[name].dtype, "shape": entries[name].shape, "data_offsets": (begin, end)}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(packed).to_bytes(8, "little"), packed):
            file.write(piece)
            digest.update(piece)
        for name in names:
            tensor = read(name)
            if Entry.of(tensor) != entries[name]:
                raise AdapterError(f"{name!r} is {Entry.of(tensor)}, not {entries[name]}: the checkpoint has changed.")
            numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(numbers)
            digest.update(numbers)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a small file; returns the sha256 of what was meant to be written."""
    path.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


class ResumableFolder:
    """A folder of files that an interrupted run goes on with: `import.json` in it says which are whole, with their sha256.

    Args:
        root: the folder; made if missing.
        about: what is written there and from what, JSON-ready: a run that goes on must be about the same.

    Raises:
        AdapterError: the folder holds something else, or cannot be written.
    """

    def __init__(self, root: Path, about: dict[str, Any]) -> None:
        self.root, self.about = root, about
        self.files: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        try:
            if (root / MANIFEST).is_file():
                self.files = self._recorded()
                for unfinished in root.glob("**/.*.part*"):  # of a run that was killed
                    unfinished.unlink()
                return
            others = sorted(path.name for path in root.iterdir() if path.name[0] != ".") if root.exists() else []
            if others:
                raise AdapterError(
                    f"The folder {root} holds {others[0]!r} and no {MANIFEST}, so no import has begun there. Give a new or "
                    "an empty folder."
                )
            self._record()
        except OSError as error:
            raise AdapterError(f"The folder {root} cannot be used: {error}. Choose another one.") from error

    def stands(self, name: str) -> bool:
        """Whether a file is there, whole and as it was written; reads it."""
        recorded, path = self.files.get(name), self.root / name
        whole = recorded is not None and path.is_file() and path.stat().st_size == recorded["bytes"]
        if whole and recorded is not None and sha256_of(path) == recorded["sha256"]:
            self._checked.add(name)
            return True
        return False

    def put(self, name: str, write: Callable[[Path], str]) -> None:
        """Write a file: `write` is given a temporary path and returns the sha256 of what it meant to write there."""
        try:
            with replacing(self.root / name) as unfinished:
                meant = write(unfinished)
                size = unfinished.stat().st_size
            self.files[name] = {"sha256": meant, "bytes": size}
            self._checked.discard(name)
            self._record()
        except OSError as error:
            raise AdapterError(
                f"{self.root / name} could not be written: {error}. Free some space or mend the disk; the same command then "
                "goes on where it stopped."
            ) from error

    def verify(self, progress: Callable[[], object] = lambda: None) -> None:
        """Read every file that was written, and compare it with what was meant; `progress` is called once for each file.

        Raises:
            AdapterError: a file holds something else; the next run writes that one anew.
        """
        for name, recorded in self.files.items():
            if name not in self._checked and sha256_of(self.root / name) != recorded["sha256"]:
                raise AdapterError(
                    f"{self.root / name} does not hold what was written to it (sha256): check the disk. The same command "
                    "writes that file anew."
                )
            self._checked.add(name)
            progress()

    def _record(self) -> None:
        with replacing(self.root / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(self.about | {"files": self.files}, indent=2) + "\n")

    def _recorded(self) -> dict[str, dict[str, Any]]:
        path = self.root / MANIFEST
        try:
            stored = json.loads(path.read_text())
            files = {name: {"sha256": f["sha256"], "bytes": f["bytes"]} for name, f in stored.pop("files").items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Delete {self.root} and import again."
            ) from error
        differing = sorted(key for key in self.about | stored if self.about.get(key) != stored.get(key))
        if differing:
            key = differing[0]
            raise AdapterError(
                f"{self.root} holds another import: its {key} is {stored.get(key)!r}, now {self.about.get(key)!r}. Go on with "
                "the same checkpoint and settings, or give another folder."
            )
        return files


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}. The same command writes it anew.") from error
