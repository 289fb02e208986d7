"""The curvature of the second order: fits that find it, swaps that change what they say, and a run that resumes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shivelight as sl
from shivelight.config import RoutingConfig, TokenRouting
from shivelight.training import lessons
from shivelight.training.curvature import FIT_EVERY, Curvature, SwapSession, first_order, swapped
from shivelight.training.session import BlockSession, TeacherRecord, TokenSession
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


def record(kept: torch.Tensor) -> TokenSession:
    session = TokenSession((1,), torch.full((1, 1), 0.5), TeacherRecord(()), estimator="residual-2")
    session.kept[1] = kept
    session.squares[1] = torch.arange(kept.numel(), dtype=torch.float32).view(kept.shape)
    session.decided[1] = torch.where(kept, 1.0, -1.0), tuple(kept.sum(1).tolist())
    return session


def test_every_block_is_fitted_once_and_then_in_turn() -> None:
    curvature = Curvature((1, 2, 3))
    assert curvature.due(0) == curvature.due(7) == (1, 2, 3)
    for block in (1, 3):
        curvature.update(block, torch.tensor([4.0, 2.0]))
    assert curvature.due(5) == (2,)
    curvature.update(2, torch.zeros(2))  # no swap: still missing
    assert curvature.due(5) == (2,) and curvature.of(2) == 0.0
    curvature.update(2, torch.tensor([1.0, 1.0]))
    assert [curvature.due(step) for step in range(2 * FIT_EVERY + 1)][::FIT_EVERY] == [(1,), (2,), (3,)]
    assert curvature.due(1) == ()


def test_the_curvature_is_the_ratio_of_averages() -> None:
    curvature = Curvature((4,), reduce=lambda value, reduction: value / 2)
    curvature.update(4, torch.tensor([4.0, 2.0]))
    assert curvature.of(4).item() == 2.0
    curvature.update(4, torch.tensor([0.0, 12.0]))
    torch.testing.assert_close(curvature.moments[0], torch.tensor([0.8 * 2.0, 0.8 * 1.0 + 0.2 * 6.0]))
    assert curvature.of(4).item() == pytest.approx(1.6 / 2.0)


def test_a_swap_keeps_every_samples_number_and_the_other_blocks() -> None:
    kept = torch.zeros(2, 256, dtype=torch.bool)
    kept[0, :100], kept[1, 50:200] = True, True
    session = record(kept)
    session.decided[2] = torch.randn(2, 256), (9, 9)
    swap = swapped(session, 1, torch.Generator().manual_seed(0))
    assert swap is not None
    assert swap.taken_out.sum(1).tolist() == swap.put_in.sum(1).tolist() == [4, 4]
    assert bool(kept[swap.taken_out].all()) and not kept[swap.put_in].any()
    scores, counts = swap.decide(1, torch.zeros(2, 256))
    assert counts == (100, 150)
    for sample, k in enumerate(counts):
        chosen = torch.zeros(256, dtype=torch.bool)
        chosen[scores[sample].topk(k).indices] = True
        assert torch.equal(chosen, (kept ^ swap.taken_out ^ swap.put_in)[sample])
    assert torch.equal(swap.decide(2, torch.zeros(2, 256))[0], session.decided[2][0])
    gain = torch.randn(2, 256)
    predicted, squares = first_order(swap, gain)
    torch.testing.assert_close(predicted, gain[swap.put_in].sum() - gain[swap.taken_out].sum())
    assert squares == session.squares[1][swap.put_in].sum() + session.squares[1][swap.taken_out].sum()
    assert swapped(record(torch.ones(1, 8, dtype=torch.bool)), 1, torch.Generator()) is None


def test_a_fit_repeats_the_pass_exactly_and_changes_nothing(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(routing=RoutingConfig(TokenRouting()), estimator="residual-2")
    draw = trainer.draws.at(0)[0]
    plain = trainer.lessons.micro_batch("router", draw, 0)["output"]
    fits: list[torch.Tensor] = []
    monkeypatch.setattr(trainer.lessons.curvature, "update", lambda block, moments: fits.append(moments))

    def idle(session: TokenSession, block: int, generator: torch.Generator) -> SwapSession:
        nothing = torch.zeros_like(session.kept[block])
        return SwapSession(session, block, nothing, nothing)

    for swaps in (swapped, idle):
        monkeypatch.setattr(lessons, "swapped", swaps)
        with monkeypatch.context() as patch:
            patch.setattr(lessons, "curvature_moments", lambda *given: torch.cat(given))
            again = trainer.lessons.micro_batch("router", trainer.draws.at(0)[0], 0, fit=True)["output"]
        assert torch.equal(plain, again)
        assert trainer.routed.session is not None and isinstance(trainer.routed.session, TokenSession)
    trainer.routed.session = None
    blocks = len(trainer.routed.routed)
    for change, predicted, squares in fits[:blocks]:
        assert change != 0.0 and predicted != 0.0 and squares > 0.0
    # Where nothing changes places, the pass is the same to the last bit.
    assert [fit.tolist() for fit in fits[blocks:]] == [[0.0, 0.0, 0.0]] * blocks


def test_the_second_order_changes_the_gradient_and_not_the_loss(make_trainer: MakeTrainer) -> None:
    gradients, losses = [], []
    for estimator in ("residual", "residual-2"):
        trainer = make_trainer(estimator, routing=RoutingConfig(TokenRouting()), estimator=estimator)
        loss = trainer.lessons.micro_batch("router", trainer.draws.at(0)[0], 0, fit=True)["total"]
        trainer.routed.session = None
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.routed.router.parameters() if p.grad is not None])
        )
        trainer.close()
    assert torch.equal(*losses)
    assert not torch.allclose(*gradients)


def test_a_run_of_the_second_order_resumes_exactly(
    pipe,  # noqa: ANN001
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    whole = make_trainer("whole", estimator="residual-2")
    whole.run()
    assert whole.lessons.curvature is not None and whole.lessons.curvature.moments.any()
    sl.detach(pipe)
    for stop in (3, 6):
        part = make_trainer("parts", estimator="residual-2")
        part.run(until=stop)
        if stop < 6:
            part.close()
    assert part.lessons.curvature is not None
    assert torch.equal(part.lessons.curvature.moments, whole.lessons.curvature.moments)
    files = [(tmp_path / run / "adapter/adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_blocks_and_reuse_go_with_it(make_trainer: MakeTrainer) -> None:
    routing = RoutingConfig(
        TokenRouting(sees_drift=True), sl.BlockRouting(widths=(1.0,), closed="reuse"), reuse=sl.Reuse()
    )
    trainer = make_trainer(routing=routing, router_steps=0, policy_steps=0, joint_steps=2, estimator="residual-2")
    trainer.train_step()
    assert trainer.lessons.curvature is not None and bool((trainer.lessons.curvature.updates > 0).any())
    assert bool(torch.isfinite(trainer.lessons.curvature.moments).all())


def test_gradient_checkpointing_trains_the_same_routers(make_trainer: MakeTrainer) -> None:
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(f"run-{checkpointing}", routing=RoutingConfig(TokenRouting()), estimator="residual-2")
        if checkpointing:
            trainer.backbone.enable_gradient_checkpointing()
            trainer.backbone.train()
        trainer.train_step()
        assert trainer.lessons.curvature is not None
        trained.append({name: value.detach().clone() for name, value in trainer.state_tensors().items()})
        trainer.close()
    assert trained[0]["curvature.moments"].any()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-5, rtol=1e-3)


def test_a_sample_that_skips_the_block_has_no_second_order() -> None:
    kept = torch.tensor([[True, False]] * 2)
    session = record(kept)
    session.teacher.residuals[1] = torch.ones(2, 2, 3)
    session.gating = BlockSession(session.teacher, (1.0,))
    runs, _ = session.gating.choose(1, torch.tensor([[9.0, 0.0], [-9.0, 0.0]]))
    assert runs == (True, False)
    session.decide(1, torch.randn(2, 2, requires_grad=True))
    session.leave(1, torch.zeros(2, 2, 3), torch.full((2, 2, 3), 2.0) * kept[..., None], kept)
    assert session.squares[1].tolist() == [[12.0, 3.0], [0.0, 0.0]]
    (gradient,) = torch.autograd.grad(session.second_order(lambda block: torch.tensor(0.5)), session.inclusions[1])
    assert gradient.tolist() == [[-3.0, 0.75], [0.0, 0.0]]
