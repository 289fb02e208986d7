"""Steps at rest at which the last blocks run: how many the budget pays for, what it takes where memory lacks, and tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from matrix_help import decided
from tiny import guided_walk, tiny_inputs, walk

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.errors import AdapterError
from shivelight.evaluation.standard import method_name
from shivelight.execution.reuse import TOGETHER
from shivelight.training.tuner import TuneConfig, Tuner


def rearwards(pipe: StableDiffusion3Pipeline, compute: float = 0.68, **reuse: Any) -> Any:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", partial="rear", **reuse))
    return routed_of(pipe)


def test_as_many_of_the_last_blocks_run_as_the_budget_pays_for(pipe: StableDiffusion3Pipeline) -> None:
    routed, ratios = rearwards(pipe), []
    counts = []
    for compute in [0.5 + 0.01 * place for place in range(26)]:
        sl.set_budget(pipe, compute=compute)
        seen = decided(routed)
        walk(pipe, tiny_inputs(2), 4)
        del routed.decide
        running = [block for step, block, parts in seen if step == 1 and parts[0].action == "run"]
        assert running == list(routed.routed[len(routed.routed) - len(running) :])
        ratio = routed.spending.ratio
        assert ratio == pytest.approx(sl.planned_ratio(pipe, 4)) and ratio <= compute * (1 + 1e-9)
        counts.append(len(running))
        ratios.append(ratio)
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3, 4}
    sl.set_budget(pipe, compute=0.68)
    walk(pipe, tiny_inputs(2), 16)  # forecasts count the steps between runs
    assert routed.spending.ratio == pytest.approx(10 / 16)


def test_what_is_kept_stays_that_of_the_last_whole_run(pipe: StableDiffusion3Pipeline) -> None:
    routed = rearwards(pipe, 1.0)
    sl.fit_stand_ins(pipe, ["a b", "c"], steps=4, computes=(0.7,), rank=2, guidance=1.0, max_sequence_length=16)
    sl.set_budget(pipe, compute=0.7)
    kept: dict[int, tuple[float, float]] = {}

    def watch(*_: Any) -> None:
        series = routed.residuals.held((0, TOGETHER)).image
        kept[routed.context.step] = float(series.at.max()), float(series.at_before.max())

    routed.observer = watch
    walk(pipe, tiny_inputs(1), 4)
    assert [last for last, _ in kept.values()] == [0, 0, 2, 2] and kept[3] == (2, 0)


@torch.no_grad()
def test_branches_batched_or_split_are_the_same(pipe: StableDiffusion3Pipeline) -> None:
    runs = {}
    for split in (False, True):
        rearwards(pipe)
        runs[split] = guided_walk(pipe, 4, split)
    torch.testing.assert_close(runs[True], runs[False], atol=2e-5, rtol=1e-4)


def test_without_room_for_what_the_first_make_all_blocks_run(pipe: StableDiffusion3Pipeline) -> None:
    routed = rearwards(pipe)
    held: list[float] = []
    routed.observer = lambda *_: held.append(routed.residuals.megabytes)
    drawn, spent = walk(pipe, tiny_inputs(2), 4), routed.spending.ratio
    assert 0.5 < spent < 0.68 and routed.residuals.megabytes == 0  # nothing outlives its generation
    most = max(held)
    routed.observer = None
    with routed.variant(reuse=replace(routed.config.reuse, max_cache_mb=0.75 * most)):
        less = walk(pipe, tiny_inputs(2), 4)
    assert routed.spending.ratio == pytest.approx(0.75) and not torch.equal(less, drawn)
    with routed.variant(reuse=replace(routed.config.reuse, max_cache_mb=1e-6)):
        walk(pipe, tiny_inputs(2), 4)
    assert routed.spending.ratio == 1.0


def test_what_was_fitted_for_fewer_blocks_is_worth_more_than_more_of_them(pipe: StableDiffusion3Pipeline) -> None:
    options: dict[str, Any] = {"rank": 3, "guidance": 1.0, "max_sequence_length": 16}
    routed = rearwards(pipe, 1.0)
    (few,) = sl.fit_stand_ins(pipe, ["a b", "c d", "e"], steps=4, computes=(0.6,), **options)
    assert few.plan.key == (4, (0, 2), 1, 1)
    rears: list[int] = []
    routed.observer = lambda *_: rears.append(routed.rests.rear)
    sl.set_budget(pipe, compute=0.74)
    walk(pipe, tiny_inputs(1), 4)
    assert set(rears) == {1}
    (more,) = sl.fit_stand_ins(pipe, ["a b", "c d", "e"], steps=4, computes=(0.7,), **options)
    assert more.plan.rear > 1 and len(routed.config.stand_ins.plans) == 2
    assert len(routed.stand_ins.maps) == 4  # of two steps at rest of each
    for found in (few, more):
        sl.set_budget(pipe, compute=found.compute)
        walk(pipe, tiny_inputs(1), 4)
        assert rears[-1] == found.plan.rear
    assert method_name(routed.config) == "blocks-rear"
    assert method_name(replace(routed.config, deltas=sl.DeltaConfig())) == "blocks-rear-tuned"


def test_what_blocks_mend_is_fitted_whole(pipe: StableDiffusion3Pipeline) -> None:
    weights = []
    for unmended in (1.0, 0.0):
        routed = rearwards(pipe, 1.0)
        (found,) = sl.fit_stand_ins(
            pipe, ["a b", "c d", "e"], steps=2, computes=(0.7,), unmended=unmended, rank=2, guidance=1.0,
            max_sequence_length=16,
        )  # fmt: skip
        assert found.plan.runs == (0,) and found.plan.partial == 1 and found.plan.rear
        weights.append(routed.stand_ins.find(found.plan, 1, 0).scale.clone())
    assert torch.equal(*weights) and weights[0].abs().sum() > 0


def test_deltas_are_tuned_through_it_and_in_force_there(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    config = TuneConfig(4, (0.68,), guidance=1.0, iterations=2, batch=2, trajectories=4, rank=2, mixed_precision="no")
    tuned = []
    for checkpointing in (False, True):
        routed = rearwards(pipe, 1.0)
        own = replace(config, checkpointing=checkpointing)
        tuner = Tuner(pipe, ["a b", "c"], own, tmp_path / str(checkpointing), max_sequence_length=16)
        tuner.run()
        assert all(record["grad_norm"] > 0 for record in tuner.history)
        tuned.append({name: delta.up.clone() for name, delta in routed.deltas.items()})
    assert all(torch.allclose(up, tuned[1][name], atol=1e-6) for name, up in tuned[0].items())
    (plan,) = routed.config.deltas.plans
    assert plan.key[:3] == (4, (0, 2), 1) and plan.rear
    for compute, active in ((0.68, True), (0.5, False)):
        sl.set_budget(pipe, compute=compute)
        walk(pipe, tiny_inputs(1), 4)
        assert routed.folded.active is active


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(AdapterError, match="BlockRouting.partial is 'front'"):
        sl.BlockRouting(router="interval", widths=(1.0,), partial="front")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"RestPlan.rear is 2, of step 0"):
        sl.RestPlan(4, (0, 2), rear=2)
    with pytest.raises(AdapterError, match=r"RestPlan.rear is -1"):
        sl.RestPlan(4, (0, 2), partial=1, rear=-1)
    assert sl.BlockRouting(router="interval", widths=(1.0,), partial=True).partial == "tokens"
    config = sl.RoutingConfig.training_free(compute=0.6, axis="blocks", partial="rear")
    assert sl.RoutingConfig.from_dict(config.to_dict()) == config and config.granularity == 0
