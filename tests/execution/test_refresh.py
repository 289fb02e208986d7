"""Gates whose closed side adds the block's last residual: when a block runs again, and what it costs."""

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from gating import gated, watch
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of


def refreshing(pipe: StableDiffusion3Pipeline, tokens: bool = False, **options: Any) -> Any:
    reuse = sl.Reuse(max_reuses=options.pop("max_reuses", 3), warmup=0.2)
    return gated(pipe, reuse, tokens, **{"closed": "reuse", "widths": (1.0,)} | options)


def test_a_closed_gate_adds_the_last_residual_until_it_is_too_old(pipe: StableDiffusion3Pipeline) -> None:
    routed = refreshing(pipe, max_reuses=2)
    sl.set_budget(pipe, threshold=0.5)
    with torch.no_grad():
        for block in routed.routed:
            routed.gates.router.routers[str(block)].gate_head.weight.zero_()
            routed.gates.router.routers[str(block)].gate_head.bias.fill_(-1e3)
    residuals: dict[int, tuple[Tensor, Tensor | None]] = {}
    seen = watch(routed)

    def check(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        words = None if text is None else text[1] - text[0]
        if seen[routed.context.step, block][0].action == "run":
            residuals[block] = out - x, words
            return
        torch.testing.assert_close(out, x + residuals[block][0])
        if words is not None and residuals[block][1] is not None:  # the last block drops the text
            torch.testing.assert_close(words, residuals[block][1])

    routed.observer = check
    walk(pipe, tiny_inputs(2), 7)
    pattern = ["run", "reuse", "reuse", "run", "reuse", "reuse", "run"]
    for block in routed.routed:
        assert [seen[step, block][0].action for step in range(7)] == pattern
    assert routed.spending.actions["skip"] == 0


def test_the_age_of_a_residual_opens_its_gate(pipe: StableDiffusion3Pipeline) -> None:
    routed = refreshing(pipe, max_reuses=5, decide="static")
    sl.set_budget(pipe, threshold=0.5)
    place = routed.routed.index(2)
    with torch.no_grad():
        routed.gates.age_slopes.fill_(2.0)
        # At one step's age all gates are wide open but one, which its age opens at the third step after a run.
        routed.gates.records.gate.fill_(1e3)
        routed.gates.records.gate[:, place] = -2.0 * math.log(2.5)
    routed.planner.forget()
    seen = watch(routed)
    walk(pipe, tiny_inputs(1), 7)
    assert [seen[step, 2][0].action for step in range(7)] == ["run", "reuse", "reuse", "run", "reuse", "reuse", "run"]
    assert all(seen[step, 1][0].action == "run" for step in range(7))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("compute", [0.8, 0.6])
def test_static_gates_spend_to_the_last_bit_what_was_planned(
    pipe: StableDiffusion3Pipeline, tokens: bool, compute: float
) -> None:
    routed = refreshing(pipe, tokens, decide="static", widths=(0.5, 1.0))
    walk(pipe, tiny_inputs(1), 8)
    routed.read_gates = None
    sl.set_budget(pipe, compute=compute)
    planned = sl.planned_ratio(pipe, 8)
    walk(pipe, tiny_inputs(2), 8)
    assert planned == pytest.approx(routed.spending.ratio, rel=1e-9)
    assert compute - 0.15 < planned <= compute
    assert routed.spending.actions["reuse"] and not routed.spending.actions["skip"]


def test_a_plan_knows_that_closed_gates_open_when_their_residual_is_too_old(pipe: StableDiffusion3Pipeline) -> None:
    routed = refreshing(pipe, max_reuses=2, decide="static")
    routed.gates.records.gate.fill_(-1e3)
    routed.planner.forget()
    sl.set_budget(pipe, threshold=0.5)
    walk(pipe, tiny_inputs(1), 7)
    assert routed.spending.actions == {"run": 9, "reuse": 12, "skip": 0}
    assert sl.planned_ratio(pipe, 7) == pytest.approx(routed.spending.ratio, rel=1e-9)


@pytest.mark.parametrize("decide", ["block", "step"])
def test_a_compute_budget_is_met_on_average(pipe: StableDiffusion3Pipeline, decide: str) -> None:
    routed = refreshing(pipe, decide=decide, max_reuses=5)
    walk(pipe, tiny_inputs(1), 12)
    spent = []
    for compute in (0.85, 0.7, 0.55):
        sl.set_budget(pipe, compute=compute)
        assert compute - 0.06 < sl.planned_ratio(pipe, 12) <= compute
        walk(pipe, tiny_inputs(4), 12)
        spent.append(routed.spending.ratio)
        assert abs(spent[-1] - compute) < 0.12
    assert spent[0] > spent[1] > spent[2]
    sl.set_budget(pipe, compute=0.55, cap=True)
    walk(pipe, tiny_inputs(4), 12)
    assert routed.spending.ratio <= 0.55


@pytest.mark.parametrize("tokens", [False, True])
def test_a_batch_is_its_samples(pipe: StableDiffusion3Pipeline, tokens: bool) -> None:
    routed = refreshing(pipe, tokens)
    call = tiny_inputs(4, seed=1)  # not those of the records, on one of which the threshold comes to lie
    walk(pipe, call, 6)
    sl.set_budget(pipe, compute=0.7)
    together = walk(pipe, call, 6)
    assert routed.spending.actions["run"] and routed.spending.actions["reuse"]
    for i in range(4):
        alone = walk(pipe, {name: value[i : i + 1] for name, value in call.items()}, 6)
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


def test_a_bare_transformer_has_nothing_to_reuse_and_runs(pipe: StableDiffusion3Pipeline) -> None:
    refreshing(pipe)
    model = pipe.transformer
    sl.detach(pipe)
    dense = model(**tiny_inputs(2, 500.0), return_dict=False)[0]
    sl.attach(
        model, sl.RoutingConfig(None, sl.BlockRouting(start="random", closed="reuse"), reuse=sl.Reuse(), compute=0.5)
    )
    with pytest.raises(sl.BudgetError, match="no statistics"):
        model(**tiny_inputs(2, 500.0), return_dict=False)
    sl.detach(model)
    routed = refreshing(pipe)
    records = {name: value.clone() for name, value in routed.gates.records.state_dict().items()}
    sl.detach(pipe)
    sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(widths=(1.0,), closed="reuse"), reuse=sl.Reuse()))
    routed_of(model).gates.records.load_state_dict(records)
    sl.set_budget(model, compute=0.5)
    assert torch.equal(model(**tiny_inputs(2, 500.0), return_dict=False)[0], dense)


def test_reuse_must_be_given() -> None:
    with pytest.raises(
        sl.ShivelightError, match=r"closed='reuse' adds the residuals of earlier steps; give RoutingConfig"
    ):
        sl.RoutingConfig(None, sl.BlockRouting(closed="reuse"))
    with pytest.raises(sl.ShivelightError, match="router='drift' always reuses"):
        sl.BlockRouting(router="drift", widths=(1.0,), closed="reuse")
