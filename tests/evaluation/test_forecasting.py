"""The search over settings of forecasts: it judges by the pictures, keeps what was attached, and says what it lacks."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import Comparison, Setting
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.forecasting import search_reuse

CAPTIONS = ["a red apple", "blue bird"]
SETTING = Setting(12, 3.0, 0, 2, {"max_sequence_length": 16, "height": 32, "width": 32})


def test_the_best_setting_comes_first_and_nothing_stays_changed(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks", max_age=7))
    comparison, config, budget = Comparison(pipe, SETTING), routed_of(pipe).config, routed_of(pipe).budget
    found = search_reuse(comparison, CAPTIONS, [0.5, 0.4], [(1.0, 0.0), (3.0, 1.0), (1.0, 1.0)])
    assert [entry.psnr for entry in found] == sorted((entry.psnr for entry in found), reverse=True)
    assert len({entry.psnr for entry in found}) == 3 and all(entry.reuse.max_age == 7 for entry in found)
    assert routed_of(pipe).config == config and routed_of(pipe).budget == budget
    best = found[0].reuse
    fresh = {"max_age": 7, "growth": best.growth, "forecast": best.forecast}
    dense, total = comparison.pictures(comparison.dense(), CAPTIONS), 0.0
    for compute in (0.5, 0.4):  # what it says is what a user then gets
        sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", **fresh))
        drawn = comparison.call(CAPTIONS, 12)
        total += float(fidelity_to_dense(drawn, dense).psnr.mean()) / 2
    assert found[0].psnr == pytest.approx(total, abs=1e-4) and torch.isfinite(torch.tensor(total))


def test_what_it_lacks_is_said(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    with pytest.raises(ShivelightError, match="at least one caption"):
        search_reuse(Comparison(pipe, SETTING), [], [0.5])
    sl.attach(pipe, sl.RoutingConfig.training_free(0.6))
    with pytest.raises(ShivelightError, match='axis="blocks"'):
        search_reuse(Comparison(pipe, SETTING), CAPTIONS, [0.5])
