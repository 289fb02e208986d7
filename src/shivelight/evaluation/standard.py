"""The standard tables: dense, dense fine-tuned, routing of tokens and blocks, baselines, and fewer steps."""

import math
from collections.abc import Sequence

from shivelight.config import Reuse
from shivelight.evaluation.comparison import Comparison, OperatingPoint, Variant
from shivelight.execution.folding import Delta, FoldedWeights
from shivelight.execution.routed import Routed

BASELINE_KEEPS = (0.8, 0.6, 0.5)


def standard_points(
    comparison: Comparison,
    keeps: Sequence[float],
    finetuned: FoldedWeights | None,
    baseline_keeps: Sequence[float] = BASELINE_KEEPS,
    reusing: tuple[Routed, dict[str, Delta]] | None = None,
) -> list[OperatingPoint]:
    """Dense first, then every budget; fewer steps are added by `with_fewer_steps`, once latencies are known.

    The baselines may spend as many planned FLOPs as routing does (attention is quadratic, so equal keep ratios would not be
    equal cost). They run on the tuned weights of the adapter, which were trained for the learned router: that favours them
    over the same baselines on the backbone's own weights. `reusing` is a second adapter, trained with reuse.
    """
    points = [comparison.dense()]
    if finetuned is not None:
        points.append(comparison.finetuned(finetuned))
    for keep in keeps:
        points.append(comparison.tokens(keep))
        if keep in baseline_keeps:
            if reusing is not None:
                points.append(comparison.other_adapter("tokens+reuse", *reusing, keep=keep))
            plan = math.floor(1e4 * (comparison.planned(comparison.tokens(keep)) or 1.0)) / 1e4
            points += [
                comparison.training_free(keep),
                comparison.routed_point("fixed", compute=plan, variant={"ratios": "fixed"}),
                comparison.routed_point("random", compute=plan, variant={"ratios": "fixed", "scores": "random"}),
                comparison.routed_point("norm", compute=plan, variant={"ratios": "fixed", "scores": "norm"}),
            ]
    return points


def block_points(
    comparison: Comparison, computes: Sequence[float], finetuned: FoldedWeights | None, ablations: bool = True
) -> list[OperatingPoint]:
    """Dense first, then an adapter with block routing at every share of the dense FLOPs, with and without reuse.

    With `ablations` also its other ways to decide ("static" is the same mean cost without adaptation to the sample, "step"
    decides by the step before) and the hard cap.
    """
    name = "tokens+blocks" if comparison.routed.config.tokens is not None else "blocks"
    points = [comparison.dense()]
    if finetuned is not None:
        points.append(comparison.finetuned(finetuned))
    config = comparison.routed.config
    needs_reuse = (config.tokens is not None and config.tokens.sees_drift) or comparison.routed.gates is None
    without: Variant = {"reuse": config.reuse if needs_reuse else None}
    for compute in computes:
        if not needs_reuse:
            points.append(comparison.routed_point(name, compute=compute, variant=without))
        reuse = {"reuse": config.reuse or Reuse()}
        points.append(comparison.routed_point(f"{name}+reuse", compute=compute, variant=reuse))
        if ablations and comparison.routed.gates is not None:
            for decide in ("static", "step"):
                blocks = {"blocks": {"decide": decide}}
                points.append(comparison.routed_point(f"{name}-{decide}", compute=compute, variant=without | blocks))
            points.append(comparison.routed_point(f"{name}-cap", compute=compute, cap=True, variant=without))
    return points


def with_fewer_steps(comparison: Comparison, points: Sequence[OperatingPoint], apart: int = 1) -> list[OperatingPoint]:
    """`points`, and dense with as many steps as fit into the time, and into the plan, of each routed one.

    Of step counts that are less than `apart` apart, only the larger stands.
    """
    routed = [point for point in points if point.method.startswith(("tokens", "blocks"))]
    chosen: list[OperatingPoint] = []
    for point in comparison.fewer_steps(routed):
        if not chosen or chosen[-1].steps - point.steps >= apart:
            chosen.append(point)
    return [*points, *chosen]
