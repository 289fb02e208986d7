"""Every family under every solver that its pipeline takes: the plan is known before the first step, and it is what happens."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES, build
from matrix_help import NAMES, TOKENS, decided, free
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Of flow matching, and of diffusion.
SOLVERS = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "flow-heun": FlowMatchHeunDiscreteScheduler,
    "flow-dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "flow-unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "flow-lcm": FlowMatchLCMScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "dpm-single": DPMSolverSinglestepScheduler,
    "unipc": UniPCMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
}
DIFFUSION = ("dit", "pixart")
# Some pipelines hand over noise levels, which these solvers of diffusers' do not take.
NOT_TAKEN = {
    "flow-heun": ("flux", "flux2", "qwen-image"),
    "flow-dpm": ("qwen-image",),
}
TAKEN = [
    (name, solver)
    for name in NAMES
    for solver in SOLVERS
    if solver.startswith("flow") == (name not in DIFFUSION) and name not in NOT_TAKEN.get(solver, ())
]
# Heun calls the backbone twice a step, but for the last one.
CALLS = {"flow-heun": 2, "heun": 2}


def solved(name: str, solver: str) -> tuple[Any, int, int]:
    """A pipeline with this solver, steps to ask it for, and calls of the backbone that they make."""
    pipe = build(name)
    scheduler = SOLVERS[solver]()
    if name in ("flux", "flux2") and solver == "flow-dpm":
        scheduler.register_to_config(use_dynamic_shifting=True)  # what the pipeline shifts by is refused otherwise
    pipe.register_modules(scheduler=scheduler)
    steps = 4 if solver.endswith("lcm") else 6
    return pipe, steps, CALLS.get(solver, 1) * (steps - 1) + 1


def drawn(name: str, pipe: Any, steps: int) -> Tensor:
    """A picture; some solvers draw from the global generator."""
    torch.manual_seed(4)
    return FAMILIES[name](pipe, 0, steps=steps)


@pytest.mark.parametrize(("name", "solver"), TAKEN)
def test_every_solver_follows_the_plan_of_blocks(name: str, solver: str) -> None:
    pipe, steps, calls = solved(name, solver)
    dense = drawn(name, pipe, steps)
    routed = free(pipe)
    drawn(name, pipe, 2)  # from here on the length of the text is known
    planned = sl.planned_ratio(pipe, steps)
    assert planned is not None and 0.5 - 1.001 / calls < planned <= 0.5
    seen = decided(routed)
    out = drawn(name, pipe, steps)
    assert routed.spending.ratio == pytest.approx(planned, rel=1e-9)
    assert sorted({step for step, _, _ in seen}) == list(range(calls))
    assert len({step for step, _, samples in seen if samples[0].action == "run"}) < calls
    assert torch.isfinite(out).all() and not torch.equal(out, dense)
    assert torch.equal(drawn(name, pipe, steps), out)
    sl.set_budget(pipe, compute=1.0)
    assert torch.equal(drawn(name, pipe, steps), dense)


@pytest.mark.parametrize(("name", "solver"), [(name, solver) for name, solver in TAKEN if name in TOKENS])
def test_every_solver_follows_the_plan_of_tokens(name: str, solver: str) -> None:
    pipe, steps, calls = solved(name, solver)
    sl.attach(pipe, sl.RoutingConfig.training_free(0.5))
    routed, kept = routed_of(pipe), {}
    drawn(name, pipe, 2)  # from here on the shape is known
    planned = sl.current_schedule(pipe, steps)
    assert planned.steps == calls and 0 < planned.mean_keep <= 0.5
    routed.observer = lambda block, x, out, indices, text: kept.setdefault(
        (routed.context.step, block), x.shape[1] if indices is None else indices.shape[1]
    )
    out = drawn(name, pipe, steps)
    rows = [[kept[step, block] for block in routed.routed] for step in range(calls)]
    assert rows == [list(row) for row in planned.keep]
    assert torch.isfinite(out).all() and torch.equal(drawn(name, pipe, steps), out)
