import pytest
import torch

from shivelight.errors import DataError
from shivelight.measurement.statistics import bootstrap, jackknife_two_samples, median


def test_bootstrap_of_a_mean_matches_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 3 + 20
    estimate = bootstrap(values)
    half = 1.96 * float(values.std()) / 400**0.5
    assert estimate.value == pytest.approx(float(values.mean()), abs=1e-5)
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.08 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.08 * half)
    assert estimate.samples == 400


def test_bootstrap_repeats_with_its_seed_and_holds_its_estimate():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    for equal in ([0.1] * 7, [0.1]):
        estimate = bootstrap(equal)
        assert estimate.low <= estimate.value <= estimate.high


def test_median_averages_the_middle_pair():
    assert bootstrap([1.0, 2.0, 4.0, 8.0], statistic=median).value == 3.0


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(DataError, match="finite"):
        bootstrap(values)


def test_jackknife_covers_the_true_distance_about_95_times_in_100():
    """A difference of means has a known truth (0.5) and a known spread."""
    hits, widths = 0, []
    for trial in range(200):
        generator = torch.Generator().manual_seed(trial)
        x = torch.randn(60, generator=generator)
        y = torch.randn(120, generator=generator) + 0.5

        def distance(i, j, x=x, y=y):
            return float(y[j].mean() - x[i].mean())

        estimate = jackknife_two_samples(float(y.mean() - x.mean()), distance, 60, 120, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 180 <= hits <= 199
    expected = 2 * 2.093 * (1 / 60 + 1 / 120) ** 0.5
    assert sum(widths) / len(widths) == pytest.approx(expected, rel=0.05)


def test_jackknife_refuses_too_few_images():
    with pytest.raises(DataError, match="needs 40 images"):
        jackknife_two_samples(0.0, lambda i, j: 0.0, 100, 39)
