"""Which setting of `Reuse` suits a pipeline, where all blocks run at intervals: a search over a few on the user's own prompts.

How fast a model's output moves, and when, differs from pipeline to pipeline: guidance and the first steps decide more than the
family (docs/decisions/training-free.md). So no fixed rule is best for all, and a small search is cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from shivelight.config import Reuse
from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, Progress
from shivelight.evaluation.fidelity import fidelity_to_dense

# Growth of the intervals, and up to which share of the steps forecasts reach.
GRID = tuple((growth, forecast) for growth in (1.0, 2.0, 3.0) for forecast in (0.25, 0.5, 1.0))


@dataclass(frozen=True)
class Found:
    """One setting, and the mean PSNR to the dense pictures in dB over prompts and budgets."""

    reuse: Reuse
    psnr: float


def search_reuse(
    comparison: Comparison,
    captions: Sequence[str],
    computes: Sequence[float],
    grid: Sequence[tuple[float, float]] = GRID,
    progress: Progress | None = None,
) -> list[Found]:
    """The settings of a grid, best first; give the first to `RoutingConfig(blocks=..., reuse=...)`.

    Args:
        comparison: of a pipeline with `RoutingConfig.training_free(axis="blocks")` attached.
        captions: prompts to judge by; as seeds, those of the comparison's setting.
        computes: budgets, shares of the dense FLOPs.
        grid: (growth, forecast) pairs; the other fields of `Reuse` are those that are attached.
        progress: told each point's name.

    Raises:
        ShivelightError: blocks do not run at intervals, or there is nothing to judge by.
    """
    config = comparison.routed.config
    if config.blocks is None or config.blocks.router != "interval" or config.reuse is None:
        raise ShivelightError(
            "Forecasts are searched for where all blocks run at intervals, and none is attached that does so. Attach "
            'RoutingConfig.training_free(compute=0.5, axis="blocks") first.'
        )
    if not captions or not computes or not grid:
        raise ShivelightError("search_reuse needs at least one caption, one budget and one (growth, forecast) pair.")
    fields = {name: getattr(config.reuse, name) for name in Reuse.__dataclass_fields__}
    dense = comparison.pictures(comparison.dense(), captions, progress)
    found = []
    for growth, forecast in grid:
        reuse = Reuse(**fields | {"growth": growth, "forecast": forecast})
        psnrs = []
        for compute in computes:
            point = comparison.routed_point("training-free-blocks", compute=compute, variant={"reuse": reuse})
            psnrs.append(fidelity_to_dense(comparison.pictures(point, captions, progress), dense).psnr.mean().item())
        found.append(Found(reuse, fmean(psnrs)))
    return sorted(found, key=lambda entry: -entry.psnr)
