"""Passes with gradients, for every family: what training selects is what inference selects, with checkpointing or without."""

from typing import Any

import pytest
import torch
from families import build
from matrix_help import TOKENS, close, gated, kept, one_batch, run, widths_of
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec
from shivelight.training.session import BlockSession, TeacherRecord, TokenSession


def centred(pipe: Any, name: str, call: dict[str, Any], widths: tuple[float, ...]) -> Any:
    """Gates of a bare transformer whose biases stand where two samples disagree."""
    routed = gated(pipe.transformer, reuse=False, widths=widths)

    def centre(block: int, x: Tensor, out: Tensor, kept: Any, text: Any) -> None:
        head = routed.gates.router.routers[str(block)].gate_head
        head.bias -= routed.read_gates(block, x, None)[:, 0].mean()

    routed.observer = centre
    run(pipe.transformer, call)
    routed.observer = None
    return routed


def train(model: Any) -> None:
    """Training mode without the backbone's own noise: DiT leaves out classes at random."""
    model.train()
    for part in model.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0


def teacher_of(model: Any, call: dict[str, Any]) -> TeacherRecord:
    record, routed = TeacherRecord(()), routed_of(model)
    routed.observer = record
    with sl.dense(model):
        run(model, call)
    routed.observer = None
    return record


@pytest.mark.parametrize("way", ["whole", "widths"])
def test_training_without_noise_runs_the_blocks_of_inference(name: str, way: str) -> None:
    if way == "widths" and widths_of(name) == (1.0,):
        return  # refused, which a test of its own shows
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    routed = centred(pipe, name, call, (1.0,) if way == "whole" else (0.25, 0.5, 1.0))
    inference, acted = run(model, call), dict(routed.spending.actions)
    assert acted["run"] and acted["skip"]
    orders = {} if way == "whole" else {block: routed.gates.order(block) for block in routed.routed}
    widths = routed.config.blocks.widths
    routed.gate_session = session = BlockSession(teacher_of(model, call), widths, orders)
    train(model)
    trained = model(**call)[0].detach()  # with gradients on: nothing of the forward value may depend on that
    assert int(session.ran().sum()) == acted["run"]
    if way == "whole":
        assert torch.equal(trained, inference)
    else:  # a mask and a slice sum in another order
        close(trained, inference)


@pytest.mark.parametrize("name", TOKENS)
def test_training_without_noise_keeps_the_tokens_of_inference(name: str) -> None:
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    routed = kept(model)
    inference = run(model, call)
    scale = find_spec(model).timestep_scale
    row = sl.current_schedule(model).row(round(float(call["timestep"].reshape(-1)[0]) * scale) - 1)
    ratios = torch.tensor([row]) / routed.shape[0]
    assert 0 < ratios.min() < 1
    for estimator in ("input", "residual"):
        routed.session = TokenSession(routed.routed, ratios, teacher_of(model, call), estimator=estimator)
        train(model)
        assert torch.equal(model(**call)[0].detach(), inference), estimator
        routed.session = None


@pytest.mark.parametrize("way", ["blocks", "tokens"])
def test_gradient_checkpointing_changes_no_gradient(name: str, way: str) -> None:
    if way == "tokens" and name not in TOKENS:
        return
    pipe = build(name)
    call, model = one_batch(pipe, name, 0, 1), pipe.transformer
    if way == "blocks":
        centred(pipe, name, call, widths_of(name))
    else:
        kept(model)
    routed, ran = routed_of(model), []
    spec = find_spec(model)
    for index, (_, block) in enumerate(spec.block_list(model)):
        attention = next(part for part in block.modules() if "Attention" in type(part).__name__)
        attention.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    train(model)

    def gradients() -> tuple[Tensor, ...]:
        ran.clear()
        start = call["hidden_states"].clone().requires_grad_()
        parameters = [p.requires_grad_() for p in routed.parameters() if p.is_floating_point()]
        out = model(**call | {"hidden_states": start})[0]
        found = torch.autograd.grad(out.square().sum(), [start, *parameters], allow_unused=True)
        return out.detach(), *(torch.zeros(()) if g is None else g for g in found)

    expected, once = gradients(), len(ran)
    assert expected[1].any()
    model.enable_gradient_checkpointing()
    again = gradients()
    assert len(ran) == 2 * once
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
