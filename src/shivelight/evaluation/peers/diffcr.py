"""DiffCR (You et al. 2024, arXiv 2412.16822): every block runs the tokens that its router ranks first, and how many is learned for
each block and each region of timesteps, between bins of ratios.

    x'_i = x_i + g(s_i) (f(x_top)_i - x_i)  where s_i is among the k = rho N largest,   else  x_i          s = w . x + b
    out(rho) = (1 - a) out(lo) + a out(hi),   lo <= rho < hi neighbouring bins,  a = (rho - lo) / (hi - lo)
    L = (mean rho - target)^2

While it is trained both bins run, which is how the loss reaches rho; afterwards rho is the nearest bin, so that a schedule is known
before the first step. Read by us where the paper leaves it open: g(s) = 2 sigmoid(s), which is 1 for a router that starts at
nothing; rho starts at the target; bins are tenths, regions tenths of the timesteps; the backbone is tuned by DoRA deltas, as all
that we train. Shapes: B samples, N image tokens, k of them run, D width, L blocks, R regions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shivelight.evaluation.peers.ground import Ground, Passes, Plan, blocks_run, run_gathered
from shivelight.evaluation.peers.trained import TrainedGates, scores_of
from shivelight.execution.call import BlockCall
from shivelight.execution.tokens import gather_tokens, write_back
from shivelight.routing import top_k_indices

METHOD = "diffcr"
BINS, REGIONS = 10, 10


class DiffcrGates(TrainedGates):
    """A linear router for each block, and the ratios of all of them.

    Args:
        ground: the backbone.
        target: mean ratio of tokens that run.

    Attributes:
        ratios: [L, R]; what runs is within [1 / BINS, 1].
    """

    method = METHOD

    def __init__(self, ground: Ground, target: float) -> None:
        super().__init__(ground, target)
        if ground.spec.no_tokens:
            raise ground.refuse(METHOD, "its tokens cannot be routed")
        width, _, _ = ground.spec.widths(ground.backbone)
        self.routers = nn.ModuleList(_router(width, index) for index in range(len(ground.blocks)))
        self.ratios = nn.Parameter(torch.full((len(ground.blocks), REGIONS), target))

    def state(self, ground: Ground) -> AbstractContextManager[Any]:
        """The backbone with this in force."""
        passes = Passes(ground)
        run = self._between_bins if self.training else self._at_nearest
        runs = {i: self.noting(i, partial(run, passes, i)) for i in range(len(self.routers))}
        return blocks_run(ground, runs, passes)

    def bound(self) -> tuple[Tensor, Tensor]:
        """(the loss that holds the target, the mean ratio)."""
        mean = _within(self.ratios).mean()
        return (mean - self.target).square(), mean.detach()

    def plan(self, ground: Ground, generate: Callable[[], None]) -> Plan:
        """As the timesteps of a generation say."""

        def plan(shape: tuple[int, int]) -> float:
            generate()
            times = ground.pipe.scheduler.timesteps.tolist()
            dense = sum(cost.flops(*shape) for cost in ground.costs)
            kept = [
                cost.flops(self.kept(index, time, shape[0]), shape[1])
                for time in times
                for index, cost in enumerate(ground.costs)
            ]
            return sum(kept) / (dense * len(times))

        return plan

    def kept(self, index: int, time: float, tokens: int) -> int:
        """How many tokens a block runs at a timestep (0 to 1000)."""
        ratio = float(self.ratios.detach()[index, region(time)])
        return max(1, round(max(1, min(BINS, round(ratio * BINS))) / BINS * tokens))

    def _at_nearest(
        self, passes: Passes, index: int, module: nn.Module, call: BlockCall, forward: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        steps, step = passes.context.steps, passes.context.step
        assert steps is not None
        scores = scores_of(self.routers[index], call.image)[..., 0]
        return _run_top(module, call, forward, scores, self.kept(index, steps[step], call.image.shape[1]))

    def _between_bins(
        self, passes: Passes, index: int, module: nn.Module, call: BlockCall, forward: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        time, tokens = passes.context.timestep, call.image.shape[1]
        assert time is not None
        scores = scores_of(self.routers[index], call.image)[..., 0]
        ratio = _within(self.ratios[index, region(float(time.reshape(-1)[0]))])
        low = min(int(float(ratio) * BINS + 1e-6), BINS - 1)
        share = ratio * BINS - low
        fewer, more = (
            _run_top(module, call, forward, scores, max(1, round(bins / BINS * tokens))) for bins in (low, low + 1)
        )
        image = torch.lerp(fewer[0], more[0], share.to(fewer[0].dtype))
        if fewer[1] is None or more[1] is None:
            return image, None
        return image, torch.lerp(fewer[1], more[1], share.to(fewer[1].dtype))


def region(time: float) -> int:
    """Of a timestep from 0 to 1000.

    >>> region(0.0), region(99.9), region(100.0), region(1000.0)
    (0, 0, 1, 9)
    """
    return min(REGIONS - 1, int(time / 1000 * REGIONS))


def _within(ratios: Tensor) -> Tensor:
    """Ratios that run, with the gradient of those that are learned: one that has left the range may come back."""
    return ratios + (ratios.clamp(1 / BINS, 1.0) - ratios).detach()


def _router(width: int, index: int) -> nn.Linear:
    router = nn.Linear(width, 1)
    draw = torch.Generator().manual_seed(index)
    with torch.no_grad():
        router.weight.copy_(0.02 * torch.randn(router.weight.shape, generator=draw) / width**0.5)
        router.bias.zero_()
    return router


def _run_top(
    module: nn.Module, call: BlockCall, forward: Callable[..., Any], scores: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    """(image, text) where so many tokens run, those with the largest scores [B, N]; what they add is weighed by these."""
    x, weights = call.image, 2 * torch.sigmoid(scores)[..., None]
    if count == x.shape[1]:
        image, text = call.split(forward(**call.arguments))
        return x + weights.to(x.dtype) * (image - x), text
    indices = top_k_indices(scores.detach(), count)
    image, text = run_gathered(module, call, forward, x, indices)
    before = gather_tokens(x, indices)
    return write_back(x, indices, before + gather_tokens(weights, indices).to(x.dtype) * (image - before)), text
