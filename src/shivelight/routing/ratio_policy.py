"""How much each block keeps at each timestep: the additive ratio policy, and the anchor that meets a budget.

Shapes: S timesteps, L routed blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shivelight.errors import BudgetError

_BISECTIONS = 80  # halves any bracket that arises below float64's resolution


class RatioPolicy(nn.Module):
    """Keep ratios from timestep and layer: logit r[t, l] = Phi_time(e_t) + Phi_layer(e_l) + b (Shiva-DiT, policy).

    Both branches end in a linear layer that starts at zero, so a fresh policy is flat at `target`.

    Args:
        blocks: L, the number of routed blocks.
        target: keep ratio of a fresh policy, in (0, 1).
        hidden: width of both branches, and of the timestep's sinusoids; even.
    """

    def __init__(self, blocks: int, target: float = 0.7, hidden: int = 256) -> None:
        super().__init__()
        if not 0.0 < target < 1.0:
            raise BudgetError(
                f"The policy's starting keep ratio is {target}; give one inside (0, 1). To run every token, leave the "
                "policy and set a budget of keep=1.0."
            )
        if blocks < 1 or hidden < 2 or hidden % 2:
            raise BudgetError(
                f"A policy of {blocks} blocks and width {hidden}: give 1 block or more and an even width."
            )
        self.hidden = hidden
        self.layer_embedding = nn.Parameter(torch.randn(blocks, hidden))
        self.layer_in = nn.Linear(hidden, hidden)
        self.layer_out = nn.Parameter(torch.zeros(hidden))
        self.time_in = nn.Linear(hidden, hidden)
        self.time_out = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.tensor(math.log(target / (1.0 - target))))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Logits of the keep ratios; ratios = sigmoid(logits + anchor).

        Args:
            timesteps: [S], float, on the backbone's scale 0 to 1000.

        Returns:
            [S, L], fp32 (float64 for a float64 policy), whatever the model was cast to: a schedule must not depend
            on the dtype that the backbone runs in more than the stored weights make it.
        """
        dtype = torch.float64 if self.bias.dtype == torch.float64 else torch.float32
        with torch.autocast(timesteps.device.type, enabled=False):
            time = self._branch(timestep_sinusoids(timesteps.to(dtype), self.hidden), self.time_in, self.time_out)
            layer = self._branch(self.layer_embedding.to(dtype), self.layer_in, self.layer_out)
            return time[:, None] + layer[None, :] + self.bias.to(dtype)

    @staticmethod
    def _branch(embedding: Tensor, first: nn.Linear, last: Tensor) -> Tensor:
        dtype = embedding.dtype
        hidden = F.silu(F.linear(embedding, first.weight.to(dtype), first.bias.to(dtype)))
        return (hidden * last.to(dtype)).sum(-1)


def timestep_sinusoids(timesteps: Tensor, width: int, longest_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of the timesteps at `width / 2` geometric frequencies, [S] -> [S, width]."""
    half = width // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=timesteps.dtype) / half
    angles = timesteps[:, None] * torch.exp(-math.log(longest_period) * exponents)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def solve_anchor(logits: Tensor, target: float, weights: Tensor | None = None) -> Tensor:
    """The anchor a at which the (weighted) mean of sigmoid(logits + a) is `target`; differentiable in the logits.

    The mean is monotone in a, so bisection in float64 finds it. The gradient is the implicit function theorem's,
    da/dlogit_ij = -w_ij sigma'_ij / sum(w sigma'): moving the logits then leaves the mean where it is, which is why a
    policy trained through the anchor needs no budget loss.

    Args:
        logits: [S, L] (any shape works), finite.
        target: mean keep ratio wanted, in (0, 1]. For 1.0 the anchor is +inf, without gradient: every ratio is 1.
        weights: like logits, non-negative, or None for the plain mean.

    Returns:
        Scalar on the logits' device, fp32, or float64 for float64 logits. No host sync on CUDA.
    """
    if not 0.0 < target <= 1.0:
        raise BudgetError(f"The target keep ratio is {target}; give one in (0, 1], for example 0.6.")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if target == 1.0:
        return torch.full((), math.inf, dtype=dtype, device=logits.device)
    solver_device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # mps has no float64
    fixed = logits.detach().to(solver_device, torch.float64)
    share = torch.ones_like(fixed) if weights is None else weights.detach().to(solver_device, torch.float64)
    share = share / share.sum()

    # At logit(target) - max no ratio exceeds the target, at logit(target) - min none falls short of it.
    centre = math.log(target) - math.log1p(-target)
    low, high = centre - fixed.max(), centre - fixed.min()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_much = (share * torch.sigmoid(fixed + middle)).sum() > target
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)

    ratios = torch.sigmoid(fixed + low)
    slopes = share * ratios * (1.0 - ratios)
    slopes = (slopes / slopes.sum()).to(logits.device, dtype)
    moved = logits.to(dtype) - logits.detach().to(dtype)  # zero, with a gradient of one
    return low.to(logits.device, dtype) - (slopes * moved).sum()
