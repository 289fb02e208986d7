"""How much each hidden channel of an MLP matters, so that a narrow MLP keeps the best ones: measured on a few batches.

E-DiT ranks nothing and lets fine-tuning move what matters to the front. Here the order is measured first and stored in
the adapter. First-order Taylor (Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient
Inference): removing channel j changes the loss L by about sum_tokens h_j dL/dh_j, with h the activations that enter the
down-projection.

Shapes: B samples, N tokens, H hidden channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import Mlp
from shivelight.errors import TrainingError

Criterion = Literal["taylor", "norm"]


def rank_channels(
    blocks: Mapping[int, nn.Module],
    mlps: Mapping[int, Mlp],
    loss_of_batch: Callable[[int], Tensor],
    batches: int,
    criterion: Criterion = "taylor",
) -> dict[int, Tensor]:
    """The hidden channels of each block, most important first; equal ones in their own order.

    Args:
        blocks: the routed blocks by index.
        mlps: where the hidden channels of each are.
        loss_of_batch: i -> scalar loss of batch i, run through the blocks at full width, with routing off. Losses that
            are means over samples weigh samples equally only where batches are equally large.
        batches: how many.
        criterion: "taylor", the mean over samples of |sum over tokens of h_j * dL/dh_j|; or "norm", the mean over samples
            and tokens of |h_j| times the norm of the column that reads it, which needs no backward pass.

    Returns:
        For each block int64 [H] on the CPU; order[j] is the channel of rank j.
    """
    importance = channel_importance(blocks, mlps, loss_of_batch, batches, criterion)
    return {
        index: torch.sort(values, descending=True, stable=True).indices.cpu() for index, values in importance.items()
    }


def channel_importance(
    blocks: Mapping[int, nn.Module],
    mlps: Mapping[int, Mlp],
    loss_of_batch: Callable[[int], Tensor],
    batches: int,
    criterion: Criterion = "taylor",
) -> dict[int, Tensor]:
    """The importance [H] of each block's hidden channels; arguments as `rank_channels`. Leaves no gradients behind."""
    if batches < 1:
        raise TrainingError(f"batches is {batches}; ranking channels needs at least one batch.")
    if criterion not in ("taylor", "norm"):
        raise TrainingError(f"The criterion {criterion!r} is unknown; choose 'taylor' or 'norm'.")
    collector = _Collector(blocks, mlps)
    with collector.listening(), torch.inference_mode(False), torch.set_grad_enabled(criterion == "taylor"):
        for batch in range(batches):
            loss = loss_of_batch(batch)
            if criterion == "taylor":
                collector.add_taylor(loss, batch)
            else:
                collector.add_norm()
    return collector.importance()


class _Collector:
    """Listens at the down-projections and sums up what their hidden channels do."""

    def __init__(self, blocks: Mapping[int, nn.Module], mlps: Mapping[int, Mlp]) -> None:
        self._down: dict[int, Any] = {index: block.get_submodule(mlps[index].down) for index, block in blocks.items()}
        self._offset = {index: mlps[index].offset(block) for index, block in blocks.items()}
        self._calls: list[tuple[int, Tensor]] = []
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks in place for a while."""
        handles = []
        try:
            for index, layer in self._down.items():
                handles.append(layer.register_forward_pre_hook(self._listener(index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_taylor(self, loss: Tensor, batch: int) -> None:
        """Add |sum over tokens of h * dL/dh| of every sample of the batch."""
        # Gradient checkpointing runs the blocks again in the backward pass; those calls must not count.
        calls, self._calls = self._calls, []
        if not calls:
            return
        if loss.dim() != 0 or not loss.requires_grad:
            raise TrainingError(
                f"The loss of batch {batch} has shape {tuple(loss.shape)} and "
                f"{'a' if loss.requires_grad else 'no'} gradient; ranking by 'taylor' needs a scalar that depends on the "
                "blocks' MLPs, computed without no_grad or detach. Where no gradient can be had, rank by 'norm'."
            )
        # Towards the activations alone: the parameters' .grad is not touched.
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, [entered for _, entered in calls], allow_unused=True
        )
        for (index, entered), gradient in zip(calls, gradients, strict=True):
            hidden = self._hidden(index, entered)
            if gradient is None:  # what this call computed does not reach the loss
                self._add(index, hidden.new_zeros(hidden.shape[0], hidden.shape[-1]))
                continue
            moved = hidden * self._hidden(index, gradient)
            self._add(index, moved.reshape(moved.shape[0], -1, moved.shape[-1]).sum(1).abs())
        self._calls = []

    def add_norm(self) -> None:
        """Add the mean over tokens of |h|, times the norm of the column that reads it, of every sample."""
        calls, self._calls = self._calls, []
        for index, entered in calls:
            hidden = self._hidden(index, entered).abs()
            layer = getattr(self._down[index], "base_layer", self._down[index])
            if not torch.is_floating_point(layer.weight):
                raise TrainingError(
                    f"The down-projection of block {index} is quantised ({layer.weight.dtype}), so its columns have no "
                    "norm to rank by; rank by 'taylor', or before quantising."
                )
            weight = layer.weight.detach()[:, self._offset[index] :].to(hidden.dtype)
            columns = torch.linalg.vector_norm(weight, dim=0)
            self._add(index, hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]).mean(1) * columns)

    def importance(self) -> dict[int, Tensor]:
        """The mean over samples [H] of each block."""
        means = {}
        for index in self._down:
            if index not in self._sums:
                raise TrainingError(
                    f"The MLP of block {index} never ran, so its channels cannot be ranked. Compute the loss through the "
                    "whole backbone, with routing off."
                )
            means[index] = self._sums[index] / self._counts[index]
            if not bool(torch.isfinite(means[index]).all()):
                raise TrainingError(
                    f"The channel importance of block {index} is not finite; in fp16, rank in bf16 or fp32."
                )
        return means

    def _listener(self, index: int) -> Callable[[nn.Module, tuple], tuple | None]:
        def listen(module: nn.Module, args: tuple) -> tuple | None:
            entered = args[0]
            if torch.is_grad_enabled() and not entered.requires_grad:
                # In a frozen backbone nothing before the first block asks for gradients.
                entered = entered.detach().requires_grad_()
            self._calls.append((index, entered))
            return (entered, *args[1:])

        return listen

    def _hidden(self, index: int, entered: Tensor) -> Tensor:
        """The hidden channels [B, ..., H] of what enters a down-projection, in at least fp32."""
        hidden = entered.detach()[..., self._offset[index] :]
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))

    def _add(self, index: int, of_samples: Tensor) -> None:
        total = of_samples.sum(0)
        self._sums[index] = self._sums[index] + total if index in self._sums else total
        self._counts[index] = self._counts.get(index, 0) + of_samples.shape[0]
