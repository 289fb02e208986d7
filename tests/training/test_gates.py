import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.errors import TrainingError
from shivelight.execution.gates import choose_action
from shivelight.routing import Dial, gate_probability
from shivelight.training.gates import (
    apply_gate,
    expected_width,
    gate_loss,
    straight_through_gate,
    width_loss,
    width_mask,
)
from shivelight.training.losses import BudgetLoss

WIDTHS = (0.25, 0.5, 0.75, 1.0)
logit_rows = st.lists(st.lists(st.floats(-4, 4), min_size=4, max_size=4), min_size=1, max_size=4)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gate_is_exactly_zero_or_one_and_passes_its_gradient(dtype: torch.dtype) -> None:
    logits = torch.tensor([-30.0, -1.0, -0.001, 0.0, 0.8, 30.0], dtype=dtype, requires_grad=True)
    gate = straight_through_gate(logits, Dial())
    assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gate.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # the threshold itself runs
    (gate * torch.arange(6)).sum().backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, (torch.arange(6) * p * (1 - p)).to(dtype), atol=1e-2, rtol=1e-2)


def test_a_gate_that_is_nan_runs_in_training_too() -> None:
    assert straight_through_gate(torch.tensor([math.nan, -1.0]), Dial()).tolist() == [1.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6), st.floats(0.01, 0.99), st.floats(-5, 5, width=32)
)
def test_the_trained_gate_is_the_one_of_inference(values: list[float], threshold: float, shift: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    at_threshold = (
        torch.sigmoid(logits[0]).clamp(0.01, 0.99).item()
    )  # p of the first exactly there, as near as floats go
    for dial in (Dial(threshold, shift), Dial(at_threshold)):
        inference = [float(choose_action(value, dial, 0.0, may_reuse=False) == "run") for value in values]
        assert straight_through_gate(logits, dial).tolist() == inference
        moved = torch.sigmoid(logits + dial.shift) - dial.threshold
        clear = [i for i, distance in enumerate(moved.tolist()) if abs(distance) > 1e-6]
        assert [inference[i] for i in clear] == [float(moved[i] > 0) for i in clear]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.6, 0.7, 1.0]])
def test_a_gated_block_is_bitwise_its_output_or_its_input(dtype: torch.dtype, p: list[float]) -> None:
    x, out = randn(3, 5, 4).to(dtype), 1e3 * randn(3, 5, 4, seed=1).to(dtype)
    gate = straight_through_gate(torch.logit(torch.tensor(p)).requires_grad_(), Dial())
    routed = apply_gate(x, out, gate)
    assert routed.dtype == dtype
    for sample, value in enumerate(p):
        assert torch.equal(routed[sample], out[sample] if value >= 0.5 else x[sample])
    # A broken full output of a skipped sample does not reach the forward pass.
    broken = torch.where(torch.tensor(p)[:, None, None] < 0.5, math.nan, out)
    assert torch.equal(apply_gate(x, broken, gate), routed)


def test_gated_gradients_equal_the_written_out_form() -> None:
    x, block_weight, upstream = randn(4, 5, 3), randn(3, 3, seed=1), randn(4, 5, 3, seed=2)
    logit = torch.tensor([1.0, -0.5, 0.0, -2.0], dtype=torch.float64)

    def gradients(written_out: bool) -> tuple[torch.Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in (x, block_weight, logit)]
        leaf_x, leaf_weight, leaf_logit = leaves
        out = leaf_x + torch.tanh(leaf_x @ leaf_weight)
        if written_out:
            p = torch.sigmoid(leaf_logit)
            through = (p - p.detach())[:, None, None] * (out - leaf_x)
            routed = torch.where((p >= 0.5)[:, None, None], out, leaf_x) + through
        else:
            routed = apply_gate(leaf_x, out, straight_through_gate(leaf_logit, Dial()))
        return torch.autograd.grad((routed * upstream).sum(), leaves)

    ours = gradients(written_out=False)
    torch.testing.assert_close(ours, gradients(written_out=True))
    p = torch.sigmoid(logit)
    torch.testing.assert_close(ours[2], (upstream * torch.tanh(x @ block_weight)).sum((1, 2)) * p * (1 - p))
    assert torch.equal(ours[0][1], upstream[1]) and torch.equal(ours[0][3], upstream[3])  # skipped: the identity's


def test_the_gates_gradient_is_the_exact_derivative_of_a_block_weight() -> None:
    # x' = x + g (out - x): its loss gradient in g at g = 0 and 1 is what the straight-through gate claims.
    x, out, target = randn(3, 5, 4), randn(3, 5, 4, seed=1), randn(3, 5, 4, seed=2)
    weight = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    (x + weight[:, None, None] * (out - x) - target).pow(2).sum().backward()
    logits = torch.tensor([0.6, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    (apply_gate(x, out, straight_through_gate(logits, Dial())) - target).pow(2).sum().backward()
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, weight.grad * p * (1 - p))


def test_bf16_blocks_get_fp32_inner_products_in_the_gates_dtype() -> None:
    x, out = torch.zeros(1, 16, 256, dtype=torch.bfloat16), torch.ones(1, 16, 256, dtype=torch.bfloat16)
    upstream = torch.ones_like(x)
    upstream[0, 0, 0] = 4.0
    gate = torch.zeros(1, requires_grad=True)
    leaf = out.clone().requires_grad_()
    (apply_gate(x, leaf, gate) * upstream).sum().backward()
    assert gate.grad is not None and gate.grad.dtype == torch.float32
    assert gate.grad.item() == 4099.0  # bf16 has no 4099
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16 and not leaf.grad.any()


def mask_by_definition(share: float, hidden: int, order: list[int]) -> list[float]:
    first = order[: max(1, math.floor(share * hidden + 1e-9))]
    return [float(channel in first) for channel in range(hidden)]


@settings(deadline=None, max_examples=40)
@given(logit_rows, st.permutations(range(7)), st.booleans())
def test_width_mask_and_its_gradient_equal_brute_force(rows: list[list[float]], order: list[int], ranked: bool) -> None:
    logits = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    order = order if ranked else list(range(7))
    mask = width_mask(logits, WIDTHS, 7, torch.tensor(order) if ranked else None)
    masks = [mask_by_definition(share, 7, order) for share in WIDTHS]
    widest = [max(place for place, logit in enumerate(row) if logit == max(row)) for row in rows]
    assert mask.tolist() == [masks[place] for place in widest]

    upstream = randn(len(rows), 7)
    (gradient,) = torch.autograd.grad((mask * upstream).sum(), logits)
    q = torch.softmax(logits.detach(), -1)
    # d/dlogit_k of sum_s q_s <mask_s, upstream> is q_k (v_k - sum_s q_s v_s).
    values = upstream @ torch.tensor(masks, dtype=torch.float64).T
    torch.testing.assert_close(gradient, q * (values - (q * values).sum(-1, keepdim=True)), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_full_width_is_exactly_ones_and_every_mask_exact(dtype: torch.dtype) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    logits = randn(64, 4, seed=3).to(dtype)
    mask = width_mask(logits, WIDTHS, 96, order)
    assert mask.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    choices = logits.argmax(-1)
    assert torch.equal(mask.sum(-1), (choices + 1) * 24.0)
    assert ((mask == 0.0) | (mask == 1.0)).all()
    assert torch.equal(mask[choices == 3], torch.ones_like(mask[choices == 3])) and (choices == 3).any()
    for share, place in ((0.25, 0), (0.75, 2)):
        kept = order[: int(96 * share)]
        assert (mask[choices == place][:, kept] == 1.0).all()


def test_bf16_logits_get_an_fp32_gradient_path_also_under_autocast() -> None:
    logits, upstream = randn(3, 4).bfloat16(), randn(3, 32, seed=1).float()

    def gradient(autocast: bool) -> torch.Tensor:
        leaf = logits.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mask = width_mask(leaf, WIDTHS, 32)
        assert mask.dtype == torch.float32
        return torch.autograd.grad((mask * upstream).sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))
    leaf = logits.clone().requires_grad_()
    (width_mask(leaf, WIDTHS, 32) * upstream).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad, gradient(False).bfloat16())


def test_a_single_width_is_all_ones_without_a_pull() -> None:
    logits = torch.zeros(2, 1, requires_grad=True)
    mask = width_mask(logits, (1.0,), 5)
    assert torch.equal(mask, torch.ones(2, 5))
    (mask.sum() + expected_width(logits, (1.0,)).sum()).backward()
    assert logits.grad is not None and not logits.grad.any()
    assert expected_width(logits, (1.0,)).tolist() == [1.0, 1.0]


def test_width_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TrainingError, match="3 width logits for 4 widths"):
        width_mask(torch.zeros(2, 3), WIDTHS, 8)
    with pytest.raises(TrainingError, match="3 width logits for 4 widths"):
        expected_width(torch.zeros(2, 3), WIDTHS)
    with pytest.raises(TrainingError, match=r"order has shape \(7,\); the MLP has 8"):
        width_mask(torch.zeros(2, 4), WIDTHS, 8, torch.arange(7))


@settings(deadline=None, max_examples=30)
@given(logit_rows)
def test_expected_width_is_the_mean_under_the_softmax(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    for row, value in zip(rows, expected_width(logits, WIDTHS).tolist(), strict=True):
        weights = [math.exp(logit) for logit in row]
        mean = sum(weight * share for weight, share in zip(weights, WIDTHS, strict=True)) / sum(weights)
        assert value == pytest.approx(mean, rel=1e-12)
    assert expected_width(logits.bfloat16(), WIDTHS).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda values: expected_width(values, WIDTHS), (logits.requires_grad_(),))


def test_gate_loss_is_the_square_of_the_mean_deviation() -> None:
    p = torch.sigmoid(randn(5, 3)).requires_grad_()
    loss = gate_loss(p, 0.6)
    mean = sum(p.flatten().tolist()) / 15
    assert loss.item() == pytest.approx((mean - 0.6) ** 2, rel=1e-12)
    loss.backward()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.full((5, 3), 2 * (mean - 0.6) / 15, dtype=torch.float64))
    with pytest.raises(TrainingError, match="gate loss"):
        gate_loss(torch.zeros(0, 2), 0.6)


def test_gate_loss_of_bf16_probabilities_averages_in_fp32() -> None:
    p = torch.full((30, 11), 0.6015625, dtype=torch.bfloat16, requires_grad=True)
    loss = gate_loss(p, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.1015625**2, rel=1e-5)


def test_gate_loss_averages_the_deviation_over_batches() -> None:
    average, deviation = BudgetLoss(beta=0.2), 0.0
    for step, p_value in enumerate([0.7, 0.3, 0.8]):
        p = torch.full((4, 2), p_value, dtype=torch.float64, requires_grad=True)
        newest = p_value - 0.5
        deviation = newest if step == 0 else 0.2 * newest + 0.8 * deviation
        gate_loss(p, 0.5, average).backward()
        assert p.grad is not None
        torch.testing.assert_close(p.grad, torch.full_like(p, 2 * deviation / 8), atol=1e-7, rtol=1e-5)


def test_width_loss_reads_running_blocks_only() -> None:
    ratio = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ran = torch.tensor([[True, False, True], [False, False, True], [True, True, False], [False, True, True]])
    loss = width_loss(ratio, ran, 0.5)
    running = ratio[ran].detach()
    assert loss.item() == pytest.approx((running.mean().item() - 0.5) ** 2, rel=1e-12)
    loss.backward()
    expected = torch.where(ran, 2 * (running.mean() - 0.5) / 7, 0.0)
    torch.testing.assert_close(ratio.grad, expected)
    broken = torch.where(ran, ratio.detach(), math.nan)  # what did not run may hold anything
    torch.testing.assert_close(width_loss(broken, ran, 0.5), loss)


@pytest.mark.parametrize("averaged", [False, True])
def test_width_loss_without_a_running_block_is_zero_and_pulls_nowhere(averaged: bool) -> None:
    average = BudgetLoss() if averaged else None
    if average is not None:
        width_loss(torch.full((4, 3), 0.9), torch.ones(4, 3, dtype=torch.bool), 0.5, average)
    ratio = torch.full((4, 3), 0.9, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, even where a later zero hides it
        loss = width_loss(ratio, torch.zeros(4, 3, dtype=torch.bool), 0.5, average)
        loss.backward()
    assert loss.item() == 0.0
    assert ratio.grad is not None and torch.equal(ratio.grad, torch.zeros(4, 3))
    if average is not None:
        assert average.deviation.item() == pytest.approx(0.8 * 0.4)  # counted as on its target, not as at zero


def test_width_loss_averages_the_deviation_over_batches() -> None:
    average, ran = BudgetLoss(beta=0.2), torch.tensor([[True, False], [True, True]])
    width_loss(torch.full((2, 2), 0.9), ran, 0.5, average)
    ratio = torch.full((2, 2), 0.6, requires_grad=True)
    width_loss(ratio, ran, 0.5, average).backward()
    expected = torch.where(ran, 2 * (0.8 * 0.4 + 0.2 * 0.1) / 3, 0.0)
    torch.testing.assert_close(ratio.grad, expected)


def test_losses_drive_a_router_to_its_targets() -> None:
    # 30 samples of 4 blocks, gates and widths from logits of their own: both targets met, samples still differ.
    gate_logit = (2.0 * randn(4, 30)).requires_grad_()
    width_logit = randn(4, 30, 4, seed=1).requires_grad_()
    optimizer = torch.optim.SGD([gate_logit, width_logit], lr=100.0)
    for _ in range(200):
        optimizer.zero_grad()
        p = gate_probability(gate_logit)
        ratio = expected_width(width_logit.flatten(0, 1), WIDTHS).view(4, 30)
        (gate_loss(p, 0.6) + width_loss(ratio, p >= 0.5, 0.5)).backward()
        optimizer.step()
    assert p.mean().item() == pytest.approx(0.6, abs=0.005)
    assert ratio[p >= 0.5].mean().item() == pytest.approx(0.5, abs=0.01)
    assert p.std() > 0.1
