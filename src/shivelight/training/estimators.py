"""Gradients through a hard top-k: soft ranks, inclusion, and the two straight-through estimators.

In the forward pass a token is in or out, exactly; in the backward pass the loss reaches the scores and k through

    scores -> soft rank r -> inclusion pi -> one of the two estimators -> the block's tokens

- `apply_input_estimator`, the paper's: kept inputs are scaled by 1 + (pi - sg(pi)), rejected ones by
  1 - (pi - sg(pi)), so that dL/dpi_i is +<g_i, x_i> or -<g_i, x_i>, g the loss gradient at the block's input.
- `apply_residual_estimator`: x' = x + (m + (pi - sg(pi))) r, so that dL/dpi_i = <dL/dx'_i, r_i>, the first-order gain
  of including the token. r is the student's residual where the token was kept, the teacher's where it was not.
- `second_order_term` beside it: what the first order misses of a whole step from out to in, by one curvature per block.

A pre-norm block hardly feels the scale of its input, so little of the input estimator is the block's gain:
benchmarks/results/synthetic.json has the cosines of both to the true gain.

Shapes: B samples, N tokens, D width. Equations: Shiva-DiT (arXiv 2602.05605), "Backward".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shivelight.errors import TrainingError

# Scalars of the N x N comparison held at once; beyond that it is walked over in blocks of rows.
_COMPARISONS_AT_ONCE = 1 << 24


def soft_rank(scores: Tensor, temperature: float) -> Tensor:
    """Differentiable rank of each token, 1 for the highest score.

        r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau_rank)

    Memory: at most N^2 scalars per sample, and never more than a fixed block of rows of them; only the scores are
    kept for the backward pass, which compares again.

    Args:
        scores: [B, N]; bf16 and fp16 are compared in fp32, float64 stays.
        temperature: tau_rank, above 0.

    Returns:
        [B, N], fp32 or float64: bf16 could not tell rank 257 from 258.
    """
    if temperature <= 0.0:
        raise TrainingError(
            f"The soft rank's temperature is {temperature}; it must be above 0 (the paper starts at 0.2)."
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return _SoftRank.apply(scores, float(temperature))


class _SoftRank(torch.autograd.Function):
    """The comparisons are odd around zero and their slopes even: one symmetric matrix gives the whole backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.temperature = temperature
        ranks = torch.empty_like(scores)
        for rows in _row_blocks(scores):
            wins = torch.sigmoid((scores[:, None, :] - scores[:, rows, None]) / temperature)
            ranks[:, rows] = wins.sum(-1) + 0.5  # the sum counts i against itself, sigmoid(0) = 1/2
        return ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rank_gradient: Tensor) -> tuple[Tensor, None]:
        # dr_i/ds_m = slope_im, dr_i/ds_i = -sum_{j != i} slope_ij; slope is symmetric, so
        # dL/ds_m = sum_i slope_im (g_i - g_m), and i = m cancels by itself.
        (scores,) = ctx.saved_tensors
        score_gradient = torch.empty_like(scores)
        for rows in _row_blocks(scores):
            # sigma'(z) = e^-|z| / (1 + e^-|z|)^2, which unlike sigma (1 - sigma) does not round to 0 where sigma is 1.
            decay = ((scores[:, None, :] - scores[:, rows, None]) / ctx.temperature).abs_().neg_().exp_()
            slopes = decay / (1.0 + decay).square_()
            pulled = torch.einsum("brn,bn->br", slopes, rank_gradient)
            score_gradient[:, rows] = (pulled - slopes.sum(-1) * rank_gradient[:, rows]) / ctx.temperature
        return score_gradient, None


def _row_blocks(scores: Tensor) -> list[slice]:
    batch, tokens = scores.shape
    rows = max(1, min(tokens, _COMPARISONS_AT_ONCE // max(1, batch * tokens)))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def inclusion(ranks: Tensor, k: Tensor | float, temperature: float, tokens: int) -> Tensor:
    """Probability-like inclusion of each token, pi_i = sigmoid((k - r_i) / (tau_sel * N)).

    Args:
        ranks: [B, N], from `soft_rank`.
        k: tokens to keep, N * ratio kept continuous (a floor has no gradient): scalar, or [B] for one per sample.
        temperature: tau_sel, above 0.
        tokens: N.

    Returns:
        [B, N] in the dtype of `ranks`.
    """
    if temperature <= 0.0:
        raise TrainingError(
            f"The inclusion's temperature is {temperature}; it must be above 0 (the paper starts at 0.1)."
        )
    if isinstance(k, Tensor):
        k = k.to(ranks.dtype)
        k = k[:, None] if k.dim() == 1 else k
    return torch.sigmoid((k - ranks) / (temperature * tokens))


def perturb(scores: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """Scores with exploration noise, s~ = s + eps, eps ~ N(0, sigma^2); sigma 0 returns the scores themselves.

    The paper leaves open which scores the hard top-k ranks while training. Rank s~ there too: then mask and soft rank
    agree on who is in, and the noise explores decisions instead of only blurring gradients.
    """
    if sigma == 0.0:
        return scores
    device = scores.device if generator is None else generator.device
    noise = torch.randn(scores.shape, generator=generator, device=device, dtype=scores.dtype)
    return scores + sigma * noise.to(scores.device)


def apply_input_estimator(x: Tensor, pi: Tensor, kept: Tensor) -> Tensor:
    """The paper's estimator, at the block's input: returns x itself, bit for bit, with a gradient to `pi`.

    Means x * (1 + st) where kept and x * (1 - st) where rejected, st = pi - sg(pi), without computing the product. Apply
    it to all tokens, before kept ones are gathered; rejected ones must go on to the block's output. The result is a view
    of x: do not write into it.

    Args:
        x: [B, N, D], the block's input.
        pi: [B, N], from `inclusion`.
        kept: [B, N] bool, the hard selection.
    """
    return _InputEstimator.apply(x, pi, kept)


class _InputEstimator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pi: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, kept)
        ctx.pi_dtype = pi.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, kept = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        alignment = _inner(gradient, x, ctx.pi_dtype)
        return gradient, torch.where(kept, alignment, -alignment), None


def apply_residual_estimator(x: Tensor, out: Tensor, pi: Tensor, kept: Tensor, rejected_residual: Tensor) -> Tensor:
    """The residual estimator, at the block's output: returns `out` itself, bit for bit, with a gradient to `pi`.

    Means out + st * r with st = pi - sg(pi), r = out - x where kept and `rejected_residual` elsewhere. No
    gradient flows through r (its factor is zero). The result is a view of `out`: do not write into it.

    Args:
        x: [B, N, D], the block's input.
        out: [B, N, D], the block's output: rejected rows hold whatever they carry on (x, or x and a reused residual).
        pi: [B, N], from `inclusion`.
        kept: [B, N] bool, the hard selection.
        rejected_residual: [B, N, D], what the block would add to a rejected token: the teacher's residual; minus the
            reused one, if the rejected row holds one. Rows of kept tokens are not read.
    """
    return _ResidualEstimator.apply(x, out, pi, kept, rejected_residual)


class _ResidualEstimator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, pi: Tensor, kept: Tensor, rejected_residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, out, kept, rejected_residual)
        ctx.pi_dtype = pi.dtype
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        x, out, kept, rejected_residual = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, gradient, None, None, None
        residual = torch.where(kept[..., None], out - x, rejected_residual.to(out.dtype))
        return None, gradient, _inner(gradient, residual, ctx.pi_dtype), None, None


def second_order_term(pi: Tensor, kept: Tensor, squares: Tensor, curvature: Tensor | float) -> Tensor:
    """The second order of the gain, as a loss term: exactly 0, with a gradient of -h/2 |r_i|^2 to kept tokens' pi and of
    +h/2 |r_i|^2 to rejected ones'.

    The loss along a token's inclusion p, x' = x + p r, is L(p) ~= L(m) + (p - m) <g, r> + (p - m)^2 h/2 |r|^2 around the state
    m that was run, so that the gain L(1) - L(0) is <g, r> + h/2 |r|^2 from m = 0, and <g, r> - h/2 |r|^2 from m = 1.

    A term of the loss, so that whatever scales the loss before its backward pass scales both orders alike.

    Args:
        pi: [B, N], from `inclusion`.
        kept: [B, N] bool, the hard selection.
        squares: [B, N], |r_i|^2.
        curvature: h, a scalar, of the loss that this is added to: see `curvature_moments`.
    """
    half = 0.5 * curvature * squares.detach()
    return ((pi - pi.detach()) * torch.where(kept, -half, half).to(pi.dtype)).sum()


def curvature_moments(changes: Tensor, predicted: Tensor, squares: Tensor) -> Tensor:
    """Least squares of h from flips, change ~= predicted + h/2 |r|^2: (sum of a b, sum of b b), whose ratio is h.

    Args:
        changes: [M], changes of the loss from what was run to one or several flips (put in what was out, take out what was in).
        predicted: [M], their first order: the sum of <g_i, r_i> over tokens put in, less that over tokens taken out.
        squares: [M], the sum of |r_i|^2 over all that flipped.

    Returns:
        [2], fp32 or float64.
    """
    b = 0.5 * squares
    return torch.stack([((changes - predicted) * b).sum(), b.square().sum()])


def _inner(gradient: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """<gradient_i, vectors_i> per token, [B, N, D] -> [B, N], summed in fp32 at least."""
    wide = torch.promote_types(torch.promote_types(gradient.dtype, vectors.dtype), torch.float32)
    return (gradient.to(wide) * vectors.to(wide)).sum(-1).to(dtype)


def anneal(start: float, end: float, progress: float) -> float:
    """Geometric path from `start` to `end` as `progress` goes from 0 to 1 (clamped): for the temperatures.

    Start after the routers' warm-up: hardened from the first step, a router that starts out wrong may stay so, since
    the slopes between far ranks vanish (1 seed in 5 of benchmarks/synthetic.py's check k).

    >>> round(anneal(0.2, 0.002, 0.5), 6)
    0.02
    """
    if start <= 0.0 or end <= 0.0:
        raise TrainingError(f"Annealing from {start} to {end}: a geometric path needs both ends above 0.")
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
