"""What the tests of peers share: tiny pipelines compared, tiny backbones in a loop, and what their blocks cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captioned import SIDES, captioned
from families import build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import Comparison, Setting

STEPS = 8


def compared(name: str) -> Comparison:
    pipe = captioned(name)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    return Comparison(pipe, Setting(STEPS, 3.0, 0, 2, options(name)))


def captions(name: str) -> list[str]:
    return ["1", "2"] if name == "dit" else ["a b", "c"]


def options(name: str) -> dict[str, Any]:
    return {"height": SIDES[name], "width": SIDES[name], "max_sequence_length": 16}


def bare(name: str, samples: int = 2, tokens: int = 16) -> BareLoop:
    return BareLoop(build(name).transformer, samples, tokens, 8, STEPS)


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def block_flops(loop: BareLoop) -> int:
    """Of a loop's blocks in one generation, counted by torch."""
    total, handles = [0], []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def begin(*_: Any) -> None:
            total[0] -= counter.get_total_flops()

        def end(*_: Any) -> None:
            total[0] += counter.get_total_flops()

        for _, block in loop.spec.block_list(loop.transformer):
            handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
        loop()
    for handle in handles:
        handle.remove()
    return total[0]


def image_of(output: Any) -> Tensor:
    return output[1] if isinstance(output, tuple) else output


@contextmanager
def last_block_gives(loop: BareLoop, resting: list[int], start: str) -> Iterator[None]:
    """Everything runs, and at resting steps the last block's image is thrown away for `start` + what was last added to it."""
    blocks = list(loop.transformer.transformer_blocks)
    now: dict[str, Any] = {"step": -1}

    def first(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        now["step"] += 1
        now["start"] = x if start == "input" else image_of(output)

    def last(module: Any, args: Any, output: Any) -> Any:
        image = image_of(output)
        if now["step"] not in resting:
            now["added"] = image - now["start"]
            return output
        image = now["start"] + now["added"]
        return (output[0], image) if isinstance(output, tuple) else image

    handles = [blocks[0].register_forward_hook(first, with_kwargs=True), blocks[-1].register_forward_hook(last)]
    yield
    for handle in handles:
        handle.remove()
