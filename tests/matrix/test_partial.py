"""Steps at rest at which some tokens run, in every family whose tokens can be routed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, close, counted_beyond_half
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of

STEPS, RUNS = 4, (0, 2)


def partly(pipe: Any, compute: float = 0.68, **reuse: Any) -> Any:
    """Two of four steps run, and some tokens at another."""
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", partial=True, **reuse))
    return routed_of(pipe)


def outputs(routed: Any) -> tuple[dict[int, Tensor], list[Any]]:
    """From now on, what the last block makes at each step, of the first of two passes; and the plans of the passes."""
    seen: dict[int, Tensor] = {}
    plans: list[Any] = []

    def watch(block: int, x: Tensor, out: Tensor, *_: Any) -> None:
        if block == routed.routed[-1]:
            seen.setdefault(routed.context.step, out.clone())
            plans.append(routed._asked(*routed.shape)[2])

    routed.observer = watch
    return seen, plans


@pytest.mark.parametrize("name", TOKENS)
def test_so_many_tokens_run_and_the_others_are_what_stands_in(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    routed = partly(pipe)
    seen, plans = outputs(routed)
    call(pipe, 0, 1, steps=STEPS)
    plan = plans[0]
    assert plan.rests == sl.RestPlan(STEPS, RUNS, partial=1)
    changed = (seen[1] != seen[0]).any(-1).sum(1)
    assert (changed == plan.tokens).all() and call.tokens / 8 <= plan.tokens < call.tokens
    assert torch.equal(seen[3], seen[2])
    assert routed.spending.ratio == pytest.approx(sl.planned_ratio(pipe, STEPS)) and 0.5 < routed.spending.ratio <= 0.68


@pytest.mark.parametrize("name", TOKENS)
def test_it_costs_what_torch_counts(name: str) -> None:
    pipe = build(name)
    partly(pipe)
    counted_beyond_half(pipe, name, STEPS, 0.68)


@pytest.mark.parametrize("name", TOKENS)
def test_what_the_others_would_be_is_known(name: str) -> None:
    """Where the step in part sees what the run before it saw, keys and values are as they would be, and so is what it makes."""
    pipe, call = build(name), FAMILIES[name]
    routed = partly(pipe)
    if not all(kind.context_linears for kind in routed.spec.blocks):
        pytest.skip("in some of its blocks, tokens attend to those that run alone")
    if not hasattr(pipe.scheduler, "step_index"):
        pytest.skip("a timestep that comes twice is one step to its scheduler")
    first: list[tuple[tuple, dict[str, Any]]] = []
    made: list[Tensor] = []

    def again(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not made:
            first.append((args, dict(kwargs)))
        return first[-1] if len(made) == 1 else (args, kwargs)

    pipe.transformer.register_forward_pre_hook(again, with_kwargs=True, prepend=True)
    pipe.transformer.register_forward_hook(lambda module, args, output: made.append(torch.as_tensor(output[0])))
    call(pipe, 0, 1, steps=STEPS, **call.unguided)
    assert len(made) == STEPS and not torch.allclose(made[2], made[0], atol=1e-3)
    close(made[1], made[0])
    made.clear()
    with routed.variant(reuse=replace(routed.config.reuse, context=False)):
        call(pipe, 0, 1, steps=STEPS, **call.unguided)
    assert not torch.allclose(made[1], made[0], atol=1e-4)


@pytest.mark.parametrize("name", TOKENS)
def test_scores_are_fitted_saved_and_a_batch_is_its_samples(name: str, tmp_path: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    routed = partly(pipe, 1.0)
    (found,) = sl.fit_stand_ins(pipe, generate=lambda: call(pipe, 1, 2, steps=STEPS), computes=(0.68,), rank=2)
    assert found.plan.key == (STEPS, RUNS, 1, 0) and 0.5 < found.compute < 1 and len(found.left) == 2
    sl.set_budget(pipe, compute=0.7)
    drawn = call(pipe, 0, steps=STEPS)
    need = routed.stand_ins.need(found.plan, 1, 0)
    assert float(need.weight.abs().sum()) > 0
    assert routed.spending.ratio == pytest.approx(sl.planned_ratio(pipe, STEPS)) and routed.spending.ratio <= 0.7
    assert "and a part of 4" in sl.summary(pipe)
    sl.save_adapter(pipe, tmp_path)
    sl.detach(pipe)
    sl.load_adapter(pipe, tmp_path)
    sl.set_budget(pipe, compute=0.7)
    assert torch.equal(call(pipe, 0, steps=STEPS), drawn)
    close(call(pipe, 0, 1, steps=STEPS)[:1], drawn)
    with torch.no_grad():
        routed_of(pipe).stand_ins.need(found.plan, 1, 0).weight.neg_()
    assert not torch.equal(call(pipe, 0, steps=STEPS), drawn)  # other tokens run
