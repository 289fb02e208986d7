"""What a generation may cost, what it is expected to, and what both go by: budgets, plans, tables and fits of an attached model."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from shivelight.adapter import backbone_of, routed_of
from shivelight.calibration import SECONDS, FittedRests, Tables, fit_rests, usual_load
from shivelight.config import UNTRAINED, RestPlan
from shivelight.errors import BudgetError, ShivelightError
from shivelight.execution.compiled import CompiledRegions
from shivelight.execution.context import GRID, is_set
from shivelight.execution.latency_table import LatencyTable
from shivelight.execution.planning import Budget
from shivelight.execution.routed import Routed
from shivelight.pipelines import call_default, draw
from shivelight.routing import Schedule


def set_budget(
    model: Any,
    *,
    keep: float | None = None,
    compute: float | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    threshold: float | None = None,
    cap: bool = False,
) -> Any:
    """Bound what every generation from now on may cost; no retraining.

    Args:
        model: an attached pipeline or transformer.
        keep: mean token keep ratio over steps and routed blocks, in (0, 1]; 1.0 runs all tokens.
        compute: mean share of the dense blocks' FLOPs, in (0, 1], over all that is routed; gates and widths, which samples
            decide for themselves, are set so that it is met on average (by what the routers said in training).
        speedup: how many times faster than dense the backbone runs a generation, at least 1.
        latency_ms: milliseconds that the backbone may take for a generation, all its steps and guidance passes together: the time
            that one waits for, whatever the number of steps. Of a bare transformer, for one pass, on average over timesteps.
            Budgets of time are solved when a generation begins, at its steps and shape, from the latency table of this device
            (`calibrate`), which is measured there and then (some seconds) if there is none.
        threshold: E-DiT's own knob, alone or with `keep`: blocks run where their router's probability is at least this.
        cap: with `compute`: no sample exceeds it, at the price of what its late steps would have run.

    Raises:
        BudgetError: not exactly one of keep, compute, speedup and latency_ms, out of range, or not reachable; the message says
            the nearest that is. That a time cannot be reached is known, and said, when a generation begins.
    """
    routed = routed_of(model)
    budget = _budget({"keep": keep, "compute": compute, "speedup": speedup, "latency_ms": latency_ms}, threshold, cap)
    if routed.config.tokens is None and routed.config.blocks is None and not budget.everything:
        raise BudgetError("The attached adapter has no routing, so it always runs everything: keep=1.0.", nearest=1.0)
    if routed.config.tokens is None and budget.kind == "keep" and budget.value < 1:
        raise BudgetError("The attached adapter routes no tokens; bound it by compute= or threshold=.", nearest=1.0)
    if routed.gates is None and (budget.threshold is not None or budget.cap):
        raise BudgetError("The attached adapter has no block routers: threshold= and cap=True are about those.")
    if budget.cap and routed.clock.pipeline is None:
        raise BudgetError(
            "cap=True bounds a whole generation, and a bare transformer does not know where one begins. Attach to the pipeline."
        )
    if budget.timed:
        _tables(model)
    elif routed.routed:
        # Raises if it cannot be reached. The length of the text is known once a picture was made; until then, the least.
        tokens, text_tokens = routed.shape
        # What goes by earlier steps has none at the first; how many will follow is not known here.
        steps = (500.0,) * (1 if routed.config.blocks is None else 50)
        routed.planned_ratio(steps, tokens, text_tokens if routed.shape_seen else 0, budget)
    routed.budget = budget
    return model


def _budget(asked: dict[str, float | None], threshold: float | None, cap: bool) -> Budget:
    given = {kind: value for kind, value in asked.items() if value is not None}
    if threshold is not None and not given:
        given = {"keep": 1.0}
    if len(given) != 1:
        raise BudgetError(
            "Give exactly one of keep=, compute=, speedup= and latency_ms=, for example set_budget(model, keep=0.6)."
        )
    ((kind, value),) = given.items()
    if cap and kind != "compute":
        raise BudgetError("cap=True bounds compute=; give that one.")
    if threshold is not None and kind != "keep":
        raise BudgetError(f"{kind}= chooses the threshold itself; give threshold= alone or with keep=.")
    return Budget(kind, value, threshold, cap)  # type: ignore[arg-type]


def calibrate(
    model: Any,
    *,
    tokens: int | None = None,
    text_tokens: int | None = None,
    samples: int | None = None,
    guided: bool | None = None,
    seconds: float = SECONDS,
    anew: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LatencyTable:
    """The latency table that budgets of time go by: how long each kind of block takes on this device, by how much of it runs.

    Measured on random input of the shape at hand, in some seconds, and kept on disk ($SHIVELIGHT_CACHE, by default
    ~/.cache/shivelight) for each device, precision, shape, batch, compile mode, backbone and routing.

    Args:
        model: an attached pipeline or transformer.
        tokens: N, image tokens; those of the last generation, or the backbone's own size.
        text_tokens: likewise.
        samples: pictures of one call; as in the last generation, or 1.
        guided: whether classifier-free guidance doubles the batch; as in the last generation, or as the family does.
        seconds: to take about; noisy machines need more.
        anew: measure even if there is a table.
        progress: told of each timed pass.

    Returns:
        A table that prints itself.
    """
    routed = routed_of(model)
    if not routed.routed:
        raise BudgetError("The attached adapter has no routing, so there is nothing to solve for.", nearest=1.0)
    load = usual_load(routed, samples, guided)
    load = replace(
        load,
        tokens=load.tokens if tokens is None else tokens,
        text_tokens=load.text_tokens if text_tokens is None else text_tokens,
    )
    return _tables(model)(load, True, anew=anew, seconds=seconds, progress=progress)


def fit_stand_ins(
    model: Any,
    prompts: Sequence[str] = (),
    *,
    steps: int | None = None,
    computes: Sequence[float] = (0.75, 0.5),
    guidance: float | None = None,
    rank: int = 32,
    unmended: float = 0.5,
    seed: int = 5_000_000,
    generate: Callable[[], object] | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> list[FittedRests]:
    """Fit what stands in for the blocks at steps at rest, on one's own prompts: no data set and no gradients, one generation for
    each budget. Most is gained where steps are few. `save_adapter` keeps it, as a few megabytes.

    Args:
        model: a pipeline with `RoutingConfig.training_free(axis="blocks")` attached.
        prompts: of what is usually drawn. All are one batch: as many as memory takes, dozens of small pictures or some large ones.
        steps: of sampling, which are those of use later; generations of other numbers of steps go on as before.
        computes: budgets, shares of the dense FLOPs. What is fitted adds to what runs: ask for `FittedRests.compute` later.
        guidance: scale; the pipeline's default for None. With `generate`, say which it takes: where both branches are one batch,
            what is fitted is what guidance makes of them.
        rank: of the maps.
        unmended: share of what a map adds to the last output that is used at steps after the last run, where no block runs any more
            to mend its texture: 1 comes nearest to the dense picture by PSNR, a half keeps KID (docs/decisions/few-steps.md).
        seed: of the first prompt's noise; keep it apart from those that judge.
        generate: runs one generation, in the place of prompts and what goes with them, where a call needs more than those.
        progress: told of each map.
        options: further arguments of the pipeline call.

    Returns:
        What was fitted, for each budget at which steps rest.

    Raises:
        ShivelightError: what is attached does not rest as a whole, no step rested, or there is nothing to draw.
        BudgetError: a budget cannot be reached in so few steps.
    """
    routed = routed_of(model)
    if generate is None:
        if not prompts or steps is None:
            raise ShivelightError("fit_stand_ins needs prompts and steps=, or generate=, which runs one generation.")
        generate = partial(
            draw, routed.clock.pipeline, prompts, range(seed, seed + len(prompts)), steps, guidance,
            **{"output_type": "latent"} | options,
        )  # fmt: skip
    if guidance is None:  # its own default, where the pipeline tells
        guidance = call_default(routed.clock.pipeline, "guidance_scale")
    return fit_rests(routed, generate, computes, rank, unmended, guidance, progress)


def _tables(model: Any) -> Any:
    """Where the latency tables of an attached model come from, from now on."""
    backbone = backbone_of(model)
    routed = routed_of(backbone)
    if routed.settling.stopwatch is None:
        routed.settling.stopwatch = Tables(weakref.ref(backbone), routed)
    return routed.settling.stopwatch


def current_schedule(model: Any, steps: int | None = None) -> Schedule:
    """The integers that a generation follows: kept tokens per step and routed block.

    Args:
        model: an attached pipeline or transformer with token routing.
        steps: number of sampling steps; the scheduler's current timesteps (else the 1000-point grid) by default.
    """
    routed = routed_of(model)
    if routed.config.tokens is None:
        raise BudgetError("The attached adapter has no token routing, so there is no schedule.")
    times, budget = _timesteps(routed, steps), routed.budget
    if budget.timed and routed.settling.load is not None:
        budget = routed.settling.settled(budget, times, routed.settling.load) or budget
    return routed.schedule(routed.request(times, *routed.shape, budget))


def _timesteps(routed: Routed, steps: int | None) -> tuple[float, ...]:
    """Those of the next generation, of this many steps or as the scheduler holds them."""
    scheduler = getattr(routed.clock.pipeline, "scheduler", None)
    if steps is not None:
        if scheduler is None:
            raise BudgetError("A bare transformer has no sampling steps; attach to the pipeline, or leave `steps` out.")
        probe = type(scheduler).from_config(scheduler.config)
        probe.set_timesteps(steps)
        return tuple(float(t) for t in probe.timesteps.tolist())
    if scheduler is not None and is_set(scheduler):
        begin = getattr(scheduler, "begin_index", None) or 0
        return tuple(float(t) for t in scheduler.timesteps[begin:].tolist())
    return GRID


def planned_ratio(model: Any, steps: int | None = None) -> float | None:
    """Planned FLOPs of the next generation over those of the dense blocks.

    With gates, as expected from their records; None where there are none (weights of others at a threshold of their own).
    """
    routed = routed_of(model)
    return routed.planned_ratio(_timesteps(routed, steps), *routed.shape) if routed.routed else 1.0


def summary(model: Any) -> str:
    """What is attached, how large it is, and what it is expected to cost."""
    backbone = backbone_of(model)
    routed = routed_of(backbone)
    own = sum(p.numel() for p in routed.parameters()) + sum(
        t.numel() for delta in routed.deltas.values() for t in (delta.down, delta.up, delta.magnitude)
    )
    whole = sum(p.numel() for p in backbone.parameters()) - sum(p.numel() for p in routed.parameters())
    lines = [
        f"{type(backbone).__name__} ({routed.spec.name}), {len(routed.planner.costs)} blocks, {whole / 1e6:.1f} M parameters",
        f"adapter: {own / 1e6:.3f} M parameters ({100 * own / whole:.2f}% of the backbone), "
        f"{len(routed.deltas)} linears with DoRA deltas{_in_force(routed)}",
    ]
    if routed.config.activation is not None:
        lines.append(f"activation of the image MLPs: {routed.config.activation}, also while dense")
    if not routed.routed:
        return "\n".join([*lines, "no routing: every token runs in every block"])
    tokens, blocks, reuse, budget = routed.config.tokens, routed.config.blocks, routed.config.reuse, routed.budget
    lines.append(f"routed blocks: {routed.routed[0]} to {routed.routed[-1]}")
    if tokens is not None:
        lines.append(f"tokens: scores {tokens.scores}, ratios {tokens.ratios}, guidance {tokens.cfg_scores}")
    if blocks is not None:
        lines.append(
            f"blocks: {UNTRAINED[blocks.router]}"
            if routed.gates is None
            else f"blocks: {blocks.router} routers decide by {blocks.decide}, guidance {blocks.cfg_gates}; MLP widths "
            f"{', '.join(f'{width:g}' for width in blocks.widths)}; {routed.gates.records.filled} records"
        )
    if reuse is not None:
        lines.append(
            f"reuse: residuals up to {reuse.max_age} steps old, warm-up of {reuse.warmup:.0%} of the steps, forecasts between "
            f"runs less than {reuse.forecast:.0%} of the steps apart; "
            f"{routed.residuals.megabytes:.1f} MB held of at most {reuse.max_cache_mb:g}"
        )
    if (stand_ins := routed.config.stand_ins) is not None:
        fitted = ", ".join(map(told_runs, stand_ins.plans))
        lines.append(f"at rest: maps of rank {stand_ins.rank} where so many steps run: {fitted}")
    gates = "" if budget.threshold is None else f", threshold = {budget.threshold}"
    planned = planned_ratio(backbone)
    unknown = "known once a picture was made" if budget.timed else "unknown (no statistics of the routers)"
    known = unknown if planned is None else f"{planned:.4f} of dense"
    lines += [
        f"budget: {budget.kind} = {budget.value}{gates}{' (hard cap)' if budget.cap else ''}{_comes_to(routed)}",
        f"planned FLOPs: {known}, at {routed.shape[0]} image and {routed.shape[1]} text tokens"
        + ("" if routed.shape_seen else " (assumed until the first picture)"),
    ]
    if routed.spending.ratio is not None:
        acted = ", ".join(f"{action} {count}" for action, count in routed.spending.actions.items() if count)
        lines.append(f"realised by the last generation: {routed.spending.ratio:.4f} of dense ({acted})")
    if isinstance(routed.regions, CompiledRegions):
        lines.append(f"compiled: {routed.regions}")
    if routed.replays is not None:
        lines.append(f"CUDA graphs: {routed.replays}")
    if tokens is not None and not (budget.timed and planned is None):
        lines.append(f"schedule: {current_schedule(backbone)}")
    return "\n".join(lines)


def _in_force(routed: Routed) -> str:
    deltas = routed.config.deltas
    plans = () if deltas is None else deltas.plans
    return f", in force where so many steps run: {', '.join(map(told_runs, plans))}" if plans else ""


def told_runs(plan: RestPlan) -> str:
    """Which steps of a generation run, in words."""
    part = " and a part" if plan.partial and not plan.rear else f" and {plan.rear} blocks" if plan.rear else ""
    return f"{len(plan.runs)}{part} of {plan.steps}"


def _comes_to(routed: Routed) -> str:
    """What a budget of time is in FLOPs for the next generation, where that is known."""
    if not routed.budget.timed or routed.settling.load is None:
        return ""
    settled = routed.settling.settled(routed.budget, _timesteps(routed, None), routed.settling.load)
    return "" if settled is None else f" (compute = {settled.value})"
