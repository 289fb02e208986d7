"""Distance of generated images to the data, in the features of a network: KID and FD, each with a 95% interval.

Called KID-EffLite0 and FD-EffLite0 after the default network, never FID: the figures compare with each other only.
Features are extracted once per set (`features.extract_features`) and shared by both figures and by all methods.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel

from shivelight.errors import DataError
from shivelight.measurement.statistics import Estimate, jackknife_two_samples

KID_SUBSETS = 100


class _Precomputed(nn.Module):
    """Hands torchmetrics the features we have already: its metrics take a network and we give it the identity."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check(real: Tensor, generated: Tensor) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise DataError(
            "both sets need features [n, d] of one network, "
            f"got the shapes {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    for name, features in (("real", real), ("generated", generated)):
        if not torch.isfinite(features).all():
            raise DataError(f"the {name} images gave features that are not finite: an image holds NaN or infinity")


def kid(real: Tensor, generated: Tensor, seed: int = 0) -> Estimate:
    """Kernel distance (Binkowski et al., arXiv 1801.01401): unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Features [n, d] and [m, d]. Sets of one size are compared whole; else it is the mean over 100 subsets of the smaller
    size, drawn with the seed.
    """
    _check(real, generated)
    size = min(len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # "will save all extracted features in buffer": we know
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Precomputed(real.shape[1]),
            subsets=1 if len(real) == len(generated) else KID_SUBSETS,
            subset_size=size,
        )
        metric.update(real.double(), real=True)
        metric.update(generated.double(), real=False)
        value = float(metric.compute()[0])

    return jackknife_two_samples(value, squared_mmd(real, generated), len(real), len(generated), seed)


def kid_difference(real: Tensor, generated: Tensor, baseline: Tensor, seed: int = 0) -> Estimate:
    """KID of `generated` less KID of `baseline`, paired: both [n, d] are of the same captions and seeds, in one order, and
    the interval leaves the same ones out of both. Below 0 is nearer to the data than the baseline.
    """
    _check(real, generated)
    _check(real, baseline)
    if len(generated) != len(baseline):
        raise DataError(
            f"a paired difference needs as many pictures of either, got {len(generated)} and {len(baseline)}"
        )
    ours, theirs = squared_mmd(real, generated), squared_mmd(real, baseline)

    def difference(x: Tensor, y: Tensor) -> float:
        return ours(x, y) - theirs(x, y)

    value = difference(torch.arange(len(real)), torch.arange(len(generated)))
    return jackknife_two_samples(value, difference, len(real), len(generated), seed)


def squared_mmd(real: Tensor, generated: Tensor) -> Callable[[Tensor, Tensor], float]:
    """The unbiased estimate as a function of the indices kept of either set; kernels are computed once."""
    within_real = poly_kernel(real.double(), real.double()).fill_diagonal_(0)
    within_generated = poly_kernel(generated.double(), generated.double()).fill_diagonal_(0)
    between = poly_kernel(real.double(), generated.double())

    def of(x: Tensor, y: Tensor) -> float:
        n, m = len(x), len(y)
        xx = within_real[x][:, x].sum() / (n * (n - 1))
        yy = within_generated[y][:, y].sum() / (m * (m - 1))
        return float(xx + yy - 2 * between[x][:, y].mean())

    return of


def fd(real: Tensor, generated: Tensor, seed: int = 0) -> Estimate:
    """Frechet distance |mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of features [n, d] and [m, d].

    It is biased upwards when n is not far above d: compare only figures of the same n, which the estimate states.
    """
    _check(real, generated)
    metric = FrechetInceptionDistance(feature=_Precomputed(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    value = float(metric.compute())

    def distance(x: Tensor, y: Tensor) -> float:
        return frechet_distance(real[x].double(), generated[y].double())

    return jackknife_two_samples(value, distance, len(real), len(generated), seed)


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The same distance without a d x d root, for the many evaluations of an interval.

    With centred features X [n, d], Y [m, d] the non-zero eigenvalues of C_x C_y are the squared singular values of
    X Y^T / sqrt((n - 1)(m - 1)), so the trace of the root is the sum of those singular values.
    """
    mean_gap = (real.mean(0) - generated.mean(0)).square().sum()
    x, y = _centred(real), _centred(generated)
    return float(mean_gap + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


def _centred(features: Tensor) -> Tensor:
    """A matrix R [min(n, d), d] with R^T R the covariance: a triangular factor where n > d."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
