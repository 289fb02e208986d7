import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from shivelight.errors import DataError
from shivelight.evaluation.distribution import fd, frechet_distance, kid, kid_difference, squared_mmd


def gaussian(count: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


class Pooled(torch.nn.Module):
    """A feature network small enough to hand to torchmetrics itself."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1).double()


def test_both_distances_are_torchmetrics_with_the_network_as_its_feature():
    real, generated = gaussian(60, 3 * 64, 1).view(60, 3, 8, 8), gaussian(60, 3 * 64, 2, 0.3).view(60, 3, 8, 8)
    network = Pooled()
    theirs_kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=60)
    theirs_fd = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    for metric in (theirs_kid, theirs_fd):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    ours_kid, ours_fd = kid(network(real), network(generated)), fd(network(real), network(generated))
    assert ours_kid.value == pytest.approx(float(theirs_kid.compute()[0]), rel=1e-9)
    assert ours_fd.value == pytest.approx(float(theirs_fd.compute()), rel=1e-6)


@pytest.mark.parametrize(("real", "generated", "width"), [(50, 80, 8), (50, 40, 64), (400, 300, 5)])
def test_frechet_distance_without_the_root_is_the_same(real, generated, width):
    x, y = gaussian(real, width, 3).double(), gaussian(generated, width, 4, 0.5, 2.0).double()
    covariances = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-5)


def test_the_jackknife_leaves_out_of_the_same_estimate():
    """On any part of the sets it is torchmetrics' estimate of that part."""
    real, generated = gaussian(60, 5, 1).double(), gaussian(70, 5, 2, 0.4).double()
    x, y = torch.arange(3, 45), torch.arange(20, 62)
    assert squared_mmd(real, generated)(x, y) == pytest.approx(float(poly_mmd(real[x], generated[y])), rel=1e-9)


def test_fd_of_gaussians_is_the_closed_form():
    """Between N(0, 1) and N(m, s^2) in each of d dimensions: d * (m^2 + (1 - s)^2)."""
    estimate = fd(gaussian(6000, 4, 5), gaussian(6000, 4, 6, shift=1.0, scale=1.5))
    assert estimate.value == pytest.approx(4 * (1.0 + 0.25), rel=0.05)
    assert estimate.low < 5.0 < estimate.high


def test_kid_is_unbiased_and_its_interval_holds_zero_for_equal_distributions():
    inside = 0
    values = []
    for trial in range(40):
        estimate = kid(gaussian(50, 6, 2 * trial), gaussian(50, 6, 2 * trial + 1))
        values.append(estimate.value)
        inside += estimate.low <= 0.0 <= estimate.high
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / len(values) ** 0.5
    assert abs(float(mean)) < 3 * float(error)
    assert inside >= 35


def test_distances_grow_with_the_shift():
    real = gaussian(80, 16, 1)
    for distance in (kid, fd):
        near, far = distance(real, gaussian(80, 16, 2, 0.2)), distance(real, gaussian(80, 16, 2, 1.0))
        assert near.high < far.low
        assert near.samples == 80


def test_unequal_sets_repeat_with_their_seed_and_leave_the_global_generator_alone():
    real, generated = gaussian(90, 8, 1), gaussian(50, 8, 2, 0.4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kid(real, generated, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert kid(real, generated, seed=1) == first
    assert kid(real, generated, seed=2) != first
    assert first.samples == 50
    assert first.low <= first.value <= first.high


def test_bad_features_are_named():
    with pytest.raises(DataError, match="of one network"):
        kid(gaussian(50, 8, 1), gaussian(50, 9, 2))
    broken = gaussian(50, 8, 2)
    broken[3, 1] = float("nan")
    with pytest.raises(DataError, match="generated images gave features that are not finite"):
        fd(gaussian(50, 8, 1), broken)


def test_a_paired_difference_is_the_difference_and_knows_more_than_either():
    real, baseline = gaussian(60, 6, 1), gaussian(60, 6, 2, 0.5)
    nearer = baseline - 0.1
    estimate = kid_difference(real, nearer, baseline)
    assert estimate.value == pytest.approx(kid(real, nearer).value - kid(real, baseline).value, rel=1e-6)
    assert estimate.high < 0.0
    assert estimate.high - estimate.low < 0.5 * (kid(real, nearer).high - kid(real, nearer).low)
    same = kid_difference(real, baseline, baseline)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(DataError, match="as many pictures"):
        kid_difference(real, nearer[:50], baseline)
