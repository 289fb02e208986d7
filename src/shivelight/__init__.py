"""Shivelight makes Diffusion Transformers compute only where it matters."""

from shivelight.adapter import attach, branch, compile, dense, detach
from shivelight.adapter_files import load_adapter, push_to_hub, save_adapter
from shivelight.backbones import BackboneSpec, register_backbone
from shivelight.budgets import calibrate, current_schedule, fit_stand_ins, planned_ratio, set_budget, summary
from shivelight.calibration import FittedRests
from shivelight.config import BlockRouting, DeltaConfig, RestPlan, Reuse, RoutingConfig, StandIns, TokenRouting
from shivelight.errors import (
    AdapterError,
    BudgetError,
    DataError,
    ShivelightError,
    TrainingError,
    UnsupportedBackboneError,
)

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "BackboneSpec",
    "BlockRouting",
    "BudgetError",
    "DataError",
    "DeltaConfig",
    "FittedRests",
    "RestPlan",
    "Reuse",
    "RoutingConfig",
    "ShivelightError",
    "StandIns",
    "TokenRouting",
    "TrainingError",
    "UnsupportedBackboneError",
    "attach",
    "branch",
    "calibrate",
    "compile",
    "current_schedule",
    "dense",
    "detach",
    "fit_stand_ins",
    "load_adapter",
    "planned_ratio",
    "push_to_hub",
    "register_backbone",
    "save_adapter",
    "set_budget",
    "summary",
]
