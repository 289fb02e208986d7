"""Token routing that is trained with reuse: the same pass as inference makes, and what the router is taught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_inputs

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.reuse import centred_log_drift
from shivelight.routing import PairRouter
from shivelight.training.session import PassRecord, TeacherRecord, TokenSession
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


def reusing() -> sl.RoutingConfig:
    tokens = sl.TokenRouting(sees_drift=True, bottleneck=8, policy_width=16)
    return sl.RoutingConfig(tokens, reuse=sl.Reuse(warmup=0.6))


@torch.no_grad()
def test_the_training_pass_is_the_third_step_of_a_generation(pipe: StableDiffusion3Pipeline) -> None:
    pipe._guidance_scale = 0.0
    torch.manual_seed(0)
    sl.attach(pipe, reusing())
    sl.set_budget(pipe, keep=0.8)
    routed, model = routed_of(pipe), pipe.transformer
    for pair in routed.router.pairs.values():
        pair.from_drift.weight.normal_()
    pipe.scheduler.set_timesteps(3)
    records, outputs = [], []
    for time in pipe.scheduler.timesteps:
        record = PassRecord(model, routed.spec, routed.routed, context=True)
        routed.observer = record
        with record.listening():
            outputs.append(model(**tiny_inputs(2, float(time)), return_dict=False)[0])
        routed.observer = None
        records.append(record)
        pipe.scheduler.step(outputs[-1], time, outputs[-1])
    kept = sl.current_schedule(pipe, 3).row(2)
    assert max(kept) < 64 and sl.current_schedule(pipe, 3).row(1) == (64, 64, 64)
    last = tiny_inputs(2, float(pipe.scheduler.timesteps[2]))
    teacher = TeacherRecord(())
    routed.observer = teacher
    with routed.switched(False):
        model(**last)
    routed.observer = None
    # The projections of the third step were completed in place; those of the second are what it began with.
    cached = records[1].aged(records[0], 1)
    routed.clock.reset()
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()
    routed.session = TokenSession(routed.routed, torch.tensor([[k / 64 for k in kept]]), teacher, cached=cached)
    trained = model(**last)[0]
    routed.session = None
    torch.testing.assert_close(trained, outputs[2], atol=1e-5, rtol=1e-4)
    with routed.switched(False):
        assert (model(**last)[0] - trained).abs().max() > 1e-3


def test_a_fresh_router_ranks_by_the_drift_and_can_learn_to_use_it() -> None:
    torch.manual_seed(0)
    router = PairRouter(6, 4, None, 2, 8, sees_drift=True)
    x, time = torch.randn(3, 20, 6), torch.randn(3, 4)
    moved = torch.rand(3, 20) * 10
    drift = centred_log_drift(moved)
    torch.testing.assert_close(drift.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    context = router.context(time, None)
    scores = router(1, x, context, drift)
    plain = router(1, x, context)
    torch.testing.assert_close(scores, plain + 3.0 * drift)
    scores.square().sum().backward()
    assert router.from_drift.weight.grad.abs().sum() > 0 and router.drift_weight.grad.tolist()[0] == 0
    with torch.no_grad():
        router.from_drift.weight.normal_()
    assert not torch.allclose(router(1, x, context, drift) - 3.0 * drift, plain)


def test_the_router_learns_what_running_adds_to_the_cached_residual(pipe: StableDiffusion3Pipeline) -> None:
    torch.manual_seed(0)
    sl.attach(pipe.transformer, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    routed, model = routed_of(pipe.transformer), pipe.transformer
    records = []
    for time in (600.0, 700.0):
        record = PassRecord(model, routed.spec, routed.routed, context=False)
        routed.observer = record
        with torch.no_grad(), routed.switched(False):
            model(**tiny_inputs(2, time), return_dict=False)
        records.append(record)
    teacher = TeacherRecord(())
    routed.observer = teacher
    with torch.no_grad(), routed.switched(False):
        model(**tiny_inputs(2, 500.0), return_dict=False)
    routed.observer = None
    cached = records[0].aged(records[1], 1.0)
    session = TokenSession(routed.routed, torch.full((1, 3), 0.5), teacher, cached=cached, rank_temperature=1.0)
    x, out = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
    scores = torch.randn(2, 64, requires_grad=True)
    session.decide(2, scores)
    pi = session.inclusions[2]
    kept = torch.rand(2, 64) > 0.5
    left = session.leave(2, x, out, kept)
    assert torch.equal(left, out)
    upstream = torch.randn_like(out)
    gradient = torch.autograd.grad((left * upstream).sum(), pi)[0]
    gain = torch.where(kept[..., None], out - x, teacher.residuals[2]) - cached[2].residual
    torch.testing.assert_close(gradient, (gain * upstream).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_short_run_with_reuse_leaves_an_adapter_that_reuses(
    pipe: StableDiffusion3Pipeline, make_trainer: MakeTrainer, loads_back: Callable[..., None]
) -> None:
    routing = sl.RoutingConfig(sl.TokenRouting(sees_drift=True), deltas=sl.DeltaConfig(rank=2), reuse=sl.Reuse())
    trainer = make_trainer(routing=routing)
    folder = trainer.run()
    assert trainer.draws.earlier(0.5, 1) == pytest.approx(0.5 + 1 / 25) and trainer.draws.earlier(0.99, 3) == 1.0
    loads_back(trainer, folder, keep=0.6)
    assert "residuals up to" in sl.summary(pipe)


def test_drift_needs_reuse() -> None:
    with pytest.raises(sl.AdapterError, match="sees_drift.*reuse"):
        sl.RoutingConfig(sl.TokenRouting(sees_drift=True))
