"""Interval cache: at a fixed share of steps no block runs, and what all of them last added to the picture is added again.

The simplest cache, known before sampling; DeepCache (arXiv 2312.00858) and Pyramid Attention Broadcast (arXiv 2408.12588) rest on
the same observation. Our form for DiTs: the residual of the whole stack, as MagCache keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Where, blocks_run, resting, rests
from shivelight.execution.call import BlockCall

METHOD = "interval-cache"


def interval_cache(where: Where, skip: float) -> OperatingPoint:
    """All blocks rest at this share of steps, evenly spread: 1/n is every n-th step, (n - 1)/n all but every n-th."""
    ground = Ground(where)
    last = len(ground.blocks) - 1

    def block(index: int, passes: Passes) -> Any:
        def run(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            memory = passes.memory
            if index == 0:
                memory["start"], memory["rests"] = call.image, "added" in memory and rests(passes.context.step, skip)
            if memory["rests"]:
                return (call.image + memory["added"] if index == last else call.image), call.text
            image, text = call.split(forward(**call.arguments))
            if index == last:
                memory["added"] = image - memory["start"]
            return image, text

        return run

    def state() -> Any:
        passes = Passes(ground)
        return blocks_run(ground, {index: block(index, passes) for index in range(last + 1)}, passes)

    return ground.point(METHOD, {"skip": skip}, state, lambda shape: 1.0 - resting(ground.steps, skip) / ground.steps)


def interval_cache_points(ground: Ground) -> list[OperatingPoint]:
    """From every fourth step at rest to all but every fourth."""
    return [interval_cache(ground.where, skip) for skip in (0.25, 0.5, 0.75)]
