"""Which tokens a block keeps: pure tensor functions, deterministic, without any host sync.

Shapes: B samples, N image tokens, k kept tokens.
"""

import math

import torch
from torch import Tensor

from shivelight.errors import BudgetError, ShivelightError

# 0.29 * 100 is 28.999999999999996: without a guard such a ratio loses a token to rounding.
_FLOOR_GUARD = 1e-9
# From so many tokens on, finding the k-th score is faster than sorting all of them.
_MANY = 1024


def guarded_floor(value: float) -> int:
    """Floor of a non-negative value that forgives a relative rounding error of 1e-9."""
    return math.floor(value * (1.0 + _FLOOR_GUARD))


def keep_count(ratio: float, tokens: int) -> int:
    """Number of tokens kept, k = floor(N * ratio) (Shiva-DiT, forward), never less than 1 nor more than N.

    >>> keep_count(0.7, 10), keep_count(0.29, 100), keep_count(0.001, 100)
    (7, 29, 1)
    """
    if tokens < 1:
        raise BudgetError(f"tokens is {tokens}; a block needs at least one image token.")
    if not 0.0 <= ratio <= 1.0:
        raise BudgetError(f"The keep ratio is {ratio}; give a number from 0 to 1, for example 0.6.")
    return min(max(guarded_floor(ratio * tokens), 1), tokens)


def count_unit(tokens: int, granularity: int) -> int:
    """How many tokens kept counts are a multiple of: the part that divides N, and leaves at least 32 steps where it can.

    Matrix kernels are tuned to multiples of 8 (205 tokens take as long as 208: benchmarks/block_scaling.py), and fewer
    distinct counts mean fewer kernels to prepare and fewer graphs to compile.

    >>> count_unit(4096, 8), count_unit(64, 8), count_unit(100, 8), count_unit(9, 8)
    (8, 2, 2, 1)
    """
    common = math.gcd(tokens, granularity)
    return max(part for part in range(1, common + 1) if common % part == 0 and (part == 1 or tokens >= 32 * part))


def top_k_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each sample, in ascending order.

    Args:
        scores: [B, N], any float type; ranked in fp32, equal scores go to the lower index.
        k: tokens to keep, 1 <= k <= N.

    Returns:
        [B, k] int64. Ascending, so that gathered tokens keep their order and k = N is the identity.

    A NaN ranks above every number, as in `torch.sort`: looking for one here would cost a host sync per block and
    step, so call `check_scores` where a sync is affordable (training, loading).
    """
    batch, tokens = scores.shape
    if not 1 <= k <= tokens:
        raise BudgetError(f"k is {k} for {tokens} tokens; give 1 <= k <= {tokens}.", nearest=min(max(k, 1), tokens))
    if k == tokens:
        return torch.arange(tokens, device=scores.device).expand(batch, tokens)
    if tokens < _MANY:
        # torch.topk breaks ties differently on each device; a stable sort does not.
        ranked = torch.sort(scores.float(), dim=-1, descending=True, stable=True).indices
        return ranked[:, :k].sort(dim=-1).values
    place = torch.arange(tokens, device=scores.device)
    ranks = (_sortable(scores).long() << 32) + (tokens - 1 - place)  # no two are equal
    kept = ranks >= ranks.kthvalue(tokens - k + 1, dim=-1, keepdim=True).values
    slots = torch.where(kept, kept.cumsum(dim=-1) - 1, k)  # what is not kept shares one more slot
    found = torch.empty(batch, k + 1, dtype=torch.int64, device=scores.device)
    return found.scatter_(1, slots, place.expand(batch, tokens))[:, :k]


def _sortable(scores: Tensor) -> Tensor:
    """Integers [B, N] int32 that compare as the scores do in fp32: 0.0 equals -0.0, and NaN is above every number."""
    values = scores.float()
    values = torch.where(values.isnan(), torch.nan, torch.where(values == 0, 0.0, values))
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def token_mask(indices: Tensor, tokens: int) -> Tensor:
    """Mask of the kept tokens.

    Args:
        indices: [B, k] int64, the kept tokens.
        tokens: N.

    Returns:
        [B, N] bool, True where kept.
    """
    mask = torch.zeros(indices.shape[0], tokens, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


def check_scores(scores: Tensor, where: str = "the token router") -> None:
    """Raise `ShivelightError` if a score is not finite. Syncs with the device: keep it out of the sampling loop."""
    broken = int((~torch.isfinite(scores)).sum())
    if broken:
        raise ShivelightError(
            f"{broken} of {scores.numel()} scores of {where} are NaN or infinite. Check the adapter's weights and the "
            "block's input; in fp16, try bf16 or fp32."
        )
