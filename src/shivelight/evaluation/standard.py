"""The standard tables: dense, dense fine-tuned, adapters of tokens and blocks, baselines, and fewer steps."""

import math
from collections.abc import Sequence
from typing import Literal

from shivelight.config import Reuse, RoutingConfig
from shivelight.errors import BudgetError, ShivelightError
from shivelight.evaluation.comparison import Adapter, Comparison, OperatingPoint, Variant
from shivelight.execution.folding import FoldedWeights

BASELINE_KEEPS = (0.8, 0.6, 0.5)


def references(comparison: Comparison, finetuned: FoldedWeights | None) -> list[OperatingPoint]:
    """What everything is compared with: dense first, then dense fine-tuned where there is one."""
    return [comparison.dense()] + ([] if finetuned is None else [comparison.finetuned(finetuned)])


def token_points(
    comparison: Comparison, keeps: Sequence[float], baseline_keeps: Sequence[float] = BASELINE_KEEPS
) -> list[OperatingPoint]:
    """The attached adapter of token routing at its keep ratios, its baselines, and routing without training.

    The baselines may spend as many planned FLOPs as routing does (attention is quadratic, so equal keep ratios would not be
    equal cost). They run on the tuned weights of the adapter, which were trained for the learned router: that favours them
    over the same baselines on the backbone's own weights.
    """
    points = []
    reuses = "+reuse" if comparison.routed.config.reuse is not None else ""
    baselines: dict[str, Variant] = {"fixed": {}, "random": {"scores": "random"}, "norm": {"scores": "norm"}}
    tokens = comparison.routed.config.tokens
    if tokens is not None and tokens.ratios == "fixed":
        del baselines["fixed"]  # it is the adapter itself
    for keep in keeps:
        points += adapter_points(comparison, None, keep=keep)
        if keep in baseline_keeps:
            plan = planned_compute(comparison, keep)
            points.append(comparison.training_free(keep=keep))
            for name, scores in baselines.items():
                variant = {"ratios": "fixed"} | scores
                points.append(comparison.routed_point(name + reuses, compute=plan, variant=variant))
    return points


def planned_compute(comparison: Comparison, keep: float) -> float:
    """The share of the dense FLOPs that the attached adapter plans at a keep ratio, rounded down to four digits."""
    return math.floor(1e4 * (comparison.planned(comparison.tokens(keep)) or 1.0)) / 1e4


def adapter_points(
    comparison: Comparison, adapter: Adapter | None, ablations: bool = True, **budget: float
) -> list[OperatingPoint]:
    """An adapter at a budget, with and without reuse: block routers can do either, tokens do as they were trained.

    Args:
        comparison: of the backbone.
        adapter: another one than the attached one, or None for that one.
        ablations: of block routers also their other ways to decide ("static" is the same mean cost without adaptation to the
            sample, "step" decides by the step before) and the hard cap.
        budget: keep= or compute=, as for `set_budget`.
    """
    routed = comparison.routed if adapter is None else adapter[0]
    if not routed.routed:
        raise ShivelightError("An adapter without routing (dense fine-tuned) stands in the table as --finetuned.")
    config, name = routed.config, method_name(routed.config)

    def point(method: str, cap: bool = False, **variant: object) -> OperatingPoint:
        return comparison.on(adapter, comparison.routed_point(method, cap=cap, variant=variant, **budget))

    if routed.gates is None or "keep" in budget:
        return [point(f"{name}+reuse" if config.reuse is not None and config.stand_ins is None else name)]
    # Trained with reuse, they cannot do without.
    bound = config.closed_reuse or (config.tokens is not None and config.tokens.sees_drift)
    without: Variant = {"reuse": config.reuse if bound else None}
    points = [] if bound else [point(name, **without)]
    points.append(point(f"{name}+reuse", reuse=config.reuse or Reuse()))
    if ablations:
        for decide in ("static", "step"):
            points.append(point(f"{name}-{decide}", **without, blocks={"decide": decide}))
        points.append(point(f"{name}-cap", cap=True, **without))
    return points


def method_name(config: RoutingConfig) -> str:
    """What an adapter is called in results.json, but for reuse."""
    partial = config.blocks is not None and config.blocks.partial
    fitted = {False: "blocks-fitted", "tokens": "blocks-part", "rear": "blocks-rear"}[partial]
    if config.deltas is not None:
        fitted = f"{fitted.removesuffix('-fitted')}-tuned"
    blocks = "blocks-refresh" if config.closed_reuse else fitted if config.stand_ins is not None else "blocks"
    axes = {"tokens": config.tokens, blocks: config.blocks}
    return "+".join(axis for axis, settings in axes.items() if settings is not None)


def training_free_points(comparison: Comparison, **budget: float) -> tuple[list[OperatingPoint], list[str]]:
    """Routing without training, of tokens, of blocks and of both, at a budget; and why, where one of them cannot serve it."""
    points, reasons = [], []
    axes: tuple[Literal["tokens", "blocks", "both"], ...] = ("tokens", "blocks", "both")
    for axis in axes:
        if axis != "blocks" and comparison.routed.spec.no_tokens:
            reasons.append(f"training-free {axis}: {comparison.routed.spec.no_tokens}")
            continue
        point = comparison.training_free(axis, **budget)
        try:
            comparison.planned(point)
        except BudgetError as error:  # its first step runs everything, which few steps cannot make up for
            reasons.append(f"{point.name}: {error}")
        else:
            points.append(point)
    return points, reasons


def with_fewer_steps(
    comparison: Comparison, points: Sequence[OperatingPoint], apart: int = 1, rounds: int = 3
) -> list[OperatingPoint]:
    """`points`, and dense with as many steps as fit into the time, and into the plan, of each routed one.

    Args:
        comparison: of the points.
        points: the table so far.
        apart: of step counts that are less than this apart, only the larger stands.
        rounds: by which the time of the routed ones is found.
    """
    routed = [point for point in points if point.method.startswith(("tokens", "blocks"))]
    chosen: list[OperatingPoint] = []
    for point in comparison.fewer_steps(routed, rounds):
        if not chosen or chosen[-1].steps - point.steps >= apart:
            chosen.append(point)
    return [*points, *chosen]
