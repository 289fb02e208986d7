import doctest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shivelight.errors import TrainingError
from shivelight.routing.select import token_mask, top_k_indices
from shivelight.training import estimators
from shivelight.training.estimators import (
    anneal,
    apply_input_estimator,
    apply_residual_estimator,
    curvature_moments,
    inclusion,
    perturb,
    second_order_term,
    soft_rank,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rank_by_definition(row: list[float], temperature: float) -> list[float]:
    scores = torch.tensor(row, dtype=torch.float64)
    return [
        1.0 + sum(torch.sigmoid((scores[j] - scores[i]) / temperature).item() for j in range(len(row)) if j != i)
        for i in range(len(row))
    ]


def slope(difference: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(difference) * torch.sigmoid(-difference)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.sampled_from([0.01, 0.2, 2.0]))
def test_soft_rank_equals_its_definition(row: list[float], temperature: float) -> None:
    ranks = soft_rank(torch.tensor([row], dtype=torch.float64), temperature)
    torch.testing.assert_close(ranks[0].tolist(), rank_by_definition(row, temperature), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_soft_rank_jacobian_is_the_closed_form(tokens: int, temperature: float) -> None:
    scores = randn(1, tokens)
    jacobian = torch.autograd.functional.jacobian(lambda s: soft_rank(s, temperature), scores)[0, :, 0]
    for i in range(tokens):
        others = [j for j in range(tokens) if j != i]
        for m in others:
            expected = slope((scores[0, m] - scores[0, i]) / temperature) / temperature
            torch.testing.assert_close(jacobian[i, m], expected)
            assert jacobian[i, m] > 0
        own = -sum((slope((scores[0, j] - scores[0, i]) / temperature) for j in others), torch.zeros(())) / temperature
        torch.testing.assert_close(jacobian[i, i], own.double())
        assert jacobian[i, i] < 0 or tokens == 1


def test_soft_rank_passes_gradcheck_in_a_batch() -> None:
    assert torch.autograd.gradcheck(lambda s: soft_rank(s, 0.3), (randn(3, 5).requires_grad_(),))


def test_soft_rank_of_ties_is_the_mean_rank_and_hardens_to_the_rank() -> None:
    assert soft_rank(torch.zeros(2, 9), 0.2).tolist() == [[5.0] * 9] * 2
    scores = torch.tensor([[0.3, 2.0, -1.0, 0.9]])
    torch.testing.assert_close(soft_rank(scores, 0.001), torch.tensor([[3.0, 1.0, 4.0, 2.0]]))


def test_soft_rank_in_row_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = randn(2, 13, seed=1)

    def rank_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        scores = randn(2, 13).requires_grad_()
        ranks = soft_rank(scores, 0.2)
        (ranks * weights).sum().backward()
        assert scores.grad is not None
        return ranks.detach(), scores.grad

    whole = rank_and_gradient()
    monkeypatch.setattr(estimators, "_COMPARISONS_AT_ONCE", 2 * 13 * 3)
    torch.testing.assert_close(rank_and_gradient(), whole)


def test_soft_rank_of_bf16_is_computed_in_fp32() -> None:
    scores = randn(1, 600).bfloat16().requires_grad_()
    ranks = soft_rank(scores, 0.2)
    assert ranks.dtype == torch.float32
    torch.testing.assert_close(ranks, soft_rank(scores.double(), 0.2).float(), atol=1e-3, rtol=1e-5)
    (ranks * randn(1, 600, dtype=torch.float32)).sum().backward()
    assert scores.grad is not None and scores.grad.dtype == torch.bfloat16 and bool(torch.isfinite(scores.grad).all())


def test_inclusion_equals_its_definition_for_one_k_or_many() -> None:
    ranks = soft_rank(randn(3, 11), 0.2)
    k = torch.tensor([1.0, 4.3, 11.0], dtype=torch.float64)
    pi = inclusion(ranks, k, 0.1, 11)
    for sample in range(3):
        torch.testing.assert_close(pi[sample], 1 / (1 + torch.exp(-(k[sample] - ranks[sample]) / 1.1)))
        torch.testing.assert_close(pi[sample], inclusion(ranks, k[sample], 0.1, 11)[sample])
        torch.testing.assert_close(pi[sample], inclusion(ranks, k[sample].item(), 0.1, 11)[sample])
    hard = inclusion(soft_rank(randn(3, 11), 1e-5), 4.5, 1e-5, 11) > 0.5
    assert torch.equal(hard, token_mask(top_k_indices(randn(3, 11), 4), 11))


def test_gradient_of_k_is_the_closed_form() -> None:
    scores, upstream = randn(2, 9), randn(2, 9, seed=1)
    k = torch.tensor([3.4, 6.0], dtype=torch.float64, requires_grad=True)
    pi = inclusion(soft_rank(scores, 0.2), k, 0.1, 9)
    (pi * upstream).sum().backward()
    torch.testing.assert_close(k.grad, (upstream * pi * (1 - pi) / (0.1 * 9)).sum(1).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["input", "residual"])
def test_the_forward_value_is_exact(estimator: str, dtype: torch.dtype) -> None:
    x, out, other = (randn(2, 8, 5, seed=seed).to(dtype) for seed in range(3))
    pi, kept = torch.sigmoid(randn(2, 8)).to(dtype).requires_grad_(), randn(2, 8, seed=4) > 0
    if estimator == "input":
        assert torch.equal(apply_input_estimator(x, pi, kept), x)
    else:
        assert torch.equal(apply_residual_estimator(x, out, pi, kept, other), out)


def test_input_estimator_equals_its_written_out_form() -> None:
    x, pi, kept = randn(2, 8, 5), torch.sigmoid(randn(2, 8, seed=1)), randn(2, 8, seed=2) > 0
    upstream = randn(2, 8, 5, seed=3)

    def gradients(written_out: bool) -> tuple[torch.Tensor, ...]:
        leaf_x, leaf_pi = x.clone().requires_grad_(), pi.clone().requires_grad_()
        if written_out:
            through = leaf_pi - leaf_pi.detach()
            scaled = leaf_x * torch.where(kept, 1 + through, 1 - through)[..., None]
        else:
            scaled = apply_input_estimator(leaf_x, leaf_pi, kept)
        return torch.autograd.grad((scaled * upstream).sum(), (leaf_x, leaf_pi))

    torch.testing.assert_close(gradients(written_out=False), gradients(written_out=True))
    alignment = (upstream * x).sum(-1)
    torch.testing.assert_close(gradients(written_out=False)[1], torch.where(kept, alignment, -alignment))


def test_residual_estimator_equals_its_written_out_form() -> None:
    x, block_weight, teacher = randn(2, 8, 5), randn(5, 5, seed=1), randn(2, 8, 5, seed=2)
    pi, kept = torch.sigmoid(randn(2, 8, seed=3)), randn(2, 8, seed=4) > 0
    upstream = randn(2, 8, 5, seed=5)

    def gradients(written_out: bool) -> tuple[torch.Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in (x, block_weight, pi)]
        leaf_x, leaf_weight, leaf_pi = leaves
        out = torch.where(kept[..., None], leaf_x + torch.tanh(leaf_x @ leaf_weight), leaf_x)
        if written_out:
            residual = torch.where(kept[..., None], out - leaf_x, teacher)
            routed = out + (leaf_pi - leaf_pi.detach())[..., None] * residual
        else:
            routed = apply_residual_estimator(leaf_x, out, leaf_pi, kept, teacher)
        return torch.autograd.grad((routed * upstream).sum(), leaves)

    torch.testing.assert_close(gradients(written_out=False), gradients(written_out=True))
    residual = torch.where(kept[..., None], torch.tanh(x @ block_weight), teacher)
    torch.testing.assert_close(gradients(written_out=False)[2], (upstream * residual).sum(-1))


def test_residual_estimator_is_the_exact_derivative_of_the_inclusion_weight() -> None:
    # x' = x + p r: its loss gradient in p at p = m is what the estimator claims.
    x, residual, target = randn(1, 6, 4), randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2)
    kept = torch.tensor([[True, False, True, True, False, False]])
    weight = kept.double().requires_grad_()
    (x + weight[..., None] * residual - target).pow(2).sum().backward()
    pi = torch.full((1, 6), 0.5, dtype=torch.float64, requires_grad=True)
    out = torch.where(kept[..., None], x + residual, x)
    (apply_residual_estimator(x, out, pi, kept, residual) - target).pow(2).sum().backward()
    torch.testing.assert_close(pi.grad, weight.grad)


def test_second_order_is_the_gain_of_a_flip_where_the_loss_is_quadratic() -> None:
    # L = 3/2 sum |x' - t|^2: its curvature along any residual is 3, so both orders together are the whole gain.
    x, residual, target = randn(1, 6, 4), randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2)
    kept = torch.tensor([[True, False, True, True, False, False]])

    def loss_of(mask: torch.Tensor) -> torch.Tensor:
        return 1.5 * (x + mask[..., None] * residual - target).square().sum()

    gains = torch.stack([
        loss_of(kept | (torch.arange(6) == i)) - loss_of(kept & (torch.arange(6) != i)) for i in range(6)
    ])  # fmt: skip
    pi = torch.full((1, 6), 0.5, dtype=torch.float64, requires_grad=True)
    routed = apply_residual_estimator(x, torch.where(kept[..., None], x + residual, x), pi, kept, residual)
    loss = 1.5 * (routed - target).square().sum()
    (first,) = torch.autograd.grad(loss, pi, retain_graph=True)
    squares = residual.square().sum(-1)
    term = second_order_term(pi, kept, squares, 3.0)
    assert term.item() == 0.0
    # As a term of the loss it is scaled with it.
    (both,) = torch.autograd.grad(7.0 * (loss + term), pi)
    torch.testing.assert_close(both[0] / 7.0, gains)
    signs = torch.where(kept, -1.0, 1.0)[0]
    moments = curvature_moments(signs * gains, signs * first[0], squares[0])
    assert (moments[0] / moments[1]).item() == pytest.approx(3.0)


def test_the_fitted_curvature_is_the_least_squares_one() -> None:
    changes, predicted, squares = randn(9), randn(9, seed=1), randn(9, seed=2).square()
    moments = curvature_moments(changes, predicted, squares)
    h = (moments[0] / moments[1]).item()

    def error(h: float) -> float:
        return (changes - predicted - 0.5 * h * squares).square().sum().item()

    assert error(h) < min(error(h - 1e-3), error(h + 1e-3))


@pytest.mark.parametrize("estimator", ["input", "residual"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (8, 1), (8, 5), (8, 8)])
def test_gradients_reach_scores_and_k(estimator: str, tokens: int, k: int) -> None:
    scores, ratio = randn(2, tokens).requires_grad_(), torch.tensor(k / tokens, dtype=torch.float64, requires_grad=True)
    x, other = randn(2, tokens, 4, seed=1), randn(2, tokens, 4, seed=2)
    kept = token_mask(top_k_indices(scores, k), tokens)
    pi = inclusion(soft_rank(scores, 0.2), ratio * tokens, 0.1, tokens)
    if estimator == "input":
        routed = torch.where(kept[..., None], torch.tanh(apply_input_estimator(x, pi, kept)), x)
    else:
        out = torch.where(kept[..., None], x + torch.tanh(x), x)
        routed = apply_residual_estimator(x, out, pi, kept, other)
    routed.square().sum().backward()
    assert ratio.grad is not None and scores.grad is not None
    assert ratio.grad != 0
    assert bool((scores.grad != 0).any()) == (tokens > 1)  # one token has one rank
    # Ranks depend on differences only.
    assert scores.grad.sum(1).abs().max() < 1e-12


def test_bf16_tokens_get_fp32_inner_products() -> None:
    x = torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16)
    pi = torch.zeros(1, 1, requires_grad=True)
    kept = torch.ones(1, 1, dtype=torch.bool)
    upstream = torch.full_like(x, 1.0)
    upstream[..., 0] = 4.0
    (apply_input_estimator(x, pi, kept) * upstream).sum().backward()
    assert pi.grad is not None and pi.grad.item() == 4099.0  # bf16 has no 4099


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("estimator", ["input", "residual"])
def test_memory_grows_as_n_squared_scalars_and_not_with_width(estimator: str) -> None:
    def measure(tokens: int, width: int) -> tuple[int, int]:
        """The largest tensor made, and the elements kept for the backward pass beyond the block's own tensors."""
        scores = randn(1, tokens).requires_grad_()
        x, out, other = (randn(1, tokens, width, seed=seed).requires_grad_() for seed in range(3))
        kept = token_mask(top_k_indices(scores, tokens // 2), tokens)
        free = {x.data_ptr(), out.data_ptr(), other.data_ptr()}
        saved = 0

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += 0 if tensor.data_ptr() in free else tensor.numel()
            return tensor

        with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            pi = inclusion(soft_rank(scores, 0.2), tokens / 2, 0.1, tokens)
            if estimator == "input":
                routed = apply_input_estimator(x, pi, kept)
            else:
                routed = apply_residual_estimator(x, out, pi, kept, other)
            routed.sum().backward()
        return largest.numel, saved

    narrow, wide = measure(64, 4), measure(64, 32)
    assert wide == narrow
    assert narrow[0] == 64 * 64
    assert measure(128, 4)[0] == 128 * 128
    assert wide[1] < 10 * 64


def test_memory_of_the_soft_rank_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_COMPARISONS_AT_ONCE", 1000)
    scores = randn(1, 100).requires_grad_()
    with LargestTensor() as largest:
        soft_rank(scores, 0.2).sum().backward()
    assert largest.numel <= 1000


def test_perturb_is_gaussian_repeatable_and_off_at_zero() -> None:
    scores = randn(4, 2000)
    assert perturb(scores, 0.0) is scores
    noise = perturb(scores, 0.3, torch.Generator().manual_seed(7)) - scores
    assert torch.equal(noise, perturb(scores, 0.3, torch.Generator().manual_seed(7)) - scores)
    assert noise.std().item() == pytest.approx(0.3, rel=0.05)


def test_anneal_is_geometric_and_clamped() -> None:
    assert anneal(0.2, 0.002, 0.5) == pytest.approx(0.02)
    assert [anneal(0.2, 0.01, progress) for progress in (-1.0, 0.0, 1.0, 7.0)] == pytest.approx([0.2, 0.2, 0.01, 0.01])


def test_temperatures_that_are_not_positive_are_refused() -> None:
    with pytest.raises(TrainingError, match="soft rank's temperature is 0"):
        soft_rank(torch.zeros(1, 2), 0.0)
    with pytest.raises(TrainingError, match="inclusion's temperature is -1"):
        inclusion(torch.zeros(1, 2), 1.0, -1.0, 2)
    with pytest.raises(TrainingError, match="Annealing from 0.2 to 0"):
        anneal(0.2, 0.0, 0.5)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(estimators) == (0, 1)
