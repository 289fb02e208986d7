"""Moving tokens: gather the kept ones, write them back. Shapes: B samples, N tokens, k kept, D width."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [B, k] of x [B, N, ...] as [B, k, ...]."""
    # Whole rows at a time: `gather` with an expanded index moves single elements, 5 to 15 times slower on a CPU.
    return x.flatten(0, 1).index_select(0, _rows(x, indices)).unflatten(0, indices.shape)


def write_back(x: Tensor, indices: Tensor, updated: Tensor) -> Tensor:
    """x [B, N, D] with rows `indices` [B, k] replaced by `updated` [B, k, D]; x itself stays as it is.

    Rejected tokens pass through unchanged (Shiva-DiT, forward).
    """
    rows = x.flatten(0, 1).index_put((_rows(x, indices),), updated.to(x.dtype).flatten(0, 1))
    return rows.view_as(x)


def write_rows(x: Tensor, indices: Tensor, updated: Tensor) -> None:
    """`write_back` in place, for buffers of our own: x [B, N, D] must be contiguous."""
    x.flatten(0, 1).index_copy_(0, _rows(x, indices), updated.to(x.dtype).flatten(0, 1))


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Row numbers [B * k] of `indices` [B, k] in x [B, N, ...] with its first two dimensions flattened."""
    batch, tokens = x.shape[:2]
    if batch == 1:  # three operators less for each gather and write-back
        return indices.flatten()
    return (indices + tokens * torch.arange(batch, device=x.device)[:, None]).flatten()


def sample_index(samples: Sequence[int], device: torch.device) -> Tensor:
    """Indices of samples on a device, int64 [b], without waiting for what the device is doing."""
    return queued(torch.tensor(samples), device)


def queued(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device: from ordinary memory the copy would wait, from pinned memory it is queued."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def take_samples(value: object, samples: Tensor, batch: int) -> object:
    """The chosen samples of anything with a batch dimension; everything else as it is (containers are searched)."""
    if isinstance(value, Tensor):
        return value.index_select(0, samples) if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: take_samples(entry, samples, batch) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_samples(entry, samples, batch) for entry in value)
    return value


def merge_samples(parts: Sequence[Tensor | None], groups: list[Tensor]) -> Tensor | None:
    """Undo `take_samples`: rows of the parts in the batch's own order. None (a part returned no text) makes all None."""
    given = [part for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    return torch.cat(given).index_select(0, torch.cat(groups).argsort())
