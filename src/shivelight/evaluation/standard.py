"""The standard table: dense, dense fine-tuned, token routing (trained and training-free), baselines, and fewer steps."""

import math
from collections.abc import Sequence

from shivelight.evaluation.comparison import Comparison, OperatingPoint
from shivelight.execution.folding import FoldedWeights

BASELINE_KEEPS = (0.8, 0.6, 0.5)


def standard_points(
    comparison: Comparison,
    keeps: Sequence[float],
    finetuned: FoldedWeights | None,
    baseline_keeps: Sequence[float] = BASELINE_KEEPS,
) -> list[OperatingPoint]:
    """Dense first, then every budget; fewer steps are added by `with_fewer_steps`, once latencies are known.

    The baselines may spend as many planned FLOPs as routing does (attention is quadratic, so equal keep ratios would not be
    equal cost). They run on the tuned weights of the adapter, which were trained for the learned router: that favours them
    over the same baselines on the backbone's own weights.
    """
    points = [comparison.dense()]
    if finetuned is not None:
        points.append(comparison.finetuned(finetuned))
    for keep in keeps:
        points.append(comparison.tokens(keep))
        if keep in baseline_keeps:
            plan = math.floor(1e4 * comparison.planned(points[-1])) / 1e4
            points += [
                comparison.training_free(keep),
                comparison.tokens(method="fixed", compute=plan, ratios="fixed"),
                comparison.tokens(method="random", compute=plan, scores="random", ratios="fixed"),
                comparison.tokens(method="norm", compute=plan, scores="norm", ratios="fixed"),
            ]
    return points


def with_fewer_steps(comparison: Comparison, points: Sequence[OperatingPoint], apart: int = 1) -> list[OperatingPoint]:
    """`points`, and dense with as many steps as fit into the time, and into the plan, of each routed one.

    Of step counts that are less than `apart` apart, only the larger stands.
    """
    routed = [point for point in points if point.method == "tokens"]
    chosen: list[OperatingPoint] = []
    for point in comparison.fewer_steps(routed):
        if not chosen or chosen[-1].steps - point.steps >= apart:
            chosen.append(point)
    return [*points, *chosen]
