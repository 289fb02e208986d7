"""Block routing on the tiny pipeline: routers whose gates stand near the threshold, and what they decided."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.gates import Decision


def gated(pipe: StableDiffusion3Pipeline, reuse: sl.Reuse | None = None, tokens: bool = False, **options: Any) -> Any:
    """Attach random block routers whose gates stand near the threshold, with records of what they say."""
    torch.manual_seed(1)
    blocks = sl.BlockRouting(**{"start": "random", "token_stride": 1} | options)
    routing = sl.TokenRouting(bottleneck=8, policy_width=16, granularity=1) if tokens else None
    sl.attach(pipe, sl.RoutingConfig(routing, blocks, reuse=reuse))
    routed = routed_of(pipe)
    said: dict[int, list[Tensor]] = {block: [] for block in routed.routed}
    times = []

    def listen(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        said[block].append(routed.read_gates(block, x, None))
        if block == routed.routed[0]:
            times.append(routed.context.timestep.expand(len(x)))

    with torch.no_grad():
        for _, parameter in routed.gates.router.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)  # far enough apart that samples and steps differ
        pipe._guidance_scale = 0.0
        routed.observer = listen
        walk(pipe, tiny_inputs(4), 6)
        for block, logits in said.items():
            routed.gates.router.routers[str(block)].gate_head.bias -= torch.cat(logits)[:, 0].median()
            said[block].clear()
        times.clear()
        walk(pipe, tiny_inputs(4), 6)
        routed.observer = None
        together = torch.stack([torch.cat(said[block]) for block in routed.routed], dim=1)
        routed.gates.records.add(torch.cat(times), together[..., 0], together[..., 1:])
    return routed


def watch(routed: Any) -> dict[tuple[int, int], tuple[Decision, ...]]:
    """Every decision from now on, by (step, block)."""
    seen: dict[tuple[int, int], tuple[Decision, ...]] = {}
    decide = routed.decide

    def noting(block: int, x: Tensor, text: Tensor | None, text_tokens: int) -> tuple[Decision, ...]:
        decisions = decide(block, x, text, text_tokens)
        seen[routed.context.step, block] = decisions * (len(x) // len(decisions))
        return decisions

    routed.decide = noting
    return seen
