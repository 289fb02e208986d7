"""Gradients through gates and widths of blocks, and the losses that hold them at their targets.

In the forward pass a block runs or not, and a hidden channel is in or out, exactly; in the backward pass the loss
reaches the routers' logits straight through. The decisions themselves are `routing`'s, the same at inference.

Shapes: B samples, L routed blocks, N tokens, D width, S widths, H hidden channels of the MLP. Equations: E-DiT (arXiv
2602.13993), "Block skip" and "MLP width".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shivelight.cost import kept_channels
from shivelight.errors import TrainingError
from shivelight.routing import Dial, gate_probability, width_choice
from shivelight.training.losses import BudgetLoss


def straight_through_gate(logits: Tensor, dial: Dial) -> Tensor:
    """The gate g = 1[p >= tau] + p - sg(p), p = sigmoid(logit + shift): exactly 0 or 1 in the forward pass, a gradient of
    one to p.

    Args:
        logits: [B], of running the block.
        dial: threshold tau, and shift; it decides as at inference.

    Returns:
        [B], fp32 (float64 stays).
    """
    p = gate_probability(logits + dial.shift)
    runs = ~dial.skips(logits.detach())
    # A NaN gate runs, as at inference; the loss on its probability is NaN too, which the trainer refuses.
    return runs.to(p.dtype) + torch.nan_to_num(p - p.detach())


def apply_gate(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """The gated block x' = x + g (Block(x) - x): `out` bit for bit where g = 1, `x` bit for bit where g = 0.

    Means out + (g - sg(g)) (out - x) where g = 1 and x + (g - sg(g)) (out - x) where g = 0: the other samples'
    gradients are those of the path that they took, and dL/dg = <dL/dx', out - x> on both. A skipped sample therefore
    needs an `out` too while training: run the full block, or pass x plus the teacher's residual.

    Args:
        x: [B, ...], the block's input: [B, N, D], of either stream.
        out: like `x`, the full block's output.
        gate: [B], from `straight_through_gate`.
    """
    return _Gate.apply(x, out, gate)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, out, gate)
        return torch.where(_per_sample(gate > 0.5, x), out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, out, gate = ctx.saved_tensors
        ran = _per_sample(gate > 0.5, x)
        to_x = torch.where(ran, 0.0, gradient).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_out = torch.where(ran, gradient, 0.0).to(out.dtype) if ctx.needs_input_grad[1] else None
        to_gate = None
        if ctx.needs_input_grad[2]:
            products = _wide(gradient) * (_wide(out) - _wide(x))
            to_gate = products.flatten(1).sum(1).to(gate.dtype)
        return to_x, to_out, to_gate


def width_mask(width_logits: Tensor, widths: Sequence[float], hidden: int, order: Tensor | None = None) -> Tensor:
    """Mask of the hidden channels at the likeliest width, straight-through to the soft mixture of all widths.

        forward: mask_argmax,   backward: sum_s q_s mask_s,   mask_s[order[j]] = 1[j < floor(s H)],   q = softmax

    Args:
        width_logits: [B, S]; ties go to the wider.
        widths: S shares, ascending, the last 1.0.
        hidden: H.
        order: [H] int64, the channels from the most to the least important, or None for their own order.

    Returns:
        [B, H], exactly 0 or 1; fp32, or float64 for float64 logits: cast it to the dtype of the MLP.
    """
    _check_widths(width_logits, widths)
    if order is not None and order.shape != (hidden,):
        raise TrainingError(f"The channel order has shape {tuple(order.shape)}; the MLP has {hidden} hidden channels.")
    logits = _wide(width_logits)
    rank = torch.arange(hidden, device=logits.device)
    if order is not None:
        rank = torch.empty_like(rank).scatter_(0, order, rank)
    masks = torch.stack([rank < kept_channels(share, hidden) for share in widths]).to(logits.dtype)
    soft = (torch.softmax(logits, dim=-1)[..., None] * masks).sum(1)
    return masks[width_choice(width_logits)] + (soft - soft.detach())


def expected_width(width_logits: Tensor, widths: Sequence[float]) -> Tensor:
    """Expected share of the MLP, sum_s q_s s with q = softmax: [B, S] -> [B], fp32 (float64 stays)."""
    _check_widths(width_logits, widths)
    q = torch.softmax(_wide(width_logits), dim=-1)
    return torch.stack([share * q[:, place] for place, share in enumerate(widths)]).sum(0)


def gate_loss(p: Tensor, target: float, average: BudgetLoss | None = None) -> Tensor:
    """L_gate = (mean p - rho_g)^2, the mean over blocks and samples; or its average over batches.

    The square of a small batch's mean also punishes samples and timesteps for differing. With `average`, the deviation
    from the target is averaged over batches before it is squared: the gradient is 2 (average deviation) dmean.

    Args:
        p: [L, B], probabilities of running.
        target: rho_g.
        average: a `BudgetLoss` kept for this loss alone; None for the paper's form.
    """
    if p.numel() == 0:
        raise TrainingError(f"The gate loss got probabilities of shape {tuple(p.shape)}; give at least one block.")
    mean = _wide(p).mean()
    return (mean - target).square() if average is None else average(mean, target)


def width_loss(ratio: Tensor, ran: Tensor, target: float, average: BudgetLoss | None = None) -> Tensor:
    """L_width = (mean expected width over running blocks - rho_w)^2; 0, without any pull, if no block ran.

    Args:
        ratio: [L, B], from `expected_width` per block.
        ran: [L, B] bool, the blocks that ran; the others' widths cost nothing and are not read.
        target: rho_w.
        average: as for `gate_loss`; a batch in which no block ran counts as on its target.
    """
    ratio, count = _wide(ratio), ran.sum()
    mean = torch.where(ran, ratio, 0.0).sum() / count.clamp(min=1)
    if average is None:
        return torch.where(count > 0, mean - target, 0.0).square()
    on_target = torch.as_tensor(target, dtype=mean.dtype, device=mean.device)
    return torch.where(count > 0, average(torch.where(count > 0, mean, on_target), target), 0.0)


def _check_widths(width_logits: Tensor, widths: Sequence[float]) -> None:
    if width_logits.shape[-1] != len(widths):
        raise TrainingError(f"{width_logits.shape[-1]} width logits for {len(widths)} widths; give one logit for each.")


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
