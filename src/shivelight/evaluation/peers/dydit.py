"""DyDiT (Zhao et al. 2024, arXiv 2410.03456): widths that follow the timestep, and tokens that bypass the MLP.

Timestep-wise dynamic width (section 3.2): per block, a router of the timestep embedding switches heads of the attention and as many
groups of the MLP's channels, so at each step their weights are slices. Spatial-wise dynamic token (section 3.3): a linear router of
each token, sigmoid, threshold; tokens below it pass by the MLP, the others are gathered.

    heads(t) = {h : sigmoid(r(E_t))_h > 0.5},        MLP runs on {i : sigmoid(w . x_i) > 0.5}

Trained (`DyditGates`), decisions are hard in the forward pass and sigmoids with Gumbel noise in the backward pass, all of the model
is tuned with them (here DoRA deltas, as all that we train), and the FLOPs that run are held to a share of the dense ones:

    L = (F / F_dense - target)^2

E_t are sinusoids of the timestep, since some families' own embedding has the prompt or the class in it. F is a mean over a batch's
timesteps. Here a micro-batch has one, so the mean is a moving one. Gates start open. Text tokens have the heads that image tokens
have; an MLP of their own is left as it is.

Without training such gates mean nothing: to be timed (`dydit`), routers are random, and the thresholds are those at which the share
asked for is left out, of heads and of groups over all steps, of tokens at each block and step (found in the first, untimed
generation). Which heads and channels those are does not change what they cost, so the first ones run, as views. Gathering by a
threshold waits for the device once a block, as DyDiT's does. Shapes: B samples, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from shivelight.errors import ShivelightError
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Plan, Where, blocks_run, generator
from shivelight.evaluation.peers.slicing import COLUMNS, Sliced, Units, attentions, layer_of, mlp_name, obstacle
from shivelight.evaluation.peers.trained import TrainedGates, scores_of
from shivelight.execution.call import BlockCall
from shivelight.execution.width import OwnForward, call_narrow, masked_channels, resized
from shivelight.routing.ratio_policy import timestep_sinusoids
from shivelight.training.losses import BudgetLoss

METHOD = "dydit"
_TOKENS = "shivelight_peer_tokens"
# Of the routers of gates that train: nearly all is open at first.
_START = 2.0
_TIME = 256


def dydit(where: Where, skip: float) -> OperatingPoint:
    """This share of heads, of the MLP's channel groups and of the tokens that enter it is left out.

    Args:
        where: a bare loop.
        skip: in (0, 1).

    Raises:
        ShivelightError: the weights are trained ones, or a block's attention or MLP cannot be sliced.
    """
    ground = Ground(where)
    if not ground.bare:
        raise ground.refuse(
            METHOD, "its gates need training (recipes/train_peers.py); without, it is timed on random weights (bench)"
        )
    if isinstance(where, BareLoop) and where.regions is not None:
        raise ground.refuse(METHOD, "its gates look at values in the middle of a block, so blocks are no single graphs")
    if not 0.0 < skip < 1.0:
        raise ShivelightError(f"The share that {METHOD} leaves out is {skip}; give one in (0, 1).")
    _refuse_unsliced(ground)
    sliced = [Sliced(kind, block) for kind, block in ground.blocks]
    run_heads = [active(ground.steps, own.heads, skip, generator(index, 1)) for index, own in enumerate(sliced)]
    run_groups = [active(ground.steps, own.heads, skip, generator(index, 2)) for index, own in enumerate(sliced)]
    thresholds: dict[tuple[int, int], Tensor] = {}

    def block_run(index: int, passes: Passes) -> Any:
        def run(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            step = passes.context.step
            sizes, slices = sliced[index].at(
                tuple(range(run_heads[index][step])), tuple(range(run_groups[index][step]))
            )
            with resized(module, sizes):
                return call.split(call_narrow(OwnForward(module, forward), slices, **call.arguments))

        return run

    @contextmanager
    def state() -> Any:
        passes = Passes(ground)
        with blocks_run(ground, {index: block_run(index, passes) for index in range(len(sliced))}, passes):
            for index, (kind, block) in enumerate(ground.blocks):
                mlp = block.get_submodule(mlp_name(kind))
                gate = _TokenGate(index, passes, skip, thresholds)
                HookRegistry.check_if_exists_or_initialize(mlp).register_hook(gate, _TOKENS)
            yield

    def plan(shape: tuple[int, int]) -> float:
        dense = sum(cost.flops(*shape) for cost in ground.costs)
        kept = _kept(shape[0], skip) / shape[0]
        saved = sum(
            own.saved(cost, heads / own.heads, kept * groups / own.heads, *shape)
            for own, cost, *ran in zip(sliced, ground.costs, run_heads, run_groups, strict=True)
            for heads, groups in zip(*ran, strict=True)
        )
        return 1.0 - saved / (dense * ground.steps)

    return ground.point(METHOD, {"skip": skip}, state, plan)


def active(steps: int, units: int, skip: float, draw: torch.Generator) -> list[int]:
    """How many of the units run at each step, at least one: those whose random scores lie above the threshold at which `skip` of
    all [steps, units] lie below."""
    scores = torch.rand(steps, units, generator=draw)
    threshold = scores.flatten().sort().values[round(skip * steps * units)]
    return (scores >= threshold).sum(dim=1).clamp(min=1).tolist()


def _kept(tokens: int, skip: float) -> int:
    return max(1, round((1 - skip) * tokens))


class _TokenGate(ModelHook):
    """On an MLP: runs it on the tokens whose score reaches the threshold, the others get nothing from it."""

    def __init__(self, block: int, passes: Passes, skip: float, thresholds: dict[tuple[int, int], Tensor]) -> None:
        super().__init__()
        self.block, self.passes, self.skip, self.thresholds = block, passes, skip, thresholds
        self._router: Tensor | None = None

    def new_forward(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self._router is None:
            self._router = torch.randn(x.shape[-1], generator=generator(self.block, 3)).to(x.device)
        scores = (x.float() @ self._router).flatten()  # ties of a lower precision would miss the share
        key = self.block, self.passes.context.step
        if key not in self.thresholds:
            kept = x.shape[0] * _kept(x.shape[1], self.skip)
            self.thresholds[key] = scores.sort(descending=True).values[kept - 1]
        return _on_rows(self.fn_ref.original_forward, x, scores >= self.thresholds[key])[0]


def _on_rows(mlp: Callable[..., Tensor], x: Tensor, enters: Tensor) -> tuple[Tensor, float]:
    """(what an MLP makes of the tokens of x [B, N, D] that enter it [B * N], and nothing of the others; their share)."""
    rows, flat = enters.nonzero()[:, 0], x.flatten(0, 1)
    return torch.zeros_like(flat).index_copy_(0, rows, mlp(flat[rows])).view_as(x), len(rows) / len(flat)


def _refuse_unsliced(ground: Ground) -> None:
    for kind, block in ground.blocks:
        if reason := obstacle(kind, block):
            raise ground.refuse(METHOD, reason)


class DyditGates(TrainedGates):
    """Routers of heads and channel groups by the timestep, which all samples of a pass share, and of the tokens that enter the MLP.

    Args:
        ground: the backbone.
        target: share of the blocks' FLOPs.
    """

    method = METHOD
    rate = "lr_gates"
    weight = 20.0  # at 1, what it costs that noise closes gates weighs more, and the target is not come to

    def __init__(self, ground: Ground, target: float) -> None:
        super().__init__(ground, target)
        _refuse_unsliced(ground)
        width, _, _ = ground.spec.widths(ground.backbone)
        self._sliced = [Sliced(kind, block) for kind, block in ground.blocks]
        self.heads = nn.ModuleList(_router(_TIME, own.heads) for own in self._sliced)
        self.groups = nn.ModuleList(_router(_TIME, own.heads) for own in self._sliced)
        self.tokens = nn.ModuleList(_router(width, 1) for _ in self._sliced)
        self.mean = BudgetLoss()
        self._saved: list[Tensor] = []
        self._spent: list[float] | None = None  # while a plan is being made
        self._bypasses: dict[int, _Bypass] = {}
        self._chosen: dict[tuple[int, float], tuple[Units, Units]] = {}

    @contextmanager
    def state(self, ground: Ground) -> Iterator[None]:
        """The backbone with this in force."""
        passes = Passes(ground)
        run = self._run_masked if self.training else self._run_sliced
        runs = {i: self.noting(i, partial(run, ground, passes, i)) for i in range(len(self._sliced))}
        with blocks_run(ground, runs, passes):
            for index, (kind, block) in enumerate(ground.blocks):
                if not self.training:
                    mlp = block.get_submodule(mlp_name(kind))
                    bypass = self._bypasses[index] = _Bypass(self.tokens[index])
                    HookRegistry.check_if_exists_or_initialize(mlp).register_hook(bypass, _TOKENS)
            yield

    def train(self, mode: bool = True) -> DyditGates:
        """Also forget, where the mode changes, what was open, and the slices of weights."""
        if mode != self.training:
            self._chosen.clear()
            for own in self._sliced:
                own.forget()
        super().train(mode)
        return self

    def plan(self, ground: Ground, generate: Callable[[], None]) -> Plan:
        """As one generation of one caption spends: how many tokens enter hangs on data."""

        def plan(shape: tuple[int, int]) -> float:
            spent = self._spent = []
            try:
                generate()
            finally:
                self._spent = None
            return sum(spent) * len(ground.costs) / len(spent)

        return plan

    def bound(self) -> tuple[Tensor, Tensor]:
        """Of the last pass: (the loss that holds the target, the share of the FLOPs)."""
        share = 1.0 - torch.stack(self._saved).sum()
        return self.mean(share, self.target), share.detach()

    def _run_masked(
        self,
        ground: Ground,
        passes: Passes,
        index: int,
        module: nn.Module,
        call: BlockCall,
        forward: Callable[..., Any],
    ) -> tuple[Tensor, Tensor | None]:
        """All of the block, what is closed multiplied by zero where it is read."""
        own, mlp = self._sliced[index], ground.blocks[index][0].mlp
        assert mlp is not None
        if index == 0:
            self._saved = []
        time = _time(passes)
        heads, groups = (
            self._hard(scores_of(routers[index], time), keep_one=True) for routers in (self.heads, self.groups)
        )
        entering: list[Tensor] = []

        def read(attention: Any) -> Callable[..., Any]:
            mask = heads[torch.arange(attention.heads, device=heads.device) * own.heads // attention.heads]

            def before(layer: nn.Module, args: tuple) -> tuple:
                return args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)).to(args[0].dtype), *args[1:]

            return before

        def enter(layer: nn.Module, args: tuple) -> None:
            entering[:] = [self._hard(scores_of(self.tokens[index], args[0]))]

        def leave(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output * entering[0].to(output.dtype)

        whole = module.get_submodule(mlp_name(ground.blocks[index][0]))
        handles = [whole.register_forward_pre_hook(enter), whole.register_forward_hook(leave)]
        handles += [
            layer.register_forward_pre_hook(read(attention))
            for attention in attentions(ground.blocks[index][0], module).values()
            for layer in (layer_of(attention, name) for name in COLUMNS)
            if layer is not None
        ]
        channels = groups[torch.arange(own.channels, device=groups.device) * own.heads // own.channels]
        try:
            with masked_channels(module, mlp, channels.expand(len(call.image), -1)):
                result = call.split(forward(**call.arguments))
        finally:
            for handle in handles:
                handle.remove()
        shape = call.image.shape[1], call.text_tokens
        dense = sum(cost.flops(*shape) for cost in ground.costs)
        channel_share = groups.mean() * entering[0].mean()
        self._saved.append(own.saved(ground.costs[index], heads.mean(), channel_share, *shape) / dense)
        return result

    def _hard(self, logits: Tensor, keep_one: bool = False) -> Tensor:
        """Open (1) or closed (0) gates like the logits, straight through to a sigmoid with Gumbel noise; the likeliest of all stays
        open where asked for."""
        uniform = torch.rand(logits.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
        soft = torch.sigmoid(logits + uniform.log() - (-uniform).log1p())
        opened = soft > 0.5
        if keep_one:
            opened = opened | _likeliest(logits)
        return opened.float() + soft - soft.detach()

    def _run_sliced(
        self,
        ground: Ground,
        passes: Passes,
        index: int,
        module: nn.Module,
        call: BlockCall,
        forward: Callable[..., Any],
    ) -> tuple[Tensor, Tensor | None]:
        """What is open at this timestep alone."""
        assert passes.context.steps is not None
        key = index, passes.context.steps[passes.context.step]
        if key not in self._chosen:
            # Read from the device once for each timestep, as the paper does before it is deployed.
            heads, groups = (
                _units_open(scores_of(routers[index], _time(passes))) for routers in (self.heads, self.groups)
            )
            self._chosen[key] = heads, groups
        sizes, slices = self._sliced[index].at(*self._chosen[key])
        with resized(module, sizes):
            result = call.split(call_narrow(OwnForward(module, forward), slices, **call.arguments))
        if self._spent is None:
            return result
        shape, own = (call.image.shape[1], call.text_tokens), self._sliced[index]
        heads, groups = (len(units) / own.heads for units in self._chosen[key])
        dense = sum(cost.flops(*shape) for cost in ground.costs)
        saved = own.saved(ground.costs[index], heads, groups * self._bypasses[index].share, *shape)
        self._spent.append((ground.costs[index].flops(*shape) - saved) / dense)
        return result


class _Bypass(ModelHook):
    """On an MLP: runs it on the tokens that a trained router lets in."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self.share = router, 1.0

    def new_forward(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        result, self.share = _on_rows(self.fn_ref.original_forward, x, (scores_of(self.router, x) > 0).flatten())
        return result


def _time(passes: Passes) -> Tensor:
    """The embedding of a pass's timestep, which all its samples share."""
    time = passes.context.timestep
    assert time is not None
    # Of length one or less, so that a step of the optimiser moves a logit by little.
    return timestep_sinusoids(time.reshape(-1)[:1].float(), _TIME)[0] / _TIME**0.5


def _router(inputs: int, outputs: int) -> nn.Linear:
    router = nn.Linear(inputs, outputs)
    nn.init.zeros_(router.weight)
    nn.init.constant_(router.bias, _START)
    return router


def _likeliest(logits: Tensor) -> Tensor:
    """[U] bool, true in one place alone."""
    return torch.arange(len(logits), device=logits.device) == logits.argmax()


def _units_open(logits: Tensor) -> Units:
    """Which units [U] are open without noise; the likeliest at least."""
    opened = (logits > 0) | _likeliest(logits)
    return tuple(opened.nonzero()[:, 0].tolist())


def dydit_points(ground: Ground) -> list[OperatingPoint]:
    """Three shares."""
    return [dydit(ground.where, skip) for skip in (0.25, 0.5, 0.7)]
