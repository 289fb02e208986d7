"""Training settings: stages, warm-up, validation."""

from __future__ import annotations

import pytest

from shivelight.errors import TrainingError
from shivelight.training.stages import TrainingConfig


def test_steps_fall_into_their_stages() -> None:
    config = TrainingConfig(router_steps=2, policy_steps=3, joint_steps=4)
    assert [config.stage(step)[0] for step in range(9)] == ["router"] * 2 + ["policy"] * 3 + ["joint"] * 4
    assert config.stage(4) == ("policy", 2, 3)


def test_every_stage_warms_up_by_itself_and_the_last_one_cools_down() -> None:
    config = TrainingConfig(router_steps=20, policy_steps=20, joint_steps=100, warmup=4)
    assert [config.rate_factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert config.rate_factor(20) == 0.25
    assert config.rate_factor(40) == 0.25
    assert config.rate_factor(139) == pytest.approx(0.109)


@pytest.mark.parametrize(
    "bad",
    [
        {"router_steps": -1},
        {"groups": 0},
        {"router_steps": 0, "policy_steps": 0, "joint_steps": 0},
        {"keep_low": 0.0},
        {"keep_low": 0.9, "keep_high": 0.5},
        {"target": 1.0},
        {"caption_drop": 1.0},
        {"estimator": "magic"},
        {"levels": (0.5, 0.5)},
        {"levels": (0.5, 0.8)},
        {"levels": (1.5, 0.5)},
        {"levels": (0.5, 0.0)},
        {"budget": "hope"},
    ],
)
def test_bad_settings_are_named(bad: dict) -> None:
    with pytest.raises(TrainingError, match=f"TrainingConfig.*{'stages' if len(bad) == 3 else next(iter(bad))}"):
        TrainingConfig(**bad)
