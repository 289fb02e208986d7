"""Maps that stand in for all blocks at steps at rest, fitted to a pipeline on the user's own prompts: one generation for each
budget, no data set, no gradients.

The generation is walked as it will be: at a step at rest the blocks run once more, to be learned from, and the map that is fitted
to them there stands in for them, so that later maps are fitted to what earlier ones leave behind.

Shapes: B samples, N image tokens, D width, K known values, r rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shivelight.config import RestPlan, StandIns
from shivelight.errors import ShivelightError
from shivelight.execution.planning import Budget
from shivelight.execution.routed import Routed
from shivelight.execution.stand_ins import NeedScore, StandInMap, StandInMaps, places

# Of the mean square of a value; which of them, or no map between channels at all, is decided on samples that were held back.
RIDGES = (1e-4, 1e-3, 1e-2)
# One of so many samples is held back meanwhile.
_HELD = 4
_CHUNK = 16_384  # tokens

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FittedRests:
    """What was fitted for one budget.

    Attributes:
        plan: steps, and those that run.
        compute: share of the dense FLOPs that it takes: the least budget that has it.
        left: at each step at rest, the mean square error of the whole map over that of the last output, on samples held back (on
            all, of a single one).
    """

    plan: RestPlan
    compute: float
    left: tuple[float, ...]


class Regression:
    """What is regressed at one step: the last output's error, first on each channel's own values, then on all channels'.

    Args:
        values: the K values [n, D] in fp32; the third is the last output.
        out: what the blocks made [n, D].
    """

    def __init__(self, values: Sequence[Tensor], out: Tensor) -> None:
        self.means = [value.mean(0) for value in values]
        target = out - values[2]
        self.middle = target.mean(0)
        centred = [value - mean for value, mean in zip(values, self.means, strict=True)]
        self.scale = factors(centred, target - self.middle)
        left = target - self.middle
        for value, factor in zip(centred, self.scale, strict=True):
            left = left - value * factor
        self.inner, self.cross = moments(torch.cat(centred, dim=1), left)

    def map(self, ridge: float | None, rank: int) -> StandInMap:
        """With this ridge between channels; None leaves each channel to itself."""
        known, width = self.scale.shape
        bias = self.middle - sum(mean * factor for mean, factor in zip(self.means, self.scale, strict=True))
        parts = {"scale": self.scale, "bias": bias}
        if ridge is not None:
            down, up = reduced(self.inner, self.cross, ridge, rank)
            shift = -(torch.cat(self.means) @ down)
            parts |= {"down": down.view(known, width, rank), "shift": shift, "up": up}
        found = StandInMap(known, width, rank).to(self.middle.device)
        found.set(parts)
        return found


def factors(values: Sequence[Tensor], target: Tensor, ridge: float = 1e-4) -> Tensor:
    """For each channel by itself, the factors [K, D] of its K values that come nearest to the target; all [n, D], without means."""
    known = torch.stack(list(values), dim=-1)  # [n, D, K]
    inner = torch.einsum("ndk,ndl->dkl", known, known).double()
    cross = torch.einsum("ndk,nd->dk", known, target).double()
    return torch.linalg.solve(_ridged(inner, ridge), cross[..., None])[..., 0].T.float()


def moments(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """inputs^T inputs [P, P] and inputs^T target [P, D] of rows [n, P] and [n, D], in float64 from one chunk to the next."""
    inner = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    cross = inputs.new_zeros(inputs.shape[1], target.shape[1], dtype=torch.float64)
    for x, y in zip(inputs.split(_CHUNK), target.split(_CHUNK), strict=True):
        inner += x.T @ x
        cross += x.T @ y
    return inner, cross


def reduced(inner: Tensor, cross: Tensor, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression of these moments: (down [P, r], up [r, D]), whose product is the ridge regression's as far as that
    rank can say what it gives (Izenman, 1975)."""
    whole = torch.linalg.solve(_ridged(inner, ridge), cross)
    directions = torch.linalg.eigh(whole.T @ inner @ whole).eigenvectors[:, -rank:]
    return (whole @ directions).float(), directions.T.float()


def _ridged(inner: Tensor, ridge: float) -> Tensor:
    """With a ridge as a share of the mean square; never singular."""
    size = inner.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return inner + ridge * size[..., None, None] * torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)


def fit_map(values: Sequence[Tensor], out: Tensor, rank: int) -> tuple[StandInMap, float]:
    """The map of one step (`execution/stand_ins.py`): a factor for each channel by least squares, then what channels say of each
    other by reduced-rank regression, as far as that helps samples that are held back.

    Args:
        values: the K values [B, N, D]; the third is the last output.
        out: what the blocks made [B, N, D].
        rank: r, at most D.

    Returns:
        The map, in fp32, and the mean square error that is left, over that of the last output, on samples held back (on all, of a
        single one).
    """

    def rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
        return (tensor if chosen is None else tensor[chosen]).float().flatten(0, 1)

    def regression(chosen: Tensor | None) -> Regression:
        return Regression([rows(value, chosen) for value in values], rows(out, chosen))

    def left(found: StandInMap, chosen: Tensor | None) -> float:
        own, made = [rows(value, chosen) for value in values], rows(out, chosen)
        return float((found(own) - made).square().mean() / (own[2] - made).square().mean().clamp(min=1e-30))

    everything = regression(None)
    if len(out) == 1:
        found = everything.map(RIDGES[1], rank)
        return found, left(found, None)
    held = torch.arange(len(out), device=out.device) % _HELD == min(_HELD, len(out)) - 1
    trial = regression(~held)
    tried = {ridge: left(trial.map(ridge, rank), held) for ridge in (None, *RIDGES)}
    best = min(tried, key=lambda ridge: tried[ridge])
    return everything.map(best, rank), tried[best]


def fit_need(found: StandInMap, values: Sequence[Tensor], out: Tensor) -> NeedScore:
    """What ranks tokens by how far off a map is: ridge regression of the length of its error on the K values.

    Args:
        found: the map.
        values: the K values [B, N, D].
        out: what the blocks made [B, N, D].
    """
    known = torch.cat([value.float().flatten(0, 1) for value in values], dim=1)
    error = torch.linalg.vector_norm((found([value.float() for value in values]) - out.float()), dim=-1).flatten()
    inner, cross = moments(known - known.mean(0), (error - error.mean())[:, None])
    need = NeedScore(*found.scale.shape).to(found.scale.device)
    need.weight.copy_(torch.linalg.solve(_ridged(inner, RIDGES[1]), cross).float().view_as(need.weight))
    return need


class Fitting:
    """A `RestSession`: fits a map at each pass of each step at rest, as the generation comes there.

    Args:
        rank: of the maps.
        unmended: share of what a map adds to the last output that is used after the last run.
        guidance: scale w of classifier-free guidance, where both branches are one batch: what is fitted is what guidance makes of
            them, (1 - w) unconditional + w conditional, since one map serves both and nothing else of them is used.
        progress: told of each.
    """

    def __init__(
        self, rank: int, unmended: float = 1.0, guidance: float | None = None, progress: Progress | None = None
    ) -> None:
        self.rank, self.unmended, self.guidance, self.progress = rank, unmended, guidance, progress
        self.plan: RestPlan | None = None
        self.maps: dict[tuple[int, int], StandInMap] = {}
        self.scores: dict[tuple[int, int], NeedScore] = {}
        self.left: dict[int, float] = {}

    def fit(self, plan: RestPlan, step: int, call: int, values: Sequence[Tensor], out: Tensor, paired: bool) -> Tensor:
        """What the new map says [B, N, D]."""

        def guided(both: Tensor) -> Tensor:
            if not paired or self.guidance is None:
                return both
            free, kept = both.float().chunk(2)
            return torch.lerp(free, kept, self.guidance)

        known, made = [guided(value) for value in values], guided(out)
        found, left = fit_map(known, made, self.rank)
        mended = plan.rear_at(step) > 0  # by the blocks that run next
        if step == plan.partial and not mended:
            self.scores[step, call] = fit_need(found, known, made).to(out.dtype)
        if step > plan.runs[-1] and not mended:
            found.weaken(self.unmended)
        found = self.maps[step, call] = found.to(out.dtype)
        self.plan = replace(plan, passes=max(call + 1, 1 if self.plan is None else self.plan.passes))
        self.left.setdefault(step, left)
        if self.progress is not None:
            self.progress(f"step {step + 1} of {plan.steps}")
        return found(values)

    def needs(self, step: int, call: int, values: Sequence[Tensor]) -> Tensor:
        """By the score that was fitted."""
        return self.scores[step, call](values)


@torch.no_grad()
def fit_rests(
    routed: Routed,
    generate: Callable[[], object],
    computes: Sequence[float],
    rank: int,
    unmended: float,
    guidance: float | None,
    progress: Progress | None = None,
) -> list[FittedRests]:
    """What `shivelight.fit_stand_ins` does, on generations that `generate` runs."""
    if not 0 <= unmended <= 1:
        raise ShivelightError(f"unmended is {unmended}; give a share in [0, 1].")
    config = routed.config
    if not config.together or config.reuse is None or config.reuse.whole != "output":
        raise ShivelightError(
            "Stand-ins are fitted where all blocks run or rest together, and nothing is attached that does so. Attach "
            'RoutingConfig.training_free(compute=0.5, axis="blocks") first.'
        )
    fitted = {}
    budget, enabled, earlier = routed.budget, routed.enabled, routed.stand_ins
    try:
        routed.enable(True)
        routed.set_stand_ins(None)  # nothing that is there has a say in what is fitted
        for compute in computes:
            routed.budget, routed.fitting = Budget("compute", compute), Fitting(rank, unmended, guidance, progress)
            generate()
            if routed.fitting.plan is not None:
                fitted[routed.fitting.plan] = routed.fitting
    finally:
        routed.budget, routed.fitting = budget, None
        routed.set_stand_ins(earlier)
        routed.enable(enabled)
        routed.reset()
    if not fitted:
        raise ShivelightError(
            f"No step rested under the budgets {', '.join(map(str, computes))}. Give smaller ones, or more room "
            f"(Reuse.max_cache_mb is {config.reuse.max_cache_mb:g}); a bare transformer has no steps that rest."
        )
    routed.set_stand_ins(_joined(routed, fitted, rank))
    return [
        FittedRests(plan, _compute(routed, plan), tuple(left for _, left in sorted(fitting.left.items())))
        for plan, fitting in fitted.items()
    ]


def fitted_computes(routed: Routed, steps: int) -> tuple[float, ...]:
    """The least budgets that run what was fitted for so many steps, at the backbone's own size (or that of the last generation);
    of deltas that are there, those that they were tuned for."""
    plans = () if routed.stand_ins is None else routed.stand_ins.config.plans
    tuned = () if routed.config.deltas is None else routed.config.deltas.plans
    chosen = [plan for plan in plans if plan.steps == steps and (not tuned or any(plan.like(own) for own in tuned))]
    return tuple(_compute(routed, plan) for plan in chosen)


def _joined(routed: Routed, fitted: dict[RestPlan, Fitting], rank: int) -> StandInMaps:
    """Maps that were there, of other plans, and the new ones."""
    earlier = routed.stand_ins
    new = {plan.key for plan in fitted}
    kept = () if earlier is None else tuple(plan for plan in earlier.config.plans if plan.key not in new)
    if kept and earlier is not None and earlier.config.rank != rank:
        raise ShivelightError(
            f"The maps that are there have rank {earlier.config.rank}, those asked for {rank}. Give rank="
            f"{earlier.config.rank}, or attach anew."
        )
    first = next(own for fitting in fitted.values() for own in fitting.maps.values())
    maps = StandInMaps(StandIns(rank, (*kept, *fitted)), first.bias.shape[0]).to(first.bias)
    for plan in maps.config.plans:
        for _, step, call in places(plan):
            own = fitted[plan].maps.get((step, call)) if plan in fitted else None
            need = fitted[plan].scores.get((step, call)) if plan in fitted else None
            if own is None and earlier is not None:
                own, need = earlier.find(plan, step, call), earlier.need(plan, step, call)
            if own is not None:  # else it stays what it is when new: the last output
                maps.put(plan, step, call, own, need)
    return maps


def _compute(routed: Routed, plan: RestPlan) -> float:
    """The least budget, as a multiple of 1e-4, that runs a plan and what stands in where it rests, whatever the prompt; half of
    the tokens where it runs in part."""
    assert routed.stand_ins is not None
    # The shorter the text, the larger is the maps' share; the longer, that of half of the image tokens.
    return max(_share(routed, plan, text_tokens) for text_tokens in (0, routed.shape[1]))


def _share(routed: Routed, plan: RestPlan, text_tokens: int) -> float:
    assert routed.stand_ins is not None
    tokens, planner = routed.shape[0], routed.planner
    dense, always = planner.dense_flops(tokens, text_tokens)
    spent = always * plan.steps + (dense - always) * len(plan.runs) + sum(routed.stand_ins.flops(plan, tokens))
    if plan.rear:
        spent += sum(planner.costs[block].flops(tokens, text_tokens) for block in planner.routed[-plan.rear :])
    elif plan.partial:
        half = math.ceil(tokens / 2)
        spent += sum(planner.costs[block].flops(half, text_tokens, attended=tokens) for block in planner.routed)
    return math.ceil(1e4 * spent / (dense * plan.steps)) / 1e4
