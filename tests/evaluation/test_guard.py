"""What keeps a quality, and what does not."""

from shivelight.evaluation.guard import Tried, most_runs
from shivelight.measurement.statistics import Estimate


def test_the_lower_end_of_the_interval_decides() -> None:
    tried = Tried(0.5, Estimate(30.5, 29.9, 31.0, 8), 0.48)
    assert tried.keeps(29.9) and not tried.keeps(30.0)
    row = tried.row("blocks", 8, 4.0)
    assert row["budget"] == {"compute": 0.5} and row["planned_ratio"] == 0.48
    assert row["ci95"]["psnr_to_dense"] == [29.9, 31.0] and row["samples"] == 8


def test_halving_takes_few_runs() -> None:
    assert most_runs(2) == 7 and most_runs(50) == 3
