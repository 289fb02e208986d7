"""Steps at rest at which some tokens run: what is planned, who decides, what is remembered, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import guided_walk, tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.calibration.stand_ins import fit_map, fit_need
from shivelight.evaluation.standard import method_name
from shivelight.execution.block_run import BlockRun
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.stale import partial_step, run_steps
from shivelight.execution.stand_ins import NeedScore
from shivelight.execution.together import Together
from shivelight.training.tuner import TuneConfig, Tuner
from shivelight.training.walk import Walk


def partly(pipe: StableDiffusion3Pipeline, compute: float = 0.68, **reuse: Any) -> Any:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", partial=True, **reuse))
    return routed_of(pipe)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1.0, 10.0))
def test_it_is_the_last_step_before_a_run_that_has_any(count: int, steps: int, growth: float) -> None:
    count = min(count, steps)
    runs = run_steps(count, steps, steps, growth)
    at = partial_step(runs, steps)
    resting = [step for step in range(steps) if step not in runs]
    assert (at == 0) == (not resting)
    if resting:
        assert at in resting and (at + 1 == steps or at + 1 in runs)
        assert not [step for step in resting if step < at and step + 1 in runs]  # none of them comes earlier


def test_what_is_left_over_is_spent_as_far_as_tokens_go(pipe: StableDiffusion3Pipeline) -> None:
    routed = partly(pipe)
    counts = []
    for compute in [0.5 + 0.01 * place for place in range(26)]:
        sl.set_budget(pipe, compute=compute)
        walk(pipe, tiny_inputs(2), 4)
        ratio = routed.spending.ratio
        assert ratio == pytest.approx(sl.planned_ratio(pipe, 4)) and ratio <= compute * (1 + 1e-9)
        counts.append(ratio)
    assert counts == sorted(counts) and len(set(counts)) > 4
    assert counts[0] == counts[1] == pytest.approx(0.5)  # an eighth of the tokens costs more
    assert counts[-1] == pytest.approx(0.75)
    # One more unit of tokens would not have fitted.
    unit = min(after - before for before, after in zip(counts, counts[1:], strict=False) if 0.6 < before < after < 0.7)
    assert all(0.51 + 0.01 * place - ratio < unit + 0.01 for place, ratio in enumerate(counts) if ratio > 0.55)
    sl.set_budget(pipe, compute=0.68)
    walk(pipe, tiny_inputs(2), 16)  # forecasts count the steps between runs
    assert routed.spending.ratio == pytest.approx(10 / 16)


@torch.no_grad()
def test_the_conditional_branch_chooses_for_both_batched_or_split(pipe: StableDiffusion3Pipeline) -> None:
    runs, kept = {}, {}
    for split in (False, True):
        routed = partly(pipe)
        chosen: list[Tensor] = []

        def watch(block: int, *_: Any) -> None:
            if "chosen" in routed.context.memo and block == 3:  # noqa: B023
                chosen.append(routed.context.memo["chosen"].sort(-1).values)  # noqa: B023

        routed.observer = watch
        runs[split] = guided_walk(pipe, 4, split)
        kept[split] = torch.cat(chosen)
    assert torch.equal(kept[False][:2], kept[False][2:]) and torch.equal(kept[True], kept[False])
    torch.testing.assert_close(runs[True], runs[False], atol=2e-5, rtol=1e-4)


def test_keys_and_values_stay_within_their_room(pipe: StableDiffusion3Pipeline) -> None:
    routed = partly(pipe)
    held: list[float] = []
    routed.observer = lambda *_: held.append(routed.residuals.megabytes)
    drawn = walk(pipe, tiny_inputs(2), 4)
    most = max(held)
    assert most * 1e6 > 4 * 2 * 2 * 64 * 32 * 4  # keys and values of four blocks at least
    assert routed.residuals.megabytes == 0  # nothing outlives its generation
    for share in (0.99, 0.7):
        held.clear()
        with routed.variant(reuse=replace(routed.config.reuse, max_cache_mb=share * most)):
            less = walk(pipe, tiny_inputs(2), 4)
        assert 0 < max(held) <= share * most and routed.spending.ratio < 0.7
        assert not torch.equal(less, drawn)  # some blocks go without
    with routed.variant(reuse=replace(routed.config.reuse, max_cache_mb=1e-6)):
        walk(pipe, tiny_inputs(2), 4)
    assert routed.spending.ratio == 1.0


def test_scores_are_the_regression_of_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(4, 200, 5, generator=generator) for _ in range(3)]
    weights = torch.rand(3, 5, generator=generator)
    error = sum((value @ weight for value, weight in zip(values, weights, strict=True)), torch.zeros(()))
    found, _ = fit_map(values, values[2], 2)  # the last output, up to rounding
    direction = torch.nn.functional.normalize(torch.randn(4, 200, 5, generator=generator), dim=-1)
    need = fit_need(found, values, found(values) + error[..., None] * direction)
    torch.testing.assert_close(need.weight, weights, atol=0.02, rtol=0.02)  # what the ridge leaves


def test_maps_of_whole_steps_come_before_tokens_that_nothing_was_fitted_for(pipe: StableDiffusion3Pipeline) -> None:
    options = {"rank": 3, "guidance": 1.0, "max_sequence_length": 16}
    routed = partly(pipe, 1.0)
    (whole,) = sl.fit_stand_ins(pipe, ["a b", "c d", "e"], steps=4, computes=(0.5,), **options)
    assert whole.plan.key == (4, (0, 2), 0, 0)
    sl.set_budget(pipe, compute=0.7)
    walk(pipe, tiny_inputs(1), 4)
    assert routed.spending.ratio < 0.6
    (some,) = sl.fit_stand_ins(pipe, ["a b", "c d", "e"], steps=4, computes=(0.68,), **options)
    assert some.plan.key == (4, (0, 2), 1, 0) and len(routed.config.stand_ins.plans) == 2
    assert method_name(routed.config) == "blocks-part"
    assert method_name(replace(routed.config, deltas=sl.DeltaConfig())) == "blocks-part-tuned"
    walk(pipe, tiny_inputs(1), 4)
    assert 0.6 < routed.spending.ratio <= 0.7
    sl.set_budget(pipe, compute=some.compute)  # what is said to ask for
    entered, made, chosen = {}, {}, []

    def watch(block: int, x: Tensor, out: Tensor, *_: Any) -> None:
        step = routed.context.step
        if block == 0:
            entered[step] = x
        elif block == 3:
            made[step] = out
            chosen.extend([routed.context.memo["chosen"]] if step == 1 else [])

    routed.observer = watch
    walk(pipe, tiny_inputs(1), 4)
    assert routed.spending.ratio > 0.6
    # Those run for which the map is expected to be furthest off.
    scores = routed.stand_ins.need(some.plan, 1, 0)([entered[1], entered[0], made[0]])
    assert set(chosen[0][0].tolist()) == set(scores.topk(chosen[0].shape[1]).indices[0].tolist())


def test_deltas_are_tuned_through_it_and_in_force_there(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    config = TuneConfig(4, (0.68,), guidance=1.0, iterations=2, batch=2, trajectories=4, rank=2, mixed_precision="no")
    tuned = []
    for checkpointing in (False, True):
        routed = partly(pipe, 1.0)
        ends: set[tuple[int, bool]] = set()

        def watch(*_: Any) -> None:
            if routed.enabled and routed.budget.value == 0.68:  # noqa: B023
                step = routed.context.step  # noqa: B023
                ends.add((step, Walk(routed, pipe.scheduler, torch.empty(0)).ends(step)))  # noqa: B023

        routed.observer = watch
        own = replace(config, checkpointing=checkpointing)
        tuner = Tuner(pipe, ["a b", "c"], own, tmp_path / str(checkpointing), max_sequence_length=16)
        tuner.run()
        assert ends == {(0, True), (1, True), (2, False), (3, True)}  # before a run, whole or in part, and at the end
        assert all(record["grad_norm"] > 0 for record in tuner.history)
        tuned.append({name: delta.up.clone() for name, delta in routed.deltas.items()})
    assert all(torch.allclose(up, tuned[1][name], atol=1e-6) for name, up in tuned[0].items())
    assert [plan.key for plan in routed.config.deltas.plans] == [(4, (0, 2), 1, 0)]
    for compute, active in ((0.68, True), (0.5, False)):
        sl.set_budget(pipe, compute=compute)
        walk(pipe, tiny_inputs(1), 4)
        assert routed.folded.active is active


def test_compiled_it_is_the_same() -> None:
    pipe, call = build("sd3"), FAMILIES["sd3"]
    partly(pipe)
    eager = call(pipe, 0, 1, steps=4)
    sl.compile(pipe, fullgraph=True)
    torch.testing.assert_close(call(pipe, 0, 1, steps=4), eager, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(sl.AdapterError, match="router='interval', not 'age'"):
        sl.BlockRouting(router="age", widths=(1.0,), partial=True)
    with pytest.raises(sl.AdapterError, match="give axis='blocks', not 'both'"):
        sl.RoutingConfig.training_free(compute=0.5, axis="both", partial=True)
    blocks = sl.BlockRouting(router="interval", widths=(1.0,), partial=True)
    for tokens, reuse in ((sl.TokenRouting(), sl.Reuse()), (None, sl.Reuse(whole="residual"))):
        with pytest.raises(sl.AdapterError, match="BlockRouting.partial is about steps"):
            sl.RoutingConfig(tokens, blocks, reuse=reuse, compute=0.5)
    for partial in (2, 4, -1):
        with pytest.raises(sl.AdapterError, match="RestPlan.partial is"):
            sl.RestPlan(4, (0, 2), partial=partial)
    with pytest.raises(sl.UnsupportedBackboneError, match="cannot be routed"):
        partly(build("sana"))


def test_gradients_flow_through_the_whole_generation(pipe: StableDiffusion3Pipeline) -> None:
    partly(pipe)
    pipe.transformer.requires_grad_(True)
    walk.__wrapped__(pipe, tiny_inputs(1), 4).square().mean().backward()  # without its torch.no_grad
    grown = pipe.transformer.transformer_blocks[1].attn.to_k.weight.grad
    assert float(grown.abs().sum()) > 0


def test_scores_are_fp32_whatever_autocast_says() -> None:
    need = NeedScore(3, 32)
    need.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    values = [torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        scores = need(values)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.einsum("kbnd,kd->bn", torch.stack(values), need.weight))


def test_what_training_attends_to_does_not_go_by_the_memory_of_use(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.65, axis="blocks", partial=True))
    routed = routed_of(pipe)
    kind, _ = routed.spec.block_list(pipe.transformer)[0]
    together = Together(BlockRun(routed, 0, kind, lambda: pipe.transformer.forward))
    entry = BlockResiduals(torch.zeros(2, 64, 32))
    assert together._own_part(entry).room == math.inf
    with torch.no_grad():
        assert together._own_part(entry).room == 1e6 * routed.residuals.max_mb
