"""The second order of what a gate's block is worth: what running adds, passes with gates turned, and runs that resume with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shivelight as sl
from shivelight.config import RoutingConfig, TokenRouting
from shivelight.execution.reuse import CachedPass
from shivelight.training import lessons
from shivelight.training.curvature import FixedGates, first_order_of_turn, turned
from shivelight.training.session import BlockSession, TeacherRecord
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
PASSING = RoutingConfig(None, sl.BlockRouting(start="random", token_stride=1))
REUSING = RoutingConfig(
    None, sl.BlockRouting(start="random", token_stride=1, widths=(1.0,), closed="reuse"), reuse=sl.Reuse()
)
BOTH = RoutingConfig(TokenRouting(), sl.BlockRouting(start="random", token_stride=1))
ONE = {"groups": 1, "group_size": 4, "router_steps": 4, "policy_steps": 0, "joint_steps": 0, "feature_weight": 0.0}


@pytest.mark.parametrize("reused", [False, True])
def test_it_is_what_running_adds_to_both_streams(reused: bool) -> None:
    torch.manual_seed(0)
    x, out, text, text_out, missed, text_missed, old, text_old = (torch.randn(2, 3, 5) for _ in range(8))
    cached = {1: CachedPass(old, old, torch.zeros(2, 3), {}, text_old)} if reused else {}
    teacher = TeacherRecord((), {1: missed}, {1: text_missed})
    session = BlockSession(teacher, (1.0,), cached=cached, measures=True)
    session.choose(1, torch.tensor([[9.0, 0.0], [-9.0, 0.0]], requires_grad=True))
    session.leave(1, (x, text), (out, text_out))
    own = ((out - x)[0], (text_out - text)[0]), (missed[1], text_missed[1])
    stale = (old, text_old) if reused else (torch.zeros_like(old), torch.zeros_like(old))
    wanted = [sum(float((r - s[i]).square().sum()) for r, s in zip(own[i], stale, strict=True)) for i in (0, 1)]
    assert session.squares[1].tolist() == pytest.approx(wanted, rel=1e-5)
    (gradient,) = torch.autograd.grad(session.second_order(lambda block: torch.tensor(0.5)), session.gates[1])
    assert gradient.tolist() == pytest.approx([-0.25 * wanted[0], 0.25 * wanted[1]], rel=1e-5)
    predicted, squares = first_order_of_turn(session, 1, torch.tensor([2.0, 3.0]))
    assert predicted == 1.0 and float(squares) == pytest.approx(sum(wanted), rel=1e-5)


@pytest.mark.parametrize("routing", [PASSING, REUSING, BOTH])
def test_a_fit_repeats_the_pass_but_for_one_blocks_gates(
    routing: RoutingConfig, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(routing=routing, **ONE | {"gate_weight": 0.0})
    lesson, fits = trainer.lessons, []
    assert lesson.gate_curvature is not None
    monkeypatch.setattr(lesson.gate_curvature, "update", lambda block, moments: fits.append(moments))
    if lesson.curvature is not None:
        monkeypatch.setattr(lesson.curvature, "due", lambda step: ())
    losses = lesson.micro_batch("router", trainer.draws.at(0)[0], 0)
    plain, session = losses["output"], trainer.routed.gate_session
    gains = torch.autograd.grad(losses["total"], list(session.gates.values()))
    wanted = {
        block: float(torch.where(session.runs(block), -gain, gain).sum())
        for block, gain in zip(session.gates, gains, strict=True)
    }

    def idle(session: BlockSession, block: int) -> FixedGates:
        again = turned(session, block)
        again.given[block] = 1.0 - again.given[block]
        return again

    for turns in (turned, idle):
        monkeypatch.setattr(lessons, "turned", turns)
        with monkeypatch.context() as patch:
            patch.setattr(lessons, "curvature_moments", lambda *given: torch.cat(given))
            again = lesson.micro_batch("router", trainer.draws.at(0)[0], 0, fit=True)["output"]
        assert torch.equal(plain, again)
        assert type(trainer.routed.gate_session) is BlockSession
    trainer.routed.session = trainer.routed.gate_session = None
    blocks = len(fits) // 2
    assert blocks == len(trainer.routed.routed) or routing is BOTH
    for change, predicted, squares in fits[:blocks]:
        assert change != 0.0 and squares > 0.0
        assert any(float(predicted) == pytest.approx(gain, rel=1e-4) for gain in wanted.values())
    # Where nothing is turned, the pass is the same to the last bit: gates, widths and tokens.
    assert [float(fit[0]) for fit in fits[blocks:]] == [0.0] * blocks


def test_turned_gates_are_those_of_one_block() -> None:
    session = BlockSession(TeacherRecord(()), (1.0,))
    for block in (1, 2):
        session.choose(block, torch.tensor([[9.0, 0.0], [-9.0, 0.0]]))
    again = turned(session, 2)
    assert again.choose(1, torch.zeros(2, 2))[0] == (True, False)
    assert again.choose(2, torch.zeros(2, 2))[0] == (False, True)
    assert session.runs(2).tolist() == [True, False]


def test_the_second_order_changes_the_gradient_and_not_the_loss(make_trainer: MakeTrainer) -> None:
    gradients, losses = [], []
    for estimator in ("residual", "residual-2"):
        trainer = make_trainer(estimator, routing=PASSING, estimator=estimator, **ONE)
        loss = trainer.lessons.micro_batch("router", trainer.draws.at(0)[0], 0, fit=True)["total"]
        loss.backward()
        trainer.routed.gate_session = None
        losses.append(loss.detach())
        parameters = trainer.routed.gates.router.parameters()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        trainer.close()
    assert torch.equal(*losses)
    assert not torch.allclose(*gradients)


def test_it_is_for_gates_that_learn_from_gradients(make_trainer: MakeTrainer) -> None:
    for routing, settings in (
        (REUSING, {"gate_signal": "damage"}), (PASSING, {"estimator": "residual"}), (RoutingConfig(TokenRouting()), {}),
    ):  # fmt: skip
        trainer = make_trainer(routing=routing, **ONE | settings)
        assert trainer.lessons.gate_curvature is None
        trainer.close()


def test_a_run_resumes_exactly(pipe: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = ONE | {"checkpoint_every": 2}
    whole = make_trainer("whole", routing=PASSING, **settings)
    whole.run()
    assert whole.lessons.gate_curvature is not None and whole.lessons.gate_curvature.moments.any()
    sl.detach(pipe)
    for stop in (3, 4):
        part = make_trainer("parts", routing=PASSING, **settings)
        part.run(until=stop)
        if stop < 4:
            part.close()
    assert part.lessons.gate_curvature is not None
    assert torch.equal(part.lessons.gate_curvature.moments, whole.lessons.gate_curvature.moments)
    files = [(tmp_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]
