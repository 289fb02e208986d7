"""What inference needs to decide which tokens a block runs: plain PyTorch, no model family, no diffusers."""

from shivelight.routing.ratio_policy import RatioPolicy, solve_anchor
from shivelight.routing.schedule import Schedule, schedule_from_logits, schedule_within_cost, uniform_schedule
from shivelight.routing.select import check_scores, count_unit, keep_count, token_mask, top_k_indices
from shivelight.routing.token_router import PairRouter, TokenRouter

__all__ = [
    "PairRouter",
    "RatioPolicy",
    "Schedule",
    "TokenRouter",
    "check_scores",
    "count_unit",
    "keep_count",
    "schedule_from_logits",
    "schedule_within_cost",
    "solve_anchor",
    "token_mask",
    "top_k_indices",
    "uniform_schedule",
]
