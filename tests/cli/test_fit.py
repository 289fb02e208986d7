"""`shivelight fit` on the tiny pipeline: an adapter that loads, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.evaluation.results import read_results


@pytest.fixture
def small(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "prompts.txt").write_text("a b\n\n  c d  \ne\n")
    given = ("--pipeline", tiny_folder, "--device", "cpu", "--steps", 4, "--rank", 2, "--out", tmp_path / "out")
    return ("fit", tmp_path / "prompts.txt", *given)


def test_what_was_fitted_is_said_saved_and_loads(run, pipe, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    code, said, error = run(*small, "--compute", 0.75, "--compute", 0.5, "--json", tmp_path / "f.json")
    assert code == 0, error
    assert "3 prompts, 4 steps" in said and "2 of 4" in said
    rows = read_results(tmp_path / "f.json")["rows"]
    assert [row["runs"] for row in rows] == [[0, 1, 2], [0, 2]] and all(row["samples"] == 3 for row in rows)
    assert [len(row["left"]) for row in rows] == [1, 2] and rows[0]["method"] == "blocks-fitted"
    compute = rows[1]["budget"]["compute"]
    assert f"sl.set_budget(pipe,compute={compute:g})" in re.sub(r"\s", "", said)
    sl.load_adapter(pipe, tmp_path / "out")
    assert [plan.runs for plan in routed_of(pipe).config.stand_ins.plans] == [(0, 1, 2), (0, 2)]
    sl.set_budget(pipe, compute=compute)
    assert 0.5 < sl.planned_ratio(pipe, 4) <= compute
    code, said, error = run(*small, "--adapter", tmp_path / "out", "--steps", 6, "--compute", 0.5)
    assert code == 0, error
    sl.load_adapter(pipe, tmp_path / "out")
    assert [plan.steps for plan in routed_of(pipe).config.stand_ins.plans] == [4, 4, 6]


def test_a_part_of_the_tokens(run, pipe, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    code, said, error = run(*small, "--partial", "tokens", "--compute", 0.7, "--json", tmp_path / "f.json")
    assert code == 0, error
    (row,) = read_results(tmp_path / "f.json")["rows"]
    assert "2 and a part of 4" in said and (row["runs"], row["partial"]) == ([0, 2], 1)
    sl.load_adapter(pipe, tmp_path / "out")
    compute = row["budget"]["compute"]
    sl.set_budget(pipe, compute=compute)
    pipe("a b", num_inference_steps=4, max_sequence_length=16, output_type="latent")
    assert 0.6 < routed_of(pipe).spending.ratio <= compute
    code, _, error = run(*small, "--adapter", tmp_path / "out", "--partial", "tokens", "--compute", 0.5)
    assert code == 0, error
    code, _, error = run(*small[:-1], tmp_path / "whole", "--compute", 0.5)
    assert code == 0, error
    code, _, error = run(*small, "--adapter", tmp_path / "whole", "--partial", "tokens")
    assert code == 1 and "not fitted with --partial tokens" in error


def test_errors_leave_no_adapter(run, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    code, _, error = run(*small, "--compute", 1.0)
    assert code == 1 and "No step rested" in error
    code, _, error = run("fit", tmp_path / "none.txt", *small[2:])
    assert code == 1 and "none.txt" in error
    assert not (tmp_path / "out").exists()
