"""Moving tokens: gather the kept ones, write them back. Shapes: B samples, N tokens, k kept, D width."""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [B, k] of x [B, N, ...] as [B, k, ...]."""
    index = indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def write_back(x: Tensor, indices: Tensor, updated: Tensor) -> Tensor:
    """x [B, N, D] with rows `indices` [B, k] replaced by `updated` [B, k, D]; x itself stays as it is.

    Rejected tokens pass through unchanged (Shiva-DiT, forward).
    """
    return x.scatter(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]), updated.to(x.dtype))


def take_samples(value: object, samples: Tensor, batch: int) -> object:
    """The chosen samples of anything with a batch dimension; everything else as it is (containers are searched)."""
    if isinstance(value, Tensor):
        return value.index_select(0, samples) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: take_samples(entry, samples, batch) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_samples(entry, samples, batch) for entry in value)
    return value


def merge_samples(parts: list[Tensor | None], groups: list[Tensor]) -> Tensor | None:
    """Undo `take_samples`: rows of the parts in the batch's own order. None (no text returned) stays None."""
    if parts[0] is None:
        return None
    order = torch.cat(groups).argsort()
    return torch.cat([part for part in parts if part is not None]).index_select(0, order)
