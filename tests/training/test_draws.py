"""What micro-batches are drawn from."""

from __future__ import annotations

import torch

from shivelight.training.draws import Draws
from shivelight.training.stages import TrainingConfig

LEVELS = (1.0, 0.914, 0.759, 0.4)


def draws(**settings: object) -> Draws:
    return Draws(TrainingConfig(groups=4, **settings), 8, 3.0, (1, 0), lambda share, age: 0.0)


def test_a_few_step_model_is_trained_where_it_samples() -> None:
    few = draws(levels=LEVELS)
    steps = [sorted((draw.sigma for draw in few.at(step)), reverse=True) for step in range(5)]
    assert all(torch.tensor(step).allclose(torch.tensor(LEVELS)) for step in steps)  # stratified: each once
    assert {round(draw.sigma, 3) for draw in few.calibration()} == set(LEVELS)
    assert few.grid(torch.Generator()).tolist() == [1000.0, 914.0, 759.0, 400.0]
    others = {draw.sigma for step in range(5) for draw in draws().at(step)}
    assert len(others) == 20 and not others & set(LEVELS)


def test_a_few_step_model_reuses_what_it_computed_a_step_before() -> None:
    few, sigma = draws(levels=LEVELS), torch.tensor(0.4).item()
    assert [few.earlier(sigma, steps) for steps in range(5)] == [0.4, 0.759, 0.914, 1.0, 1.0]
    assert few.earlier(1.0, 1) == 1.0
    assert draws().earlier(sigma, 1) not in LEVELS
