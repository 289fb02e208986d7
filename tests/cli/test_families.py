"""The commands on pipelines of other families, from their folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from captioned import SIDES, captioned
from PIL import Image

from shivelight.evaluation.results import read_results
from shivelight.training.cache import LatentCache

FAMILIES = ("flux", "pixart", "qwen-image", "dit", "wan", "sana")


@pytest.fixture
def trained(run, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path, tuple]:  # noqa: ANN001
    """(name, folder of the run, options that all commands share) of a family whose adapter was trained."""
    name, folder, out = request.param, tmp_path / "pipeline", tmp_path / "run"
    captioned(name).save_pretrained(folder)
    if name == "dit":
        for label, caption in enumerate(sorted(images.glob("*.txt"))):
            caption.write_text(str(label))
    common = ("--pipeline", folder, "--device", "cpu", "--size", SIDES[name])
    steps = (
        "--router-steps",
        1,
        "--policy-steps",
        1,
        "--joint-steps",
        1,
        "--groups",
        1,
        "--group-size",
        2,
        "--rank",
        2,
    )
    method = "blocks" if name == "sana" else "tokens"
    code, _, error = run("train", images, "--out", out, "--method", method, *steps, *common)
    assert code == 0, error
    return name, out, common


@pytest.mark.parametrize("trained", FAMILIES, indirect=True)
def test_what_was_trained_is_drawn(run, trained: tuple[str, Path, tuple], tmp_path: Path) -> None:  # noqa: ANN001
    name, out, common = trained
    side = SIDES[name]
    # The 16 tokens of its tokenizer are what the pipeline will be asked for.
    asked = {"height": side, "width": side, "max_sequence_length": 16}
    wanted = {"dit": {}, "wan": asked | {"num_frames": 1}}.get(name, asked)
    assert LatentCache(next((out / "cache").iterdir())).options == wanted
    code, _, error = run(
        "generate", "3" if name == "dit" else "a b", "--adapter", out / "adapter", "--compute", 0.8, "--steps", 4, "--count", 2,
        *common, "--out", tmp_path / "grid.png",
    )  # fmt: skip
    assert code == 0, error
    assert Image.open(tmp_path / "grid.png").size == (2 * side, 2 * side)


@pytest.mark.slow  # each minutes where two cores are shared
@pytest.mark.parametrize("trained", FAMILIES, indirect=True)
def test_what_was_trained_is_evaluated(run, trained: tuple[str, Path, tuple], images: Path, tmp_path: Path) -> None:  # noqa: ANN001
    name, out, common = trained
    code, _, error = run(
        "evaluate", "--adapter", out / "adapter", "--compute", 0.8, "--images", images, "--count", 2, "--steps", 4,
        "--rounds", 3, "--features", "none", "--no-baselines", *common, "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, error
    results = read_results(tmp_path / "e.json")
    methods = {row["method"] for row in results["rows"]}
    assert {"dense", "blocks" if name == "sana" else "tokens"} <= methods
    assert all(np.isfinite(row["psnr_to_dense"]) for row in results["rows"][1:])
    assert results["backbone"]["tokens"] > 0


def test_what_cannot_be_routed_is_said_before_anything_is_encoded(run, images: Path, tmp_path: Path) -> None:  # noqa: ANN001
    captioned("sana").save_pretrained(tmp_path / "pipeline")
    code, _, error = run(
        "train", images, "--pipeline", tmp_path / "pipeline", "--out", tmp_path / "run", "--size", 32, "--device", "cpu"
    )
    assert code == 1 and "convolutions" in error and not (tmp_path / "run").exists()


def test_a_size_that_does_not_fit_is_one_line(run, images: Path, tmp_path: Path) -> None:  # noqa: ANN001
    captioned("flux").save_pretrained(tmp_path / "pipeline")
    code, _, error = run(
        "train", images, "--pipeline", tmp_path / "pipeline", "--out", tmp_path / "run", "--size", 30, "--device", "cpu"
    )
    assert code == 1 and "multiple of 4, such as 32" in error and len(error.strip().splitlines()) == 1
