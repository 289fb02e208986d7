import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shivelight.errors import DataError
from shivelight.evaluation import results as module
from shivelight.evaluation.results import (
    git_commit,
    machine_info,
    new_results,
    new_row,
    read_results,
    validate,
    write_results,
)
from shivelight.measurement.statistics import Estimate


def example() -> dict:
    results = new_results(
        command="shivelight demo", seed=3, backbone={"class": "SD3Transformer2DModel", "tokens": 256}, split="test"
    )
    results["rows"] = [
        new_row(
            "tokens",
            {"keep": 0.6},
            steps=25,
            latency_ms={"median": 10.0, "p10": 9.0, "p90": 12.0, "runs": 5},
            psnr_to_dense=Estimate(25.0, 24.0, 26.0, 32),
            speedup=1.4,
            kid=None,
        )
    ]
    return results


def test_a_written_file_reads_back_and_says_where_it_comes_from(tmp_path):
    results = example()
    path = write_results(tmp_path / "new" / "results.json", results)
    assert read_results(path) == results
    assert results["schema"] == 1
    assert results["machine"].keys() >= {"device", "torch", "diffusers", "threads"}
    assert list(path.parent.iterdir()) == [path]


def test_what_was_not_measured_is_absent_and_estimates_bring_their_interval():
    row = example()["rows"][0]
    assert "kid" not in row
    assert row["psnr_to_dense"] == 25.0
    assert row["ci95"] == {"psnr_to_dense": [24.0, 26.0]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "schema 2"),
        (("rows", 0, "psnr_to_dense"), float("nan"), "nan|psnr_to_dense"),
        (("rows", 0, "kid"), None, "kid.*leave out"),
        (("rows", 0, "kid"), "0.1", "kid must be a number"),
        (("rows", 0, "caption_agreement"), None, "caption_agreement.*leave out"),
        (("rows", 0, "agreement_to_dense"), "-1", "agreement_to_dense must be a number"),
        (("rows", 0, "named"), True, "named must be a number"),
        (("rows", 0, "named_to_dense"), "0", "named_to_dense must be a number"),
        (("rows", 0, "speedup"), 0, "speedup is 0.*absent when not"),
        (("rows", 0, "anything"), {"deep": [1.0, float("inf")]}, r"anything\.deep\[1\] is inf"),
        (("rows", 0, "ci95"), {"fd": [0.0, 1.0]}, "ci95 has 'fd'"),
        (("rows", 0, "ci95"), {"psnr_to_dense": [26.0, 27.0]}, "around 25.0"),
        (("rows", 0, "latency_ms"), {"median": 1.0, "p10": 2.0, "p90": 3.0, "runs": 1}, "p10 <= median"),
        (("rows", 0, "latency_ms"), {"median": 1.0}, "has no 'p10'"),
        (("rows",), [3], r"rows\[0\] must be an object"),
        (("seed",), "zero", "seed must be of type int"),
    ],
)
def test_what_is_not_a_measurement_is_refused_and_nothing_written(tmp_path, path, value, message):
    results = copy.deepcopy(example())
    entry = results
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(DataError, match=message):
        write_results(tmp_path / "results.json", results)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["schema", "command", "commit", "machine", "seed", "backbone", "rows"])
def test_every_part_of_the_frame_is_needed(key):
    results = example()
    del results[key]
    with pytest.raises(DataError, match=f"no '{key}'"):
        validate(results)


def test_a_full_disk_keeps_the_old_file_and_leaves_no_half(tmp_path, monkeypatch):
    path = write_results(tmp_path / "results.json", example())
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_results(path, example() | {"seed": 9})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_no_half(tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path / "results.json", example())
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_readable_by_others_as_the_umask_says(tmp_path):
    mask = os.umask(0o022)
    try:
        assert write_results(tmp_path / "results.json", example()).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "holds list"), ("{}", "no 'schema'"), (None, "cannot read")]
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(path)


def test_a_nan_in_a_file_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(example()).replace("25.0", "NaN"))
    with pytest.raises(DataError, match="nan"):
        read_results(path)


def test_the_command_defaults_to_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/shivelight", "demo", "--quick"])
    assert new_results()["command"] == "shivelight demo --quick"


def test_the_commit_is_this_checkouts_or_unknown(tmp_path, monkeypatch):
    """A copy of the module in a repository that tracks it names that commit; an untracked one is unknown."""
    environment = os.environ | {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
        environment.pop(name, None)

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    tracked, untracked = tmp_path / "results.py", tmp_path / "other.py"
    git("init", "-q")
    tracked.write_text("x = 1\n")
    git("add", "results.py")
    git("commit", "-qm", "first")
    untracked.write_text("")

    monkeypatch.setattr(module, "__file__", str(untracked))
    assert git_commit() == "unknown"
    monkeypatch.setattr(module, "__file__", str(tracked))
    assert git_commit() == git("rev-parse", "HEAD")
    tracked.write_text("x = 2\n")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_the_machine_is_named_without_a_gpu():
    info = machine_info("cpu")
    assert info["device"] and info["threads"] >= 1
    assert not any(str(Path.home()) in str(value) for value in info.values())
