"""Routers that learn what reuse costs: the measured damage, its loss, and short runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_inputs

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.training.damage import GateReading, OneClosed, damage_loss, log_damage
from shivelight.training.session import PassRecord, TeacherRecord
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
REFRESHING = sl.BlockRouting(widths=(1.0,), closed="reuse")


@torch.no_grad()
def test_the_damage_is_that_of_one_block_which_adds_its_old_residual(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer
    sl.attach(model, sl.RoutingConfig(None, REFRESHING, reuse=sl.Reuse()))
    routed = routed_of(model)
    record = PassRecord(model, routed.spec, routed.routed, context=False)
    routed.observer = record
    with routed.switched(False):
        model(**tiny_inputs(2, 700.0, seed=1))
    reading = GateReading(routed, TeacherRecord(()))
    routed.observer = reading
    call = tiny_inputs(2, 600.0)
    with routed.switched(False):
        wanted = model(**call)[0]
    routed.observer = None
    assert list(reading.logits) == list(routed.routed) and reading.logits[2].requires_grad
    assert list(reading.teacher.residuals) == list(routed.routed)
    cached = record.aged(record, 1)
    routed.gate_session = OneClosed(2, cached[2])
    changed = model(**call)[0]
    routed.gate_session = None
    forward = model.transformer_blocks[2].forward

    def stale(hidden_states: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        return encoder_hidden_states + cached[2].text_residual, hidden_states + cached[2].residual

    model.transformer_blocks[2].forward = stale
    with routed.switched(False):
        expected = model(**call)[0]
    model.transformer_blocks[2].forward = forward
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-4)
    each = [((changed[i] - wanted[i]) ** 2).mean().log() for i in range(2)]
    torch.testing.assert_close(log_damage(wanted, changed), torch.stack(each))
    assert log_damage(wanted, wanted).tolist() == pytest.approx([math.log(1e-12)] * 2)


def test_the_loss_is_least_at_damage_times_age() -> None:
    damage = torch.tensor([-3.0, -5.0])
    logits = (damage + math.log(2)).requires_grad_()
    loss = damage_loss(logits, damage, 2)
    assert loss == 0
    damage_loss(logits + torch.tensor([0.1, -0.2]), damage, 2).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.05, -0.1]))


@pytest.mark.parametrize("tokens", [False, True])
def test_routers_learn_the_damage_and_serve_budgets(
    make_trainer: MakeTrainer, loads_back: Callable[..., None], tokens: bool
) -> None:
    token_routing = sl.TokenRouting(sees_drift=True, ratios="fixed") if tokens else None
    routing = sl.RoutingConfig(token_routing, REFRESHING, reuse=sl.Reuse())
    trainer = make_trainer(
        routing=routing, gate_signal="damage", damage_blocks=2, router_steps=4, policy_steps=0, joint_steps=60, lr_gates=0.3,
        warmup=2, calibration_batches=4,
    )  # fmt: skip
    folder = trainer.run()
    history = [record["damage"] for record in trainer.history]
    assert sum(history[-10:]) < 0.3 * sum(history[:10])
    assert ("output" in trainer.history[-1]) is tokens
    records = trainer.routed.gates.records
    assert records.filled == 4 * trainer.config.group_size and (records.shift == 0).all()
    loads_back(trainer, folder, compute=0.7)


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        (sl.RoutingConfig(None, sl.BlockRouting()), "measures what it costs to reuse"),
        (sl.RoutingConfig(None, REFRESHING, sl.DeltaConfig(2), sl.Reuse()), "and no deltas"),
        (sl.RoutingConfig(None, sl.BlockRouting(closed="reuse"), reuse=sl.Reuse()), "says nothing about widths"),
        (sl.RoutingConfig(sl.TokenRouting()), "measures what it costs to reuse"),
    ],
)
def test_where_nothing_can_be_measured_it_is_refused(
    make_trainer: MakeTrainer, routing: sl.RoutingConfig, said: str
) -> None:
    with pytest.raises(sl.TrainingError, match=said):
        make_trainer(routing=routing, gate_signal="damage")
