"""Maps for steps at rest: the regression against closed forms, what a generation makes of them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import CONFIG_NAME
from shivelight.calibration.stand_ins import Fitting, factors, fit_map, moments, reduced
from shivelight.config import RoutingConfig

PROMPTS = ["a red apple", "blue bird", "c d", "e"]


def values(samples: int, tokens: int, width: int, known: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, tokens, width, generator=generator) + place for place in range(known)]


@pytest.mark.parametrize("known", [3, 5])
def test_what_is_linear_of_that_rank_is_found(known: int) -> None:
    given, width, rank = values(4, 200, 6, known), 6, 2
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(known, width, generator=generator)
    down, up = torch.randn(known * width, rank, generator=generator), torch.randn(rank, width, generator=generator)
    out = given[2] + 3.0 + torch.cat(given, -1) @ down @ up
    found, left = fit_map(given, out, rank)
    # Each channel's own factors take a part of it first, so more than the rank is left.
    assert left < 0.25
    exact, left = fit_map(given, out, width)
    assert left < 1e-4
    torch.testing.assert_close(exact(given), out, atol=0.05, rtol=0.02)
    own = given[2] - 1.0 + sum(value * factor for value, factor in zip(given, scale, strict=True))
    found, left = fit_map(given, own, rank)
    assert left < 1e-6
    torch.testing.assert_close(found.scale.data, scale, atol=0.01, rtol=0.01)


def test_what_tells_nothing_is_left_alone() -> None:
    given, generator = values(8, 50, 12), torch.Generator().manual_seed(3)
    out = given[2] + 2.0 + torch.randn(given[2].shape, generator=generator)
    found, left = fit_map(given, out, 12)
    assert float(found.up.abs().max()) == 0  # held-back samples say that channels tell nothing of each other
    assert left == pytest.approx(0.2, abs=0.05)  # the mean goes, 4 of 5; noise stays


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 50))
def test_the_reduced_rank_is_the_best_of_that_rank(width: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, target = torch.randn(80, 9, generator=generator), torch.randn(80, width, generator=generator)
    down, up = reduced(*moments(inputs, target), 0.0, min(rank, width))
    best = torch.linalg.lstsq(inputs, target).solution
    u, s, v = torch.linalg.svd(inputs @ best, full_matrices=False)
    s[rank:] = 0
    torch.testing.assert_close(inputs @ down @ up, u * s @ v, atol=1e-4, rtol=1e-3)


def test_factors_are_least_squares_of_each_channel() -> None:
    given = [value.flatten(0, 1) for value in values(1, 100, 4)]
    target = torch.randn(100, 4, generator=torch.Generator().manual_seed(9))
    found = factors(given, target, 0.0)
    for channel in range(4):
        own = torch.stack([value[:, channel] for value in given], -1)
        expected = torch.linalg.lstsq(own, target[:, channel : channel + 1]).solution[:, 0]
        torch.testing.assert_close(found[:, channel], expected, atol=1e-4, rtol=1e-3)


def fit(pipe: StableDiffusion3Pipeline, steps: int = 6, computes: tuple[float, ...] = (0.5,), **options: Any) -> Any:
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    options = {"rank": 3, "guidance": 1.0, "max_sequence_length": 16, **options}
    return sl.fit_stand_ins(pipe, PROMPTS, steps=steps, computes=computes, **options)


def test_a_step_at_rest_is_its_map(pipe: StableDiffusion3Pipeline) -> None:
    (found,) = fit(pipe)
    assert found.plan == sl.RestPlan(6, (0, 2, 4)) and found.compute > 0.5
    sl.set_budget(pipe, compute=found.compute)
    routed, call = routed_of(pipe), tiny_inputs(2)
    entered: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    checked = []

    def watch(block: int, x: Tensor, out: Tensor, kept: Any, text: Any) -> None:
        step = routed.context.step
        if block == 0:
            entered[step] = x
        if block == 3 and step in found.plan.runs:
            made[step] = out
        elif block == 3:
            last, *before = [run for run in reversed(found.plan.runs) if run < step][:2]
            known = [entered[step], entered[last], made[last]]
            known += [value for run in before for value in (entered[run], made[run])]
            own = routed.stand_ins.find(found.plan, step, 0)
            torch.testing.assert_close(out, own(known))
            assert len(own.scale) == len(known) and float(own.scale.abs().sum()) > 0
            checked.append(step)
        elif step not in found.plan.runs:
            assert out is x

    routed.observer = watch
    walk(pipe, call, 6)
    assert checked == [1, 3, 5]
    assert routed.residuals.megabytes == 0  # nothing outlives its generation
    routed.observer = None
    walk(pipe, call, 5)  # no maps for so many
    assert routed.stand_ins.find(sl.RestPlan(5, (0, 2)), 1, 0) is None and routed.spending.ratio == pytest.approx(0.4)


def test_what_is_fitted_is_nearer_than_the_last_output(pipe: StableDiffusion3Pipeline) -> None:
    (found,) = fit(pipe, steps=4)
    assert all(left < 0.9 for left in found.left)
    with sl.dense(pipe):
        dense = walk(pipe, tiny_inputs(4), 4)
    errors = []
    for compute in (0.5, found.compute):  # even of half of it after the last run
        sl.set_budget(pipe, compute=compute)
        errors.append(float((walk(pipe, tiny_inputs(4), 4) - dense).square().mean()))
    assert errors[1] < errors[0]


def test_later_maps_are_fitted_to_what_earlier_ones_leave(pipe: StableDiffusion3Pipeline) -> None:
    """The generation that is fitted on is, from its first step to its last, the one that the maps will make."""
    walked = []
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    (found,) = sl.fit_stand_ins(
        pipe, generate=lambda: walked.append(walk(pipe, tiny_inputs(4), 6)), computes=(0.5,), rank=3
    )
    sl.set_budget(pipe, compute=found.compute)
    assert torch.equal(walk(pipe, tiny_inputs(4), 6), walked[0])
    assert routed_of(pipe).spending.ratio > 0.5


def test_after_the_last_run_a_share_of_the_map_is_used(pipe: StableDiffusion3Pipeline) -> None:
    whole, half = (
        (fit(pipe, steps=4, unmended=share), dict(routed_of(pipe).stand_ins.named_parameters())) for share in (1.0, 0.5)
    )
    assert whole[0][0].plan.runs == (0, 2)
    for name, value in whole[1].items():
        added = name.rsplit(".", 1)[1] in ("scale", "bias", "up")
        share = 0.5 if ":3:" in name and added else 1.0
        torch.testing.assert_close(half[1][name], share * value)
    with pytest.raises(sl.ShivelightError, match="unmended is 2"):
        fit(pipe, unmended=2)


def test_with_guidance_in_one_batch_what_it_makes_of_both_is_fitted() -> None:
    plan, given = sl.RestPlan(4, (0, 2)), values(8, 60, 6)
    out = torch.randn(8, 60, 6, generator=torch.Generator().manual_seed(4)) + given[0]
    fitting = Fitting(3, 1.0, 4.0)
    made = fitting.fit(plan, 1, 0, given, out, paired=True)
    combined = [-3.0 * value[:4] + 4.0 * value[4:] for value in (*given, out)]
    expected, _ = fit_map(combined[:-1], combined[-1], 3)
    torch.testing.assert_close(made, expected(given), atol=1e-4, rtol=1e-4)
    alone, _ = fit_map(given, out, 3)
    assert not torch.allclose(made, alone(given), atol=1e-2)
    for fitting, paired in ((Fitting(3, 1.0, 4.0), False), (Fitting(3, 1.0, None), True)):
        torch.testing.assert_close(fitting.fit(plan, 1, 0, given, out, paired), alone(given), atol=1e-4, rtol=1e-4)


def test_other_plans_stay(pipe: StableDiffusion3Pipeline) -> None:
    fit(pipe)
    before = routed_of(pipe).stand_ins.state_dict()
    more = sl.fit_stand_ins(pipe, PROMPTS, steps=4, computes=(0.75, 0.25), rank=3, guidance=1.0, max_sequence_length=16)
    assert [found.plan.runs for found in more] == [(0, 1, 2), (0,)]
    assert "maps of rank 3 where so many steps run: 3 of 6, 3 of 4, 1 of 4" in sl.summary(pipe)
    after = routed_of(pipe).stand_ins.state_dict()
    assert len(routed_of(pipe).config.stand_ins.plans) == 3
    assert before.keys() < after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_both_halves_of_guidance_and_a_schedule_of_its_own(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    (found,) = fit(pipe, guidance=4.0)
    sl.set_budget(pipe, compute=found.compute)
    drawn = sample(pipe, PROMPTS[:2], steps=6)
    assert torch.isfinite(drawn).all() and routed_of(pipe).spending.ratio == pytest.approx(sl.planned_ratio(pipe, 6))


def test_memory_is_bounded_and_what_does_not_fit_runs(pipe: StableDiffusion3Pipeline) -> None:
    (found,) = fit(pipe)
    sl.set_budget(pipe, compute=found.compute)
    routed = routed_of(pipe)
    assert routed.config.reuse is not None
    sizes = []
    routed.observer = lambda *_: sizes.append(routed.residuals.megabytes)
    walk(pipe, tiny_inputs(2), 6)
    # What went in and came out at the last run and the one before, in fp32, with the steps they were at.
    assert max(sizes) * 1e6 >= 4 * 2 * 64 * 32 * 4
    with routed.variant(reuse=dataclasses.replace(routed.config.reuse, max_cache_mb=1e-6)):
        walk(pipe, tiny_inputs(2), 6)
        assert routed.spending.ratio == 1.0 and max(sizes[-20:]) == 0


def test_refusals(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    with pytest.raises(sl.AdapterError, match="attach"):
        sl.fit_stand_ins(pipe, PROMPTS, steps=4)
    sl.attach(pipe, RoutingConfig.training_free())
    with pytest.raises(sl.ShivelightError, match="training_free"):
        sl.fit_stand_ins(pipe, PROMPTS, steps=4)
    sl.attach(pipe, RoutingConfig.training_free(compute=1.0, axis="blocks"))
    with pytest.raises(sl.ShivelightError, match="prompts and steps"):
        sl.fit_stand_ins(pipe, [], steps=4)
    with pytest.raises(sl.ShivelightError, match="No step rested"):
        sl.fit_stand_ins(pipe, PROMPTS, steps=4, computes=(1.0,), max_sequence_length=16)
    with pytest.raises(sl.BudgetError, match="nearest"):
        sl.fit_stand_ins(pipe, PROMPTS, steps=2, computes=(0.3,), max_sequence_length=16)
    assert routed_of(pipe).fitting is None and routed_of(pipe).stand_ins is None
    fit(pipe)
    with pytest.raises(sl.ShivelightError, match="rank=3"):
        sl.fit_stand_ins(pipe, PROMPTS, steps=4, rank=5, max_sequence_length=16)
    sl.save_adapter(pipe, tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert RoutingConfig.from_dict(config["routing"]) == routed_of(pipe).config
    for broken, said in (
        ({"steps": 6, "runs": [1, 3]}, "the first of them 0"),
        ({"steps": 6, "runs": [0, 7]}, "in order"),
        ({"steps": 6, "runs": [0], "more": 1}, "no field more"),
        ({"steps": 6, "runs": "0"}, "for example"),
    ):
        config["routing"]["stand_ins"]["plans"] = [broken]
        (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
        with pytest.raises(sl.AdapterError, match=said):
            sl.load_adapter(pipe, tmp_path)
    config["routing"]["stand_ins"]["plans"] = [{"steps": 4, "runs": [0, 2]}]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(sl.AdapterError, match="not what its config describes"):
        sl.load_adapter(pipe, tmp_path)
    with pytest.raises(sl.AdapterError, match="all blocks rest"):
        sl.RoutingConfig(stand_ins=sl.StandIns())
