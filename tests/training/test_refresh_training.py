"""Gates that are trained with the residuals they reuse: the pass that inference makes, the gates' gradient, short runs."""

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
from shivelight.execution.reuse import CachedPass
from shivelight.routing import Dial
from shivelight.training.session import BlockSession, PassRecord, TeacherRecord, TokenSession
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
BLOCKS = sl.BlockRouting(start="random", token_stride=1, widths=(1.0,), closed="reuse")


@pytest.mark.parametrize("tokens", [False, True])
@torch.no_grad()
def test_the_training_pass_is_the_third_step_of_a_generation(pipe: StableDiffusion3Pipeline, tokens: bool) -> None:
    pipe._guidance_scale = 0.0
    torch.manual_seed(0)
    routing = sl.TokenRouting(sees_drift=True, bottleneck=8, policy_width=16) if tokens else None
    sl.attach(pipe, sl.RoutingConfig(routing, BLOCKS, reuse=sl.Reuse(warmup=0.6, blocks_after=0.6)))
    routed, model = routed_of(pipe), pipe.transformer
    sl.set_budget(pipe, threshold=0.5, **({"keep": 0.8} if tokens else {}))
    pipe.scheduler.set_timesteps(3)
    times = [float(time) for time in pipe.scheduler.timesteps]
    said: dict[int, Any] = {}
    read = routed.read_gates

    def listen(block: int, *args: Any, **kwargs: Any) -> Any:
        said[block] = read(block, *args, **kwargs)
        return said[block]

    routed.read_gates = listen

    def generate() -> list[Any]:
        records.clear()
        outputs = []
        for time in times:
            record = PassRecord(model, routed.spec, routed.routed, context=tokens)
            routed.observer = record
            with record.listening():
                outputs.append(model(**tiny_inputs(4, time), return_dict=False)[0])
            routed.observer = None
            records.append(record)
            pipe.scheduler.step(outputs[-1], time, outputs[-1])
        routed.reset()
        pipe.scheduler.set_timesteps(3)
        return outputs

    records: list[PassRecord] = []
    generate()
    for block in routed.routed:  # so that samples disagree
        routed.gates.router.routers[str(block)].gate_head.bias -= said[block][:, 0].median() + 1e-3
        generate()
    outputs, acted = generate()[2], dict(routed.spending.actions)
    assert acted["reuse"] and acted["skip"] == 0
    kept = sl.current_schedule(pipe, 3).row(2) if tokens else ()
    last, teacher = tiny_inputs(4, times[2]), TeacherRecord(())
    routed.observer = teacher
    with routed.switched(False):
        model(**last)
    routed.observer = None
    cached = records[1].aged(records[0], 1)
    routed.read_gates = read
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()
    routed.reset()
    if tokens:
        routed.session = TokenSession(routed.routed, torch.tensor([[k / 64 for k in kept]]), teacher, cached=cached)
    routed.gate_session = session = BlockSession(teacher, (1.0,), cached=cached)
    trained = model(**last)[0]
    assert int((~session.ran()).sum()) == acted["reuse"]
    torch.testing.assert_close(trained, outputs, atol=1e-5, rtol=1e-4)


def test_a_closed_gate_learns_what_running_adds_to_its_residual() -> None:
    torch.manual_seed(0)
    x, text = torch.randn(4, 6, 8), torch.randn(4, 3, 8)
    teacher = TeacherRecord((), {1: torch.randn_like(x)}, {1: torch.randn_like(text)})
    cached = CachedPass(x, torch.randn_like(x), torch.rand(4, 6), {}, torch.randn_like(text))
    slope = torch.tensor(0.5, requires_grad=True)
    session = BlockSession(teacher, (1.0,), dial=Dial(shift=0.2), cached={1: cached}, raised={1: slope * math.log(3)})
    logits = torch.tensor([[0.3, 0.0], [-0.9, 0.0], [-0.6, 0.0], [-2.0, 0.0]], requires_grad=True)
    runs, _ = session.choose(1, logits)
    assert runs == (True, False, True, False)
    out, text_out = torch.randn_like(x), torch.randn_like(text)
    ran = torch.tensor(runs)[:, None, None]
    image, words = session.leave(1, (x, text), (torch.where(ran, out, x), torch.where(ran, text_out, text)))
    torch.testing.assert_close(image, torch.where(ran, out, x + cached.residual))
    torch.testing.assert_close(words, torch.where(ran, text_out, text + cached.text_residual))
    upstream, upstream_text = torch.randn_like(x), torch.randn_like(text)
    ((image * upstream).sum() + (words * upstream_text).sum()).backward()
    gain = torch.where(ran, out - x, teacher.residuals[1]) - cached.residual
    text_gain = torch.where(ran, text_out - text, teacher.text_residuals[1]) - cached.text_residual
    total = (upstream * gain).sum((1, 2)) + (upstream_text * text_gain).sum((1, 2))
    p = torch.sigmoid(logits.detach()[:, 0] + 0.5 * math.log(3) + 0.2)
    torch.testing.assert_close(logits.grad[:, 0], total * p * (1 - p))
    torch.testing.assert_close(slope.grad, (total * p * (1 - p)).sum() * math.log(3))


@pytest.mark.parametrize("tokens", [False, True])
def test_a_short_run_leaves_an_adapter_that_serves_budgets(
    pipe: StableDiffusion3Pipeline, make_trainer: MakeTrainer, loads_back: Callable[..., None], tokens: bool
) -> None:
    blocks = sl.BlockRouting(closed="reuse")
    routing = sl.RoutingConfig(
        sl.TokenRouting(sees_drift=True) if tokens else None, blocks, sl.DeltaConfig(rank=2), sl.Reuse()
    )
    trainer = make_trainer(routing=routing, rank_batches=1, calibration_batches=6, max_age=2, lr_router=0.1)
    assert {draw.age for step in range(20) for draw in trainer.draws.at(step)} == {1, 2}
    folder = trainer.run()
    records = trainer.routed.gates.records
    assert records.filled == 6 * trainer.config.group_size
    slopes = trainer.routed.gates.age_slopes.detach()
    assert (slopes != 3).all()  # where they began
    loads_back(trainer, folder, compute=0.6)
    torch.testing.assert_close(routed_of(pipe).gates.age_slopes, slopes)
    assert routed_of(pipe).config.blocks.closed == "reuse"
