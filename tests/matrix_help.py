"""What the tests of all families share: how a family is routed, what its blocks do, and its backbone's own arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec

NAMES = tuple(FAMILIES)
TOKENS = tuple(name for name in NAMES if not find_spec(build(name).transformer).no_tokens)
MLPS = tuple(name for name in NAMES if find_spec(build(name).transformer).blocks[0].mlp)


def close(a: Tensor, b: Tensor) -> None:
    """Equal as far as another order of sums allows."""
    scale = float(b.abs().mean())
    torch.testing.assert_close(a / scale, b / scale, atol=2e-4, rtol=1e-3)


def free(pipe: Any, compute: float = 0.5, **options: Any) -> Any:
    """Blocks without training."""
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", **options))
    return routed_of(pipe)


def counted_beyond_half(pipe: Any, name: str, steps: int, compute: float) -> None:
    """What torch counts of a generation under a budget, beyond one of half, is what is planned; both stay within theirs."""
    call, routed, flops = FAMILIES[name], routed_of(pipe), []
    for asked in (0.5, compute):
        sl.set_budget(pipe, compute=asked)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(pipe, 0, steps=steps, **call.unguided)
        flops.append(float(counter.get_total_flops()))
        ratio = routed.spending.ratio
        assert ratio == pytest.approx(sl.planned_ratio(pipe, steps)) and ratio <= asked
    spent = routed.planner.dense_flops(*routed.shape)[0] * steps * (routed.spending.ratio - 0.5)
    assert spent > 0 and flops[1] - flops[0] == pytest.approx(spent, rel=0.02)


def widths_of(name: str) -> tuple[float, ...]:
    """Widths to choose from, where the family has any."""
    return (0.5, 1.0) if name in MLPS else (1.0,)


def gated(
    model: Any, threshold: float = 0.5, spread: float = 4.0, reuse: bool = True, seed: int = 2, **options: Any
) -> Any:
    """Block routers that decide at random, but always the same."""
    torch.manual_seed(1)
    sl.attach(model, sl.RoutingConfig(None, sl.BlockRouting(**options), reuse=sl.Reuse() if reuse else None))
    generator = torch.Generator().manual_seed(seed)
    routed = routed_of(model)
    with torch.no_grad():
        for parameter in routed.gates.router.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    sl.set_budget(model, threshold=threshold)
    return routed


def kept(model: Any, keep: float = 0.5, **options: Any) -> Any:
    """Tokens by a random router and an uneven policy."""
    torch.manual_seed(3)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1, **options)))
    routed, generator = routed_of(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (routed.policy.time_out, routed.policy.layer_out):
            part.copy_(0.3 * torch.randn(part.shape, generator=generator))
    sl.set_budget(model, keep=keep)
    return routed


def decided(routed: Any) -> list[tuple[int, int, tuple]]:
    """What every sample does in every block from now on."""
    seen: list[tuple[int, int, tuple]] = []
    decide = routed.decide

    def noting(block: int, x: Tensor, text: Tensor | None, text_tokens: int) -> Any:
        parts = decide(block, x, text, text_tokens)
        seen.append((routed.context.step, block, parts * (len(x) // len(parts))))
        return parts

    routed.decide = noting
    return seen


def passes(pipe: Any, generate: Any) -> list[dict[str, Any]]:
    """The arguments, by name, of every pass of the backbone while a pipeline runs."""
    seen, names = [], list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(dict(zip(names, args, strict=False)) | kwargs)

    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate()
    finally:
        handle.remove()
    return seen


def of_samples(call: dict[str, Any], batch: int, *samples: int) -> dict[str, Any]:
    """The arguments of some samples of a batch; those that all samples share stay."""
    rows = list(samples)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            return value[rows]
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == batch else value

    return {name: take(value) for name, value in call.items()}


def one_batch(pipe: Any, name: str, *samples: int) -> dict[str, Any]:
    """The backbone's own arguments of a step in the middle, for some of the family's three samples without guidance."""
    call = FAMILIES[name]
    found = passes(pipe, lambda: call(pipe, *samples, steps=4, **call.unguided))
    return found[2] | {"return_dict": False}


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """What the backbone returns."""
    return model(**call)[0]
