"""`shivelight tune` on the tiny pipeline: after a fit or without one, gone on with, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shivelight as sl
from shivelight.adapter import routed_of


@pytest.fixture
def small(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "prompts.txt").write_text("a b\n\n  c d  \ne\n")
    given = ("--pipeline", tiny_folder, "--device", "cpu", "--steps", 4, "--rank", 2)
    return (tmp_path / "prompts.txt", *given)


def test_after_a_fit_and_gone_on_with(run, pipe, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    fitted, out = tmp_path / "fitted", tmp_path / "out"
    code, _, error = run("fit", *small, "--out", fitted, "--guidance", 1, "--compute", 0.75, 0.5)
    assert code == 0, error
    few = ("--batch", 2, "--trajectories", 4, "--guidance", 1, "--out", out, "--adapter", fitted)
    code, said, error = run("tune", *small, *few, "--iterations", 3)
    assert code == 0, error
    computes = [float(number) for number in re.search(r"compute \(([^)]*)\)", said)[1].split(",")]
    assert len(computes) == 2 and 0.75 < computes[0] < 0.85 and 0.5 < computes[1] < 0.7, "those of the fit"
    assert f"sl.set_budget(pipe,compute={computes[1]:g})" in re.sub(r"\s", "", said)
    sl.load_adapter(pipe, out / "adapter")
    assert len(routed_of(pipe).deltas) > 0 and len(routed_of(pipe).config.stand_ins.plans) == 2
    log = (out / "losses.jsonl").read_text()
    code, _, error = run("tune", *small, *few, "--iterations", 3)  # nothing is left to do
    assert code == 0 and (out / "losses.jsonl").read_text() == log
    code, _, error = run("tune", *small, *few, "--iterations", 4)
    assert code == 1 and "other settings" in error
    again = (
        "--dense",
        out / "trajectories",
        "--iterations",
        1,
        "--adapter",
        out / "adapter",
        "--out",
        tmp_path / "again",
    )
    code, said, error = run("tune", *small, *few, *again, "--compute", computes[1])
    assert code == 0 and not (tmp_path / "again" / "trajectories").exists(), error


def test_what_goes_on_walks_what_its_deltas_are_for(run, pipe, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    fitted = tmp_path / "fitted"
    code, _, error = run("fit", *small, "--out", fitted, "--guidance", 1, "--compute", 0.75, 0.5)
    assert code == 0, error
    few = ("--batch", 1, "--trajectories", 1, "--iterations", 1, "--guidance", 1)
    code, _, error = run("tune", *small, *few, "--adapter", fitted, "--compute", 0.6, "--out", tmp_path / "one")
    assert code == 0, error
    one = tmp_path / "one" / "adapter"
    code, said, error = run("tune", *small, *few, "--adapter", one, "--out", tmp_path / "two")
    assert code == 0, error
    assert len(re.search(r"compute \(([^)]*)\)", said)[1].strip(",").split(",")) == 1
    other = [*small]
    other[other.index("--steps") + 1] = 6
    code, _, error = run("tune", *other, *few, "--adapter", fitted, "--out", tmp_path / "three")
    assert code == 2 and "give --compute, or fit" in error


def test_without_a_fit(run, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    few = ("--batch", 1, "--trajectories", 1, "--iterations", 1, "--out", tmp_path / "out")
    code, said, error = run("tune", *small, *few, "--adversarial", 0.5)
    assert code == 0 and "compute (0.5,)" in said, error
    assert "told_apart" in (tmp_path / "out" / "losses.jsonl").read_text()
    code, _, error = run("tune", *small, *few, "--compute", 1.5)
    assert code == 1 and "give shares of the dense FLOPs" in error
    code, _, error = run("tune", *small, *few[:-1], tmp_path / "none", "--compute", 0.1)
    assert code == 1 and "cannot be reached" in error
