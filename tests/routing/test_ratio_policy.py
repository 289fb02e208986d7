import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight.errors import BudgetError
from shivelight.routing.ratio_policy import RatioPolicy, solve_anchor, timestep_sinusoids

TIMESTEPS = torch.linspace(0.0, 1000.0, 7)


def trained_policy() -> RatioPolicy:
    torch.manual_seed(0)
    policy = RatioPolicy(blocks=5, target=0.6, hidden=32)
    with torch.no_grad():
        policy.layer_out.normal_()
        policy.time_out.normal_()
    return policy


def test_a_fresh_policy_is_flat_at_its_target() -> None:
    ratios = torch.sigmoid(RatioPolicy(blocks=5, target=0.7)(TIMESTEPS))
    torch.testing.assert_close(ratios, torch.full((7, 5), 0.7))


def test_a_policy_is_additive_in_timestep_and_layer() -> None:
    logits = trained_policy()(TIMESTEPS)
    assert logits.std(0).min() > 0 and logits.std(1).min() > 0
    interaction = logits - logits.mean(0, keepdim=True) - logits.mean(1, keepdim=True) + logits.mean()
    assert interaction.abs().max() < 1e-5


def test_a_fresh_policy_learns_in_both_branches() -> None:
    policy = RatioPolicy(blocks=5)
    (policy(TIMESTEPS) * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))).sum().backward()
    for parameter in (policy.layer_out, policy.time_out, policy.bias):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_logits_stay_fp32_when_the_model_is_cast() -> None:
    policy = trained_policy()
    exact = policy(TIMESTEPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy(TIMESTEPS), exact)
    in_double = trained_policy().double()(TIMESTEPS.double())
    assert in_double.dtype == torch.float64
    torch.testing.assert_close(exact.double(), in_double, atol=1e-4, rtol=0.0)
    cast = policy.bfloat16()(TIMESTEPS)
    assert cast.dtype == torch.float32
    assert (cast - exact).abs().max() < 0.1  # the weights were rounded, the arithmetic was not


def test_sinusoids_tell_timesteps_apart() -> None:
    embedding = timestep_sinusoids(torch.arange(0.0, 1000.0, 10.0), 64)
    assert torch.equal(embedding[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    torch.testing.assert_close(embedding[3, [0, 32]], torch.tensor([math.cos(30.0), math.sin(30.0)]))
    assert torch.cdist(embedding, embedding).fill_diagonal_(9.0).min() > 0.1


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.floats(0.01, 0.999),
    st.integers(0, 2**16),
    st.booleans(),
)
def test_the_anchor_meets_its_target(values: list[float], target: float, seed: int, weighted: bool) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    weights = torch.rand(1, len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    anchor = solve_anchor(logits, target, weights if weighted else None)
    ratios = torch.sigmoid(logits + anchor)
    mean = (ratios * weights).sum() / weights.sum() if weighted else ratios.mean()
    assert mean.item() == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_anchors_gradient_is_the_implicit_one(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 3, generator=generator, dtype=torch.float64) if weighted else None
    assert torch.autograd.gradcheck(lambda free: solve_anchor(free, 0.6, weights), (logits,), atol=1e-6)


def test_training_through_the_anchor_leaves_the_mean_alone() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    torch.sigmoid(logits + solve_anchor(logits, 0.5)).mean().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_anchor_of_one_runs_everything_and_saturated_logits_give_no_nan() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(torch.sigmoid(logits + solve_anchor(logits, 1.0)), torch.ones(3, 2))
    saturated = torch.tensor([[-900.0, 900.0]], requires_grad=True)
    solve_anchor(saturated, 0.5).backward()
    assert saturated.grad is not None and bool(torch.isfinite(saturated.grad).all())


def test_bf16_logits_give_an_fp32_anchor() -> None:
    anchor = solve_anchor(torch.zeros(2, 2, dtype=torch.bfloat16), 0.7)
    assert anchor.dtype == torch.float32
    assert anchor.item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.5, math.nan])
def test_impossible_targets_are_refused(target: float) -> None:
    with pytest.raises(BudgetError, match=str(target)):
        solve_anchor(torch.zeros(1, 1), target)
    with pytest.raises(BudgetError, match=str(target)):
        RatioPolicy(3, target=target)
