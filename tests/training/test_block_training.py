"""Block routing in training: the pass that inference makes, gradients around it, and whole short runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_inputs
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.reuse import CachedPass
from shivelight.training.session import BlockSession, TeacherRecord, TokenSession
from shivelight.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
BLOCKS = sl.BlockRouting(start="random", token_stride=1)


def attach_near_threshold(model: Any, config: sl.RoutingConfig) -> Any:
    """Random routers that disagree between samples, centred on the threshold."""
    torch.manual_seed(0)
    sl.attach(model, config)
    routed = routed_of(model)
    with torch.no_grad():
        for name, parameter in routed.gates.named_parameters():
            if parameter.ndim == 2 and "modulation" not in name:
                parameter.mul_(3.0)

        def centre(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
            head = routed.gates.router.routers[str(block)].gate_head
            head.bias -= routed.read_gates(block, x, None)[:, 0].median() + 1e-3

        routed.observer = centre
        model(**tiny_inputs(4, 500.0), return_dict=False)
        routed.observer = None
    return routed


def dense_record(model: Any) -> TeacherRecord:
    record, routed = TeacherRecord(()), routed_of(model)
    routed.observer = record
    with torch.no_grad(), routed.switched(False):
        model(**tiny_inputs(4, 500.0), return_dict=False)
    routed.observer = None
    return record


@pytest.mark.parametrize("widths", [(1.0,), (0.25, 0.5, 1.0)])
@pytest.mark.parametrize("tokens", [False, True])
def test_the_training_pass_is_the_inference_pass(pipe: StableDiffusion3Pipeline, widths: Any, tokens: bool) -> None:
    model = pipe.transformer
    blocks = dataclasses.replace(BLOCKS, widths=widths)
    routed = attach_near_threshold(model, sl.RoutingConfig(sl.TokenRouting() if tokens else None, blocks))
    sl.set_budget(model, threshold=0.5, **({"keep": 0.5} if tokens else {}))
    with torch.no_grad():
        inference = model(**tiny_inputs(4, 500.0), return_dict=False)[0]
        acted = dict(routed.spending.actions)
        assert acted["run"] and acted["skip"]
        teacher = dense_record(model)
        ratio = sl.current_schedule(model).row(499) if tokens else ()
        if tokens:
            ratios = torch.tensor([[k / 64 for k in ratio]])
            routed.session = TokenSession(routed.routed, ratios, teacher)
        orders = {block: routed.gates.order(block) for block in routed.routed} if len(widths) > 1 else {}
        routed.gate_session = session = BlockSession(teacher, widths, orders)
        training = model(**tiny_inputs(4, 500.0), return_dict=False)[0]
    assert int(session.ran().sum()) == acted["run"]
    if len(widths) == 1:
        assert torch.equal(training, inference)
    else:  # a mask and a slice sum in another order
        torch.testing.assert_close(training, inference, atol=2e-5, rtol=1e-4)


def test_a_skipped_sample_tells_its_gate_what_the_block_would_have_added(pipe: StableDiffusion3Pipeline) -> None:
    model = pipe.transformer
    routed = attach_near_threshold(model, sl.RoutingConfig(None, dataclasses.replace(BLOCKS, widths=(1.0,))))
    teacher = dense_record(model)
    x, text = torch.randn(4, 64, 32), torch.randn(4, 7, 32)
    session = BlockSession(teacher, (1.0,))
    logits = torch.tensor([[0.3, 0.0], [-0.3, 0.0], [0.1, 0.0], [-2.0, 0.0]], requires_grad=True)
    runs, mask = session.choose(1, logits)
    assert runs == (True, False, True, False) and mask is None
    out, text_out = torch.randn_like(x), torch.randn_like(text)
    ran = torch.tensor(runs)[:, None, None]
    passed = torch.where(ran, out, x), torch.where(ran, text_out, text)
    image, words = session.leave(1, (x, text), passed)
    assert torch.equal(image, passed[0]) and torch.equal(words, passed[1])
    upstream, upstream_text = torch.randn_like(x), torch.randn_like(text)
    ((image * upstream).sum() + (words * upstream_text).sum()).backward()
    residual = torch.where(ran, out - x, teacher.residuals[1])
    residual_text = torch.where(ran, text_out - text, teacher.text_residuals[1])
    gain = (upstream * residual).sum((1, 2)) + (upstream_text * residual_text).sum((1, 2))
    p = torch.sigmoid(logits.detach()[:, 0])
    torch.testing.assert_close(logits.grad[:, 0], gain * p * (1 - p))
    assert routed.gate_session is None


@pytest.mark.parametrize("tokens", [False, True])
def test_a_short_run_leaves_an_adapter_with_records_and_channel_orders(
    pipe: StableDiffusion3Pipeline, make_trainer: MakeTrainer, sample: Any, tokens: bool
) -> None:
    routing = sl.RoutingConfig(sl.TokenRouting() if tokens else None, sl.BlockRouting(), sl.DeltaConfig(rank=2))
    trainer = make_trainer(routing=routing, rank_batches=2)
    folder = trainer.run()
    assert {"gates", "width", "output"} <= set(trainer.history[-1]) and ("keep" in trainer.history[-1]) == tokens
    gates = trainer.routed.gates
    records = gates.records
    assert records.filled == 4 * 2  # of the trained routers: batches x samples
    assert len(records.shift[:8].unique()) == 4 and len(records.timestep[:8].unique()) == 4
    assert any(not torch.equal(gates.order(block), torch.arange(128)) for block in trainer.routed.routed)
    sl.set_budget(pipe, compute=0.6)
    trained = sample(pipe, ["a b"])
    orders = {block: gates.order(block).clone() for block in trainer.routed.routed}
    trainer.close()
    dense = sample(pipe, ["a b"])
    sl.load_adapter(pipe, folder)
    assert torch.equal(sample(pipe, ["a b"]), dense) or routing.deltas is not None
    sl.set_budget(pipe, compute=0.6)
    assert torch.equal(sample(pipe, ["a b"]), trained)
    assert all(torch.equal(routed_of(pipe).gates.order(block), order) for block, order in orders.items())


def test_a_run_of_gates_that_was_killed_goes_on_exactly(make_trainer: MakeTrainer) -> None:
    routing = sl.RoutingConfig(None, sl.BlockRouting(), sl.DeltaConfig(rank=2))
    whole = make_trainer("whole", routing=routing)
    whole.run()
    expected = {name: value.clone() for name, value in whole.state_tensors().items()}
    losses = [record["loss"] for record in whole.history]
    whole.close()
    first = make_trainer("parts", routing=routing)
    first.run(until=3)
    first.close()
    second = make_trainer("parts", routing=routing)
    second.run()
    assert [record["loss"] for record in second.history] == losses
    found = second.state_tensors()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_both_losses_pull_to_their_targets(make_trainer: MakeTrainer) -> None:
    routing = sl.RoutingConfig(None, sl.BlockRouting())
    settings: dict[str, Any] = {"output_weight": 0.0, "feature_weight": 0.0, "flow_weight": 0.0, "policy_steps": 0}
    trainer = make_trainer(
        routing=routing, router_steps=60, joint_steps=0, lr_gates=1e-2, gate_target=0.3, width_target=0.4,
        calibration_batches=0, **settings,
    )  # fmt: skip
    trainer.run()
    records = trainer.routed.gates.records
    last = slice(records.filled - 40, records.filled)
    shares = torch.softmax(records.width[last], -1) @ torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert abs(float(torch.sigmoid(records.gate[last]).mean()) - 0.3) < 0.1
    assert float(shares.mean()) < 0.8  # widths of blocks that do not run have no pull, so this one is slower


def test_settings_that_make_no_sense_are_refused(make_trainer: MakeTrainer) -> None:
    for name, value in (
        ("gate_target", 0.0), ("width_target", 1.2), ("rank_batches", -1), ("calibration_batches", -1),
        ("gate_low", 0.0), ("gate_high", None),
    ):  # fmt: skip
        with pytest.raises(sl.TrainingError, match=name):
            make_trainer(**{name: value})


def test_the_joint_stage_trains_at_every_budget(make_trainer: MakeTrainer) -> None:
    routing = sl.RoutingConfig(None, sl.BlockRouting(start="random", token_stride=1), sl.DeltaConfig(rank=2))
    shares = {}
    for low, high in ((0.2, 0.3), (0.9, 1.0), (None, None)):
        trainer = make_trainer(
            f"run-{low}", routing=routing, router_steps=4, policy_steps=0, joint_steps=6, gate_low=low, gate_high=high
        )
        trainer.run()
        routers, joint = trainer.history[:4], trainer.history[4:]
        shares[low] = sum(record["gates"] for record in joint) / 6
        assert [record["gates"] for record in routers] == shares.setdefault("routers", [r["gates"] for r in routers])
        trainer.close()
    assert shares[0.2] < 0.4 and shares[0.9] > 0.85  # records are of other samples, so the share is met on average


def test_an_adapter_whose_channel_order_is_no_permutation_is_refused(
    pipe: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    folder = sl.save_adapter(pipe, tmp_path / "adapter")
    sl.detach(pipe)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["gates.order_2"][0] = 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(sl.AdapterError, match="order of block 2"):
        sl.load_adapter(pipe, folder)
    assert routed_of(pipe, missing_ok=True) is None


@pytest.mark.parametrize(("estimator", "reuse"), [("residual", False), ("residual", True), ("input", False)])
def test_a_skipped_sample_says_nothing_about_its_tokens(
    pipe: StableDiffusion3Pipeline, estimator: Any, reuse: bool
) -> None:
    model = pipe.transformer
    routed = attach_near_threshold(
        model, sl.RoutingConfig(sl.TokenRouting(), dataclasses.replace(BLOCKS, widths=(1.0,)))
    )
    teacher = dense_record(model)
    with torch.no_grad():
        routed.gates.router.routers["2"].gate_head.bias.fill_(-1e4)
    ratios = torch.full((1, 3), 0.5, requires_grad=True)
    x = torch.randn(4, 64, 32)
    cached = {b: CachedPass(x, 0.1 * torch.randn(4, 64, 32), torch.rand(4, 64), {}) for b in routed.routed}
    routed.session = TokenSession(routed.routed, ratios, teacher, estimator=estimator, cached=cached if reuse else {})
    routed.gate_session = BlockSession(teacher, (1.0,))
    if reuse:
        routed.config = dataclasses.replace(routed.config, reuse=sl.Reuse(context=False))
    model(**tiny_inputs(4, 500.0), return_dict=False)[0].square().sum().backward()
    assert ratios.grad is not None and ratios.grad[0, 1] == 0 and ratios.grad[0, 2] != 0


def test_gradient_checkpointing_trains_the_same_gates(make_trainer: MakeTrainer) -> None:
    routing = sl.RoutingConfig(
        sl.TokenRouting(), sl.BlockRouting(start="random", token_stride=1), sl.DeltaConfig(rank=2)
    )
    gradients = []
    for checkpointing in (False, True):
        trainer = make_trainer(f"run-{checkpointing}", routing=routing, router_steps=0, policy_steps=0)
        if checkpointing:
            trainer.backbone.enable_gradient_checkpointing()
            trainer.backbone.train()
        trainer.train_step()
        gradients.append({name: p.detach().clone() for name, p in trainer.named_parameters().items()})
        trainer.close()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5, rtol=1e-3)


def test_what_has_nothing_to_train_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(sl.TrainingError, match="router='interval' has nothing to train"):
        make_trainer(routing=sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
