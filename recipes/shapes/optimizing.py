"""How small transformers are trained here: Muon for the matrices of their blocks, which learns from fewer samples, AdamW for the
rest; linear warm-up, then constant, then a cosine to 2% over the last half."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def build(model: nn.Module, lr: float, in_block: Callable[[str], bool]) -> list[torch.optim.Optimizer]:
    """Optimizers of all parameters; `in_block` says by a parameter's name whether it belongs to a block."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and in_block(name) else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def rate(step: int, progress: float, peak: float, warmup: int = 100) -> float:
    """The learning rate at a step; `progress` runs from 0 to 1."""
    late = max(0.0, 2 * progress - 1)
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(late, 1.0))))


def step(optimizers: list[torch.optim.Optimizer], model: nn.Module, loss: torch.Tensor, lr: float) -> None:
    """One update, gradients clipped to a norm of 1."""
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


def states(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of them."""
    return [optimizer.state_dict() for optimizer in optimizers]


def restore(optimizers: list[torch.optim.Optimizer], saved: list[dict[str, Any]]) -> None:
    """The other way."""
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
