"""What inference needs to decide how much of a block runs: plain PyTorch, no model family, no diffusers."""

from shivelight.routing.block_router import (
    BLOCK_ROUTERS,
    DEFAULT_WIDTHS,
    BlockRouter,
    ElasticDiTRouter,
    GateLogits,
    gate_probability,
    width_choice,
)
from shivelight.routing.gate_records import Dial, GateRecords
from shivelight.routing.ratio_policy import RatioPolicy, solve_anchor
from shivelight.routing.schedule import Schedule, schedule_from_logits, schedule_within_cost, uniform_schedule
from shivelight.routing.select import check_scores, count_unit, keep_count, token_mask, top_k_indices
from shivelight.routing.token_router import PairRouter, TokenRouter

__all__ = [
    "BLOCK_ROUTERS",
    "DEFAULT_WIDTHS",
    "BlockRouter",
    "Dial",
    "ElasticDiTRouter",
    "GateLogits",
    "GateRecords",
    "PairRouter",
    "RatioPolicy",
    "Schedule",
    "TokenRouter",
    "check_scores",
    "count_unit",
    "gate_probability",
    "keep_count",
    "schedule_from_logits",
    "schedule_within_cost",
    "solve_anchor",
    "token_mask",
    "top_k_indices",
    "uniform_schedule",
    "width_choice",
]
