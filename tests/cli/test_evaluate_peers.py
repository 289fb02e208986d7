"""`shivelight evaluate --peers`: they stand in the same table, and `fewer-steps` not twice."""

from __future__ import annotations

from pathlib import Path

import shivelight as sl
from shivelight.evaluation.results import read_results


def test_peers_stand_in_the_same_table(run, pipe, tiny_folder: Path, images: Path, tmp_path: Path) -> None:  # noqa: ANN001
    adapter = tmp_path / "adapter"
    sl.attach(pipe, sl.RoutingConfig(sl.TokenRouting()))
    sl.save_adapter(pipe, adapter)
    code, _, error = run(
        "evaluate", "--pipeline", tiny_folder, "--adapter", adapter, "--images", images, "--device", "cpu", "--count", 2,
        "--keep", 0.6, "--steps", 4, "--rounds", 3, "--features", "none", "--no-baselines", "--peers", "interval-cache",
        "--peers", "fewer-steps", "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, error
    rows = read_results(tmp_path / "e.json")["rows"]
    cached = [row for row in rows if row["method"] == "interval-cache"]
    assert [row["budget"] for row in cached] == [{"skip": 0.25}, {"skip": 0.5}, {"skip": 0.75}]
    for row in cached:
        assert row["planned_ratio"] == 1 - row["budget"]["skip"]
        assert 0.99 * row["planned_ratio"] < row["flops_ratio"] < 1.0
        assert row["efficiency"] > 0 and "psnr_to_dense" in row
    steps = [row["steps"] for row in rows if row["method"] == "fewer-steps"]
    assert {1, 2, 3} <= set(steps) and len(steps) == len(set(steps))
