"""The least compute that keeps a quality: pictures of one's own prompts against the dense ones, at budgets found by halving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shivelight.budgets import planned_ratio
from shivelight.errors import BudgetError
from shivelight.evaluation.comparison import Comparison
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.results import new_row
from shivelight.measurement.statistics import Estimate

# Budgets that are tried are multiples of this, in percent of the dense FLOPs.
STEP = 2


@dataclass(frozen=True)
class Tried:
    """A budget and the quality it has: PSNR to dense, the mean over the prompts with its 95% interval."""

    compute: float
    psnr: Estimate
    planned: float | None

    def keeps(self, least: float) -> bool:
        """Whether the lower end of the interval is at least this, so that not the luck of these prompts alone decides."""
        return self.psnr.low >= least

    def row(self, method: str, steps: int, guidance: float) -> dict[str, Any]:
        """As results.json has it."""
        return new_row(
            method, {"compute": self.compute}, steps=steps, guidance=guidance, planned_ratio=self.planned,
            psnr_to_dense=self.psnr, samples=self.psnr.samples,
        )  # fmt: skip


def most_runs(step: int = STEP) -> int:
    """The most budgets that `least_compute` tries."""
    return 1 + (100 // step).bit_length()


def least_compute(
    comparison: Comparison,
    captions: Sequence[str],
    min_psnr: float,
    progress: Callable[[str], None] | None = None,
    step: int = STEP,
) -> tuple[Tried | None, list[Tried]]:
    """(the least budget that was tried and keeps the quality, or None; all that were tried, in order).

    Quality is taken to rise with compute. Only a budget that was drawn and passed is returned, never one in between.

    Args:
        comparison: of an attached pipeline.
        captions: the prompts; caption i starts from the noise of seed + i, dense and routed.
        min_psnr: what the lower end of the 95% interval of the mean PSNR must reach, in dB.
        progress: told of each batch of pictures.
        step: budgets are multiples of it, in percent.
    """
    dense = comparison.pictures(comparison.dense(), captions, progress)
    tried: list[Tried] = []

    def keeps(percent: int) -> Tried | None:
        point = comparison.routed_point("guard", compute=percent / 100)
        try:
            pictures = comparison.pictures(point, captions, progress)
        except BudgetError as error:
            if error.nearest is None:
                raise
            return None
        with point.state():
            planned = planned_ratio(comparison.pipe, comparison.setting.steps)
        estimate = fidelity_to_dense(pictures, dense, comparison.setting.seed).estimates()["psnr_to_dense"]
        tried.append(Tried(percent / 100, estimate, planned))
        return tried[-1] if tried[-1].keeps(min_psnr) else None

    best = keeps(100)
    if best is None:
        return None, tried
    low, high = 0, 100 // step  # at `low` it is too little, or cannot be reached
    while high - low > 1:
        middle = (low + high) // 2
        found = keeps(step * middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best, tried
