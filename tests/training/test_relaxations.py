"""Peers of the soft rank against their definitions, finite differences, and draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shivelight.errors import TrainingError
from shivelight.routing.select import token_mask, top_k_indices
from shivelight.training.relaxations import gumbel_inclusion, gumbel_noise, identity_inclusion, threshold_inclusion


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(function: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """d pi_i / d s_m of one sample by central differences, [N, N]."""
    step, columns = 1e-6, []
    for m in range(scores.shape[1]):
        moved = torch.zeros_like(scores)
        moved[0, m] = step
        columns.append((function(scores + moved) - function(scores - moved))[0] / (2 * step))
    return torch.stack(columns, dim=1)


def test_identity_passes_the_masks_gradient_on() -> None:
    scores, upstream = randn(2, 5).requires_grad_(), randn(2, 5, seed=1)
    k = torch.tensor([2.0, 3.5], dtype=torch.float64, requires_grad=True)
    (identity_inclusion(scores, k) * upstream).sum().backward()
    torch.testing.assert_close(scores.grad, upstream)
    torch.testing.assert_close(k.grad, upstream.mean(1))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_threshold_inclusion_is_its_definition_and_so_is_its_gradient(count: int) -> None:
    scores = randn(1, 7)
    ordered = sorted(scores[0].tolist(), reverse=True)
    theta = (ordered[count - 1] + ordered[count]) / 2
    k = torch.tensor([float(count)], dtype=torch.float64)
    pi = threshold_inclusion(scores, k, (count,), 0.3)
    torch.testing.assert_close(pi, 1 / (1 + torch.exp(-(scores - theta) / 0.3)))
    assert torch.equal(pi > 0.5, token_mask(top_k_indices(scores, count), 7))
    found = torch.autograd.functional.jacobian(lambda s: threshold_inclusion(s, k, (count,), 0.3), scores)[0, :, 0]
    torch.testing.assert_close(found, jacobian(lambda s: threshold_inclusion(s, k, (count,), 0.3), scores))
    # What all scores share decides nothing; only the two around the threshold move other tokens.
    assert found.sum(1).abs().max() < 1e-12
    moving = {m for m in range(7) if any(found[i, m] != 0 for i in range(7) if i != m)}
    assert moving == {scores[0].tolist().index(ordered[place]) for place in (count - 1, count)}


def test_threshold_of_all_tokens_is_the_last_score() -> None:
    scores = randn(2, 4)
    pi = threshold_inclusion(scores, torch.tensor([4.0, 4.0]).double(), (4, 4), 0.3)
    torch.testing.assert_close(pi, torch.sigmoid((scores - scores.min(1, keepdim=True).values) / 0.3))


def test_samples_with_other_counts_have_other_thresholds() -> None:
    scores, k = randn(2, 6), torch.tensor([2.0, 4.0], dtype=torch.float64)
    both = threshold_inclusion(scores, k, (2, 4), 0.2)
    for sample, count in enumerate((2, 4)):
        alone = threshold_inclusion(scores[sample : sample + 1], k[sample : sample + 1], (count,), 0.2)
        torch.testing.assert_close(both[sample : sample + 1], alone)


def test_gumbel_inclusion_is_the_chance_to_pass_the_threshold() -> None:
    scores, temperature, count = randn(1, 5), 0.4, 2
    noisy = scores + gumbel_noise(scores, temperature, torch.Generator().manual_seed(3))
    threshold = noisy.sort(descending=True).values[0, count]
    pi = gumbel_inclusion(scores, noisy, torch.tensor([2.0]).double(), (count,), temperature)
    draws = gumbel_noise(scores.expand(200_000, -1), temperature, torch.Generator().manual_seed(4))
    passed = (scores + draws > threshold).double().mean(0)
    torch.testing.assert_close(pi[0], passed, atol=4e-3, rtol=0.0)


def test_gumbel_gradient_is_that_of_a_fixed_threshold() -> None:
    scores = randn(1, 6)
    noisy = scores + gumbel_noise(scores, 0.4, torch.Generator().manual_seed(3))
    k = torch.tensor([3.0], dtype=torch.float64)

    def function(s: Tensor) -> Tensor:
        return gumbel_inclusion(s, noisy, k, (3,), 0.4)

    found = torch.autograd.functional.jacobian(function, scores)[0, :, 0]
    torch.testing.assert_close(found, jacobian(function, scores))
    assert torch.equal(found, found.diag().diag())
    # Far beyond the threshold the exponential overflows in fp32; the gradient is 0, not NaN.
    far = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    gumbel_inclusion(far, far.detach(), torch.tensor([1.0]), (1,), 0.1).sum().backward()
    assert far.grad is not None and bool(torch.isfinite(far.grad).all())


def test_gumbel_of_all_tokens_decides_nothing() -> None:
    scores, k = randn(1, 4).requires_grad_(), torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    pi = gumbel_inclusion(scores, scores.detach(), k, (4,), 0.3)
    pi.sum().backward()
    assert pi.tolist() == [[1.0] * 4] and k.grad is not None
    assert not scores.grad.any() and not k.grad.any()


@pytest.mark.parametrize("name", ["dftopk", "gumbel"])
def test_one_more_token_is_one_more_unit_of_inclusion(name: str) -> None:
    scores, k = randn(2, 6), torch.tensor([3.0, 4.0], dtype=torch.float64)

    def function(k: Tensor) -> Tensor:
        if name == "dftopk":
            return threshold_inclusion(scores, k, (3, 4), 0.3)
        return gumbel_inclusion(scores, scores + 0.1 * randn(2, 6, seed=1), k, (3, 4), 0.3)

    found = torch.autograd.functional.jacobian(function, k)  # [B, N, B]
    for sample in range(2):
        assert found[sample, :, sample].sum().item() == pytest.approx(1.0)
        assert bool((found[sample, :, sample] >= 0).all()) and not found[sample, :, 1 - sample].any()
    torch.testing.assert_close(function(k), function(k + 0.7))  # the value is that of the hard number


def test_gumbel_noise_has_the_mean_and_spread_of_gumbel() -> None:
    noise = gumbel_noise(torch.zeros(10, 20_000), 0.5, torch.Generator().manual_seed(0))
    assert noise.mean().item() == pytest.approx(0.5 * 0.57722, abs=5e-3)
    assert noise.std().item() == pytest.approx(0.5 * torch.pi / 6**0.5, abs=5e-3)
    assert torch.equal(noise, gumbel_noise(noise, 0.5, torch.Generator().manual_seed(0)))


def test_scores_of_bf16_are_computed_with_in_fp32_and_temperatures_are_checked() -> None:
    scores, k = randn(1, 6).bfloat16(), torch.tensor([2.0])
    assert identity_inclusion(scores, k).dtype == torch.float32
    assert threshold_inclusion(scores, k, (2,), 0.1).dtype == torch.float32
    assert gumbel_inclusion(scores, scores, k, (2,), 0.1).dtype == torch.float32
    with pytest.raises(TrainingError, match="temperature is 0"):
        threshold_inclusion(scores, k, (2,), 0.0)
    with pytest.raises(TrainingError, match="temperature is -1"):
        gumbel_inclusion(scores, scores, k, (2,), -1.0)
