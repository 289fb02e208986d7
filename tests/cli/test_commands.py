"""The command line as people use it: real processes' exit codes and one-line errors, on the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shivelight as sl
from shivelight import cli
from shivelight.evaluation.results import read_results


@pytest.fixture
def adapter(pipe, tmp_path: Path) -> Path:  # noqa: ANN001
    sl.attach(pipe)
    folder = sl.save_adapter(pipe, tmp_path / "adapter")
    sl.detach(pipe)
    return folder


def test_train_then_generate_then_evaluate_then_report(run, images: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: ANN001
    out, common = tmp_path / "run", ("--pipeline", tiny_folder, "--device", "cpu")
    small = (
        "--router-steps",
        1,
        "--policy-steps",
        1,
        "--joint-steps",
        2,
        "--groups",
        1,
        "--group-size",
        2,
        "--rank",
        2,
    )
    code, said, error = run("train", images, "--out", out, *small, *common, "--json", tmp_path / "train.json")
    assert code == 0, error
    assert (out / "adapter/adapter_model.safetensors").exists()
    assert len(read_results(tmp_path / "train.json")["losses"]) == 4

    code, _, error = run(
        "generate", "a b", "--adapter", out / "adapter", "--keep", 0.5, "--steps", 2, "--count", 2, *common,
        "--out", tmp_path / "grid.png",
    )  # fmt: skip
    assert code == 0, error
    assert Image.open(tmp_path / "grid.png").size == (64, 64)

    code, _, error = run(
        "evaluate", "--adapter", out / "adapter", "--images", images, "--count", 4, "--keep", 0.6, "--steps", 2,
        "--rounds", 3, "--features", "none", "--finetuned", out / "adapter", *common, "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, error
    results = read_results(tmp_path / "e.json")
    methods = [row["method"] for row in results["rows"]]
    assert methods[:7] == ["dense", "dense-finetuned", "tokens", "training-free", "fixed", "random", "norm"]
    rows = {row["method"]: row for row in results["rows"]}
    assert "psnr_to_dense" not in rows["dense"] and rows["dense"]["planned_ratio"] == 1.0
    assert rows["tokens"]["planned_ratio"] < 0.95 and rows["tokens"]["flops_ratio"] < 1.0
    assert "kid" not in rows["tokens"], "what was not measured is absent"

    code, _, error = run("report", tmp_path / "e.json", "--out", tmp_path / "report.html")
    assert code == 0, error
    assert "<html" in (tmp_path / "report.html").read_text()[:400]


def test_generate_draws_both_rows_from_the_same_seeds(run, adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: ANN001
    sheets = []
    for seed in (3, 4):
        code, _, error = run(
            "generate", "a b", "--pipeline", tiny_folder, "--adapter", adapter, "--device", "cpu", "--keep", 1.0,
            "--steps", 2, "--count", 2, "--seed", seed, "--out", tmp_path / f"{seed}.png",
        )  # fmt: skip
        assert code == 0, error
        sheets.append(np.asarray(Image.open(tmp_path / f"{seed}.png"), dtype=int))
    first, second = sheets
    assert np.array_equal(first[:32], first[32:]), "a fresh adapter that keeps everything is the dense model"
    assert not np.array_equal(first[:, :32], first[:, 32:])
    # Picture i starts from the noise of seed + i.
    assert np.abs(first[:, 32:] - second[:, :32]).max() <= 1


def test_an_interrupted_generate_leaves_the_earlier_picture(
    run,  # noqa: ANN001
    adapter: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out" / "grid.png"
    out.parent.mkdir()
    out.write_bytes(b"the earlier picture")

    def interrupted(image: Image.Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    code, said, _ = run(
        "generate", "a b", "--pipeline", tiny_folder, "--adapter", adapter, "--device", "cpu", "--steps", 1,
        "--count", 1, "--out", out,
    )  # fmt: skip
    assert code == 1 and "pictures:" not in said
    assert out.read_bytes() == b"the earlier picture"
    assert [p.name for p in out.parent.iterdir()] == ["grid.png"]


def test_an_estimate_trains_nothing(run, images: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: ANN001
    code, said, error = run(
        "train", images, "--out", tmp_path / "run", "--pipeline", tiny_folder, "--estimate", "--groups", 1,
        "--group-size", 1, "--device", "cpu", "--json", tmp_path / "estimate.json",
    )  # fmt: skip
    assert code == 0, error
    assert "hours" in said and "adapter" in said
    assert json.loads((tmp_path / "estimate.json").read_text())["estimate"]["hours"] > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"], "what was encoded, and nothing else"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "nowhere"), "no image folder nowhere"),
        (("generate", "a", "--pipeline", "nowhere"), "no pipeline folder nowhere"),
        (("generate", "a", "--device", "cuda:77"), "'cuda:77' cannot be used"),
        (("report", "nowhere.json"), "nowhere.json"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(run, arguments: tuple, said: str) -> None:  # noqa: ANN001
    code, _, error = run(*arguments)
    assert code == 1
    assert said in error and error.startswith("shivelight: ")
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error


def test_a_bad_budget_is_one_line_too(run, adapter: Path, tiny_folder: Path) -> None:  # noqa: ANN001
    code, _, error = run(
        "generate", "a", "--pipeline", tiny_folder, "--adapter", adapter, "--keep", 1.5, "--device", "cpu"
    )
    assert code == 1 and "keep is 1.5" in error


def test_a_folder_that_is_no_pipeline_is_named(run, tmp_path: Path) -> None:  # noqa: ANN001
    code, _, error = run("generate", "a", "--pipeline", tmp_path, "--device", "cpu")
    assert code == 1 and "model_index.json" in error


@pytest.mark.parametrize(
    "arguments", [("train",), ("generate", "a", "--steps", "none"), ("nonsense",), ("demo", "--bad")]
)
def test_bad_usage_is_exit_code_2(run, arguments: tuple) -> None:  # noqa: ANN001
    assert run(*arguments)[0] == 2


def test_debug_shows_the_traceback(run) -> None:  # noqa: ANN001
    with pytest.raises(sl.DataError):
        run("train", "nowhere", "--debug")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_an_example(run, command: str) -> None:  # noqa: ANN001
    code, said, _ = run(command, "--help")
    assert code == 0 and "Example: shivelight" in said


def test_damage_trains_block_routers_alone(run, images: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: ANN001
    steps = ("--router-steps", 1, "--joint-steps", 2, "--groups", 1, "--group-size", 2, "--gate-signal", "damage")
    where = ("train", images, "--pipeline", tiny_folder, "--method", "blocks", "--device", "cpu", *steps)
    code, _, error = run(*where, "--out", tmp_path / "without")
    assert code == 1 and "give BlockRouting(closed='reuse')" in error
    code, _, error = run(*where, "--reuse", "--out", tmp_path / "run")
    assert code == 0, error
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["routing"]["deltas"] is None and config["routing"]["blocks"]["widths"] == [1.0]
    assert config["training"]["config"]["gate_signal"] == "damage"


def test_reuse_trains_both_axes_with_residuals(run, images: Path, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: ANN001
    steps = ("--router-steps", 1, "--joint-steps", 1, "--groups", 1, "--group-size", 2, "--rank", 0)
    code, _, error = run(
        "train", images, "--out", tmp_path / "run", "--pipeline", tiny_folder, "--method", "tokens+blocks", "--reuse",
        "--ratios", "fixed", *steps, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, error
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["routing"]
    assert config["tokens"]["sees_drift"] and config["blocks"]["closed"] == "reuse" and config["reuse"] is not None
