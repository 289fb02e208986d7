"""DyDiT (Zhao et al. 2024, arXiv 2410.03456): widths that follow the timestep, and tokens that bypass the MLP; for timing only.

Timestep-wise dynamic width (section 3.2): per block, a router of the timestep embedding switches heads of the attention and as many
groups of the MLP's channels, so at each step their weights are slices. Spatial-wise dynamic token (section 3.3): a linear router of
each token, sigmoid, threshold; tokens below it pass by the MLP, the others are gathered.

    heads(t) = {h : sigmoid(r(E_t))_h > 0.5},        MLP runs on {i : sigmoid(w . x_i) > 0.5}

Without training such gates mean nothing. Here the routers are random, and the thresholds are those at which the share asked for is
left out, of heads and of groups over all steps, of tokens at each block and step (found in the first, untimed generation). Which
heads and channels those are does not change what they cost, so the first ones run, as views. Gathering by a threshold waits for the
device once a block, as DyDiT's does. Shapes: B samples, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.errors import ShivelightError
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Where, blocks_run, generator
from shivelight.execution.call import BlockCall
from shivelight.execution.width import OwnForward, call_narrow, resized

METHOD = "dydit"
_ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_COLUMNS = ("to_out.0", "to_add_out")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


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
            METHOD, "its gates need training, so only backbones with random weights are timed with it (bench)"
        )
    if isinstance(where, BareLoop) and where.regions is not None:
        raise ground.refuse(METHOD, "its gates look at values in the middle of a block, so blocks are no single graphs")
    if not 0.0 < skip < 1.0:
        raise ShivelightError(f"The share that {METHOD} leaves out is {skip}; give one in (0, 1).")
    for kind, block in ground.blocks:
        if reason := _obstacle(kind, block):
            raise ground.refuse(METHOD, reason)
    widths = [_Widths(kind, block, index, ground.steps, skip) for index, (kind, block) in enumerate(ground.blocks)]
    thresholds: dict[tuple[int, int], Tensor] = {}

    def block_run(index: int, passes: Passes) -> Any:
        def run(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            sizes, slices = widths[index].at(passes.context.step)
            with resized(module, sizes):
                return call.split(call_narrow(OwnForward(module, forward), slices, **call.arguments))

        return run

    @contextmanager
    def state() -> Any:
        passes = Passes(ground)
        with blocks_run(ground, {index: block_run(index, passes) for index in range(len(widths))}, passes):
            for index, (kind, block) in enumerate(ground.blocks):
                mlp = block.get_submodule(_mlp_name(kind))
                gate = _TokenGate(index, passes, skip, thresholds)
                HookRegistry.check_if_exists_or_initialize(mlp).register_hook(gate, "shivelight_peer_tokens")
            yield

    def plan(shape: tuple[int, int]) -> float:
        dense = sum(cost.flops(*shape) for cost in ground.costs)
        kept = _kept(shape[0], skip)
        saved = sum(
            own.saved(cost, step, *shape, kept)
            for own, cost in zip(widths, ground.costs, strict=True)
            for step in range(ground.steps)
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


def _mlp_name(kind: BlockSpec) -> str:
    """The module around up- and down-projection."""
    assert kind.mlp is not None
    return kind.mlp.down.partition(".")[0]


def _attentions(kind: BlockSpec, block: nn.Module) -> dict[str, Any]:
    streams = kind.streams
    names = (*streams.joint_attention, *streams.image_attention, *streams.cross_attention)
    return {name: getattr(block, name) for name in names if getattr(block, name, None) is not None}


def _layer(attention: nn.Module, name: str) -> Any:
    """A layer of an attention, or None: only some have projections of the text."""
    first, _, rest = name.partition(".")
    layer = getattr(attention, first, None)
    return layer[int(rest)] if layer is not None and rest else layer


def _obstacle(kind: BlockSpec, block: nn.Module) -> str:
    mlp, name = kind.mlp, type(block).__name__
    if mlp is None or mlp.fused or mlp.halves != 1 or mlp.offset(block):
        return f"the MLP of {name} does not stand alone"
    if kind.streams.linear_attention or "" in kind.streams.joint_attention:
        return f"the attention of {name} cannot be sliced by heads"
    for attention in _attentions(kind, block).values():
        inner = {
            getattr(layer, "out_features", None)
            for layer in (_layer(attention, row) for row in _ROWS)
            if layer is not None
        }
        if len(inner) != 1 or not hasattr(attention, "heads"):
            return f"the attention of {name} cannot be sliced by heads"
        size = inner.pop() // attention.heads
        norms = [getattr(getattr(attention, norm, None), "weight", None) for norm in _NORMS]
        if any(weight is not None and weight.numel() != size for weight in norms):
            return f"the attention of {name} normalises over all heads together"
    return ""


class _Widths:
    """Heads and channels of one block that run at each step, and what its parameters are then."""

    def __init__(self, kind: BlockSpec, block: nn.Module, index: int, steps: int, skip: float) -> None:
        assert kind.mlp is not None
        self.mlp, self.block = kind.mlp, block
        self.attentions = _attentions(kind, block)
        self.heads = max(attention.heads for attention in self.attentions.values())
        self.channels = kind.mlp.channels(block)
        self.run_heads = active(steps, self.heads, skip, generator(index, 1))
        self.run_groups = active(steps, self.heads, skip, generator(index, 2))
        self.weights = {"image": 0, "text": 0}
        for stream, patterns in (("image", kind.streams.image), ("text", kind.streams.text)):
            for name, layer in block.named_modules():
                inside = name.partition(".")[0] in self.attentions and isinstance(layer, nn.Linear)
                if inside and any(fnmatchcase(name, pattern) for pattern in patterns):
                    self.weights[stream] += layer.weight.numel()
        self._known: dict[tuple[int, int], tuple[dict[str, int], dict[str, Tensor]]] = {}

    def run_channels(self, step: int) -> int:
        """Of the MLP."""
        return max(1, self.channels * self.run_groups[step] // self.heads)

    def at(self, step: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        """(attributes, parameters) by name relative to the block, in the place of its own."""
        key = self.run_heads[step], self.run_channels(step)
        if key not in self._known:
            self._known[key] = self._slices(*key)
        return self._known[key]

    def _slices(self, heads: int, channels: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        sizes: dict[str, int] = {}
        slices: dict[str, Tensor] = {}
        for name, attention in self.attentions.items():
            own = max(1, attention.heads * heads // self.heads)
            sizes[f"{name}.heads"] = own
            for row in _ROWS:
                if (layer := _layer(attention, row)) is not None:
                    count = layer.out_features // attention.heads * own
                    slices |= {f"{name}.{row}.{part}": value[:count] for part, value in layer.named_parameters()}
            for column in _COLUMNS:
                if (layer := _layer(attention, column)) is not None:
                    slices[f"{name}.{column}.weight"] = layer.weight[:, : layer.in_features // attention.heads * own]
        for up in self.mlp.up:
            parameters = self.block.get_submodule(up).named_parameters()
            slices |= {f"{up}.{part}": value[:channels] for part, value in parameters}
        slices[f"{self.mlp.down}.weight"] = self.block.get_parameter(f"{self.mlp.down}.weight")[:, :channels]
        return sizes, slices

    def saved(self, cost: Any, step: int, tokens: int, text: int, kept: int) -> float:
        """FLOPs that a step leaves out of this block for one sample."""
        closed = 1.0 - self.run_heads[step] / self.heads
        linear = 2 * (self.weights["image"] * tokens + self.weights["text"] * text)
        joint = (
            cost.joint_width * (tokens + text) ** 2 + cost.image_width * tokens**2 + cost.cross_width * tokens * text
        )
        mlp = 2 * cost.channel_weights * (self.channels * tokens - self.run_channels(step) * kept)
        return closed * (linear + 4 * joint) + mlp


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
        rows = (scores >= self.thresholds[key]).nonzero()[:, 0]
        flat = x.flatten(0, 1)
        return torch.zeros_like(flat).index_copy_(0, rows, self.fn_ref.original_forward(flat[rows])).view_as(x)


def dydit_points(ground: Ground) -> list[OperatingPoint]:
    """Three shares."""
    return [dydit(ground.where, skip) for skip in (0.25, 0.5, 0.7)]
