"""Peers of the soft rank: other ways from scores to an inclusion pi that the residual estimator carries the gain to.

- `identity_inclusion`, plain straight-through (Bengio et al., arXiv 1308.3432): the hard mask's gradient is the score's.
- `threshold_inclusion`, DFTopK (arXiv 2510.11472): a sigmoid around the threshold between the k-th and the (k+1)-th score.
- `gumbel_inclusion`, Gumbel top-k (Kool et al., arXiv 1903.06059): the hard top-k ranks scores with Gumbel noise, and pi is
  the probability that a token's noisy score passes the threshold that was drawn.

The hard number of tokens is a whole one. Where pi depends on it through a threshold, the continuous k gets its gradient by
the rule dpi_i/dk = w_i / sum_j w_j, w_i the slope of pi_i in its own score: one more token kept is one more unit of pi.

Shapes: B samples, N tokens. Scores in bf16 and fp16 are computed with in fp32; float64 stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shivelight.errors import TrainingError


def identity_inclusion(scores: Tensor, k: Tensor | float) -> Tensor:
    """pi_i = s_i + k / N: no probability, only its gradient is used, dpi_i/ds_i = 1 and sum_i dpi_i/dk = 1.

    Args:
        scores: [B, N].
        k: tokens to keep, continuous: scalar, or [B] for one per sample.
    """
    return _wide(scores) + _column(k) / scores.shape[1]


def threshold_inclusion(scores: Tensor, k: Tensor, counts: Sequence[int], temperature: float) -> Tensor:
    """pi_i = sigmoid((s_i - theta) / tau), theta = (s_(k) + s_(k+1)) / 2 of the scores in descending order.

    The threshold is not detached: its gradient goes to the two scores that it lies between, half to each, which is what keeps
    the sum of the gradient over tokens at zero. The value of k in the forward pass is the hard one.

    Args:
        scores: [B, N], those that the hard top-k ranks.
        k: tokens to keep, continuous: scalar or [B]; only its gradient is used.
        counts: of each sample, how many tokens it keeps. Where that is all, theta is the last score.
        temperature: tau, above 0, in units of the scores.

    Returns:
        [B, N].
    """
    _check_temperature(temperature)
    scores = _wide(scores)
    ordered = scores.sort(dim=1, descending=True, stable=True).values
    last = _hard(counts, scores)
    threshold = (ordered.gather(1, last - 1) + ordered.gather(1, last.clamp(max=scores.shape[1] - 1))) / 2
    place = (scores - threshold) / temperature
    value = torch.sigmoid(place.detach())
    return torch.sigmoid(place + _one_more(k, value * (1.0 - value)))


def gumbel_inclusion(scores: Tensor, noisy: Tensor, k: Tensor, counts: Sequence[int], temperature: float) -> Tensor:
    """pi_i = 1 - exp(-exp(s_i / tau - kappa)) = P(s_i / tau + Gumbel > kappa), kappa the (k+1)-th highest noisy score / tau.

    kappa is detached: it belongs to the draw. Where all tokens are kept there is none, pi is 1 and its gradient 0.

    Args:
        scores: [B, N], without noise.
        noisy: [B, N], scores + tau * Gumbel(0, 1), those that the hard top-k ranks.
        k: tokens to keep, continuous: scalar or [B]; only its gradient is used.
        counts: of each sample, how many tokens it keeps.
        temperature: tau, above 0, in units of the scores.

    Returns:
        [B, N].
    """
    _check_temperature(temperature)
    scores, noisy = _wide(scores), _wide(noisy).detach()
    ordered = noisy.sort(dim=1, descending=True, stable=True).values
    last = _hard(counts, scores)
    threshold = ordered.gather(1, last.clamp(max=scores.shape[1] - 1))
    # Far above the threshold exp overflows, and inf * 0 is no gradient: there pi is 1 to the last digit already.
    place = ((scores - threshold) / temperature).clamp(max=20.0)
    value = place.detach()
    pi = -torch.expm1(-torch.exp(place + _one_more(k, torch.exp(value - value.exp()))))
    return torch.where(last == scores.shape[1], torch.ones_like(pi), pi)


def gumbel_noise(like: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """scale * Gumbel(0, 1), in the shape of scores [B, N]; drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    uniform = torch.rand(like.shape, generator=generator, device=device, dtype=torch.float64)
    uniform = uniform.clamp(min=torch.finfo(torch.float64).tiny)
    return (-scale * (-uniform.log()).log()).to(like.device, like.dtype)


def _one_more(k: Tensor | float, slopes: Tensor) -> Tensor:
    """Exactly 0, [B, 1]; its derivative in k moves the sum of pi, whose slopes are given [B, N], by one."""
    k = _column(k)
    if not isinstance(k, Tensor):
        return torch.zeros_like(slopes[:, :1])
    total = slopes.sum(1, keepdim=True)
    rate = torch.where(total > 0.0, 1.0 / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return (k - k.detach()).to(slopes.dtype) * rate


def _hard(counts: Sequence[int], scores: Tensor) -> Tensor:
    """[B, 1]."""
    return torch.tensor(counts, device=scores.device).expand(len(scores))[:, None]


def _column(k: Tensor | float) -> Tensor | float:
    return k[:, None] if isinstance(k, Tensor) and k.dim() == 1 else k


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _check_temperature(temperature: float) -> None:
    if temperature <= 0.0:
        raise TrainingError(f"The inclusion's temperature is {temperature}; it must be above 0.")
