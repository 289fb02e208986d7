"""`shivelight calibrate` on the tiny pipeline: the table, its file, the guard, and errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.evaluation.results import read_results
from shivelight.execution.folding import Delta
from shivelight.execution.latency_table import LatencyTable


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIVELIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tiny_folder: Path) -> tuple[object, ...]:
    return ("calibrate", "--pipeline", tiny_folder, "--device", "cpu", "--seconds", 0, "--steps", 4)


def test_the_table_is_printed_and_kept(run, small: tuple, tmp_path: Path, folder: Path) -> None:  # noqa: ANN001
    code, said, error = run(*small, "--training-free", "tokens", "--json", tmp_path / "c.json")
    assert code == 0, error
    assert "without routed blocks" in said and "on 32 tokens" in said
    assert len(list(folder.rglob("*.json"))) == 1
    results = read_results(tmp_path / "c.json")
    assert LatencyTable.from_dict(results["latency_table"]).tokens == 64 and results["rows"] == []


@pytest.mark.parametrize("least", [99, 20])
def test_the_least_compute_that_keeps_the_quality_is_found(run, small: tuple, tmp_path: Path, least: int) -> None:  # noqa: ANN001
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n\n  c d  \n")
    code, said, error = run(*small, "--prompts", prompts, "--min-psnr", least, "--json", tmp_path / "c.json")
    assert code == 0, error
    assert f"2 prompts, PSNR to dense in dB, at least {least}" in re.sub(r"\s+", " ", said)
    rows = read_results(tmp_path / "c.json")["rows"]
    passes = {row["budget"]["compute"]: row["ci95"]["psnr_to_dense"][0] >= least for row in rows}
    found = min(compute for compute, passed in passes.items() if passed)
    assert said.rstrip().endswith(f"sl.set_budget(pipe, compute={found:g})")
    assert all(passed or compute < found for compute, passed in passes.items())
    assert all(row["planned_ratio"] <= row["budget"]["compute"] for row in rows)
    assert all(row["method"] == "blocks+reuse" and row["samples"] == 2 for row in rows)


def test_tuned_weights_that_draw_other_pictures_cannot_be_mended_by_compute(
    run,  # noqa: ANN001
    pipe,  # noqa: ANN001
    small: tuple,
    tmp_path: Path,
) -> None:
    sl.attach(pipe, sl.RoutingConfig(deltas=sl.DeltaConfig(rank=2)))
    name = "transformer_blocks.1.attn.to_q"
    weight = pipe.transformer.get_submodule(name).weight
    draw = torch.Generator().manual_seed(0)
    delta = Delta(
        torch.randn(2, weight.shape[1], generator=draw),
        torch.randn(weight.shape[0], 2, generator=draw),
        weight.norm(dim=1) * 3,
    )
    routed_of(pipe).set_deltas(pipe.transformer, {name: delta})
    sl.save_adapter(pipe, tmp_path / "adapter")
    (tmp_path / "p.txt").write_text("a")
    code, _, error = run(*small, "--adapter", tmp_path / "adapter", "--prompts", tmp_path / "p.txt", "--min-psnr", 90)
    assert code == 1 and "Even at compute=1.0" in error and len(error.strip().splitlines()) == 1


def test_errors_are_one_line(run, small: tuple, tmp_path: Path) -> None:  # noqa: ANN001
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for file, said in ((tmp_path / "nowhere.txt", "cannot be read"), (empty, "holds no prompts")):
        code, _, error = run(*small, "--prompts", file)
        assert code == 1 and said in error and len(error.strip().splitlines()) == 1
    assert run(*small, "--min-psnr", 30)[0] == 2
    assert run(*small, "--adapter", "a", "--training-free", "blocks")[0] == 2
