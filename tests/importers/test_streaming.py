"""Large files, one tensor at a time, and folders that are gone on with."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shivelight as sl
from shivelight.importers.streaming import Checkpoint, Entry, ResumableFolder, write_tensors, write_text

TENSORS = {
    "bytes.3": torch.randn(3).bfloat16(),
    "wide": torch.arange(5),
    "scalar": torch.tensor(7),
    "weight": torch.randn(4, 6).t(),  # not contiguous
    "half": torch.randn(2, 3).half(),
    "empty": torch.zeros(0, 4),
    "double": torch.randn(2).double(),
}


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry.of(tensor) for name, tensor in tensors.items()}


def test_what_is_written_is_read_by_the_library_itself(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    digest = write_tensors(path, entries(TENSORS), TENSORS.__getitem__)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    # Every tensor begins at a multiple of its own itemsize, for readers that map the file.
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in entries(TENSORS).items():
        assert header[name]["data_offsets"][0] % entry.itemsize == 0
    source = Checkpoint(path)
    assert source.entries == entries(TENSORS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sl.AdapterError, match="'weight'.*has changed"):
        write_tensors(tmp_path / "a", {"weight": Entry("F32", (4, 6))}, TENSORS.__getitem__)


def test_a_file_that_does_not_fit_in_memory_is_opened_and_read_in_part(tmp_path: Path) -> None:
    # 8 TB, all hole: nothing that maps it, or reads it whole, could open it.
    path, size = tmp_path / "sparse.safetensors", 8 * 10**12
    header = {
        "huge": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]},
        "small": {"dtype": "BF16", "shape": [4], "data_offsets": [size, size + 8]},
    }
    packed = json.dumps(header).encode()
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(packed)) + packed)
            file.truncate(8 + len(packed) + size + 8)
    except OSError:
        pytest.skip("this file system has no such sparse files")
    source = Checkpoint(path)
    assert source.entries["huge"].bytes == size and source.read("small").tolist() == [0.0] * 4
    assert len(source.fingerprint()) == 64


def test_a_fingerprint_sees_changes_all_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, entries(TENSORS), TENSORS.__getitem__)
    seen = {Checkpoint(path).fingerprint()}
    for name in ("bytes.3", "double", "half"):
        changed = TENSORS | {name: TENSORS[name] + 1}
        write_tensors(path, entries(changed), changed.__getitem__)
        seen.add(Checkpoint(path).fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize("cut", [1, 60, "header", "all"])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int | str) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, entries(TENSORS), TENSORS.__getitem__)
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if isinstance(cut, int) else data[: {"header": 40, "all": 0}[cut]])
    with pytest.raises(sl.AdapterError, match="cut.safetensors is no whole safetensors file.*Download it again"):
        Checkpoint(path)


def test_what_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.bin")
    for name, said in [("model.bin", "no whole safetensors"), (".", "is a folder"), ("nowhere", "does not exist")]:
        with pytest.raises(sl.AdapterError, match=said):
            Checkpoint(tmp_path / name)


def test_a_folder_goes_on_where_it_stopped_and_knows_what_was_damaged(tmp_path: Path) -> None:
    folder = ResumableFolder(tmp_path / "new", {"about": 1})
    folder.put("deep/a.txt", lambda path: write_text(path, "one"))
    folder.put("b.txt", lambda path: write_text(path, "two"))
    (tmp_path / "new/deep/.c.99.part.txt").write_text("of a run that was killed")
    again = ResumableFolder(tmp_path / "new", {"about": 1})
    assert not (tmp_path / "new/deep/.c.99.part.txt").exists()
    assert again.stands("deep/a.txt") and again.stands("b.txt") and not again.stands("c.txt")
    again.verify()
    for damage in ("onf", "on", None):
        if damage is None:
            (tmp_path / "new/deep/a.txt").unlink()
        else:
            (tmp_path / "new/deep/a.txt").write_text(damage)
        damaged = ResumableFolder(tmp_path / "new", {"about": 1})
        assert not damaged.stands("deep/a.txt") and damaged.stands("b.txt")
        with pytest.raises(sl.AdapterError, match="a.txt.*(does not hold what was written|cannot be read)"):
            damaged.verify()


def test_a_write_that_fails_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    folder = ResumableFolder(tmp_path, {"about": 1})

    def full(path: Path) -> str:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(sl.AdapterError, match=r"a\.txt could not be written.*No space left.*goes on where it stopped"):
        folder.put("a.txt", full)
    assert [path.name for path in tmp_path.iterdir()] == ["import.json"] and not folder.files


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(sl.AdapterError, match="holds 'photos' and no import.json"):
        ResumableFolder(tmp_path, {"about": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "photos/.hidden").write_text("")
    ResumableFolder(tmp_path / "photos", {"about": 1})
    with pytest.raises(sl.AdapterError, match="holds another import: its about is 1, now 2"):
        ResumableFolder(tmp_path / "photos", {"about": 2})
    for damaged in ("{", "[]", '{"files": {"a": 1}}', "{}"):
        (tmp_path / "photos/import.json").write_text(damaged)
        with pytest.raises(sl.AdapterError, match="import.json cannot be read"):
            ResumableFolder(tmp_path / "photos", {"about": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(sl.AdapterError, match="cannot be used"):
        ResumableFolder(tmp_path / "file", {"about": 1})
