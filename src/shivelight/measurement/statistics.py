"""Estimates with their 95% intervals: bootstrap for means and medians, jackknife for distances between two sets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shivelight.errors import DataError

CONFIDENCE = 0.95
RESAMPLES = 2000
# 97.5% quantile of Student's t for JACKKNIFE_GROUPS - 1 = 19 degrees of freedom.
JACKKNIFE_GROUPS = 20
STUDENT_T_19 = 2.093


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95% interval, and the number of samples it comes from."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def interval(self) -> list[float]:
        """`[low, high]`, as results.json has it."""
        return [self.low, self.high]


def bootstrap(
    values: Tensor | Sequence[float],
    statistic: Callable[..., Tensor] = torch.mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Percentile bootstrap over samples of a statistic that takes `dim`, e.g. `torch.mean` of values [n].

    One sample has no spread to resample: its interval is the point itself. For a paired comparison pass differences.
    """
    sample = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    count = len(sample)
    if count == 0 or not torch.isfinite(sample).all():
        raise DataError(
            f"a bootstrap needs one or more values, all finite, got {count} values, "
            f"{int((~torch.isfinite(sample)).sum())} of them not finite"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = statistic(sample[torch.randint(count, (resamples, count), generator=generator)], dim=1)
    low, high = torch.quantile(
        draws, torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    ).tolist()
    value = float(statistic(sample, dim=0))
    # Equal values give equal figures up to a rounding error: the interval must hold the estimate all the same.
    return Estimate(value, min(low, value), max(high, value), count)


def median(values: Tensor, dim: int) -> Tensor:
    """The median that averages the two middle values (`torch.median` takes the lower one)."""
    return torch.quantile(values, 0.5, dim=dim)


def jackknife_two_samples(
    value: float, distance: Callable[[Tensor, Tensor], float], real: int, generated: int, seed: int = 0
) -> Estimate:
    """The 95% interval of a distance between two sets, by leaving out one of 20 random groups of either set at a time.

    `distance` takes the indices kept of either set. A bootstrap would repeat pictures, and repeated pictures bias KID
    and FD upwards: their interval might not hold the estimate. The variances of both sides add up.
    """
    generator = torch.Generator().manual_seed(seed)
    variance = 0.0
    for count, leave_out_real in ((real, True), (generated, False)):
        if count < 2 * JACKKNIFE_GROUPS:
            raise DataError(
                f"an interval for a distance needs {2 * JACKKNIFE_GROUPS} images or more in either set, "
                f"got {real} real and {generated} generated ones"
            )
        others = torch.arange(generated if leave_out_real else real)
        order = torch.randperm(count, generator=generator)
        replicates = []
        for group in range(JACKKNIFE_GROUPS):
            kept = order[torch.arange(count) % JACKKNIFE_GROUPS != group].sort().values
            replicates.append(distance(kept, others) if leave_out_real else distance(others, kept))
        spread = torch.tensor(replicates, dtype=torch.float64)
        variance += float((JACKKNIFE_GROUPS - 1) / JACKKNIFE_GROUPS * (spread - spread.mean()).square().sum())
    half = STUDENT_T_19 * math.sqrt(variance)
    return Estimate(value, value - half, value + half, min(real, generated))
