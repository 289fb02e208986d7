"""Blocks with some heads of their attention and some channels of their MLP alone, as slices of their own weights.

Shapes: N image tokens, M text tokens.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import BlockSpec
from shivelight.cost import BlockCost

Units = tuple[int, ...]
Share = TypeVar("Share", float, Tensor)
COLUMNS = ("to_out.0", "to_add_out")
_ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def mlp_name(kind: BlockSpec) -> str:
    """The module around up- and down-projection."""
    assert kind.mlp is not None
    return kind.mlp.down.partition(".")[0]


def attentions(kind: BlockSpec, block: nn.Module) -> dict[str, Any]:
    """Of the block, by name."""
    streams = kind.streams
    names = (*streams.joint_attention, *streams.image_attention, *streams.cross_attention)
    return {name: getattr(block, name) for name in names if getattr(block, name, None) is not None}


def layer_of(attention: nn.Module, name: str) -> Any:
    """A layer of an attention, or None: only some have projections of the text."""
    first, _, rest = name.partition(".")
    layer = getattr(attention, first, None)
    return layer[int(rest)] if layer is not None and rest else layer


def obstacle(kind: BlockSpec, block: nn.Module) -> str:
    """Why this block cannot be sliced, a clause; empty where it can."""
    mlp, name = kind.mlp, type(block).__name__
    if mlp is None or mlp.fused or mlp.halves != 1 or mlp.offset(block):
        return f"the MLP of {name} does not stand alone"
    if kind.streams.linear_attention or "" in kind.streams.joint_attention:
        return f"the attention of {name} cannot be sliced by heads"
    if len({getattr(attention, "heads", None) for attention in attentions(kind, block).values()}) > 1:
        return f"the attentions of {name} have different numbers of heads"
    for attention in attentions(kind, block).values():
        inner = {
            getattr(layer, "out_features", None)
            for layer in (layer_of(attention, row) for row in _ROWS)
            if layer is not None
        }
        if len(inner) != 1 or not hasattr(attention, "heads"):
            return f"the attention of {name} cannot be sliced by heads"
        size = inner.pop() // attention.heads
        norms = [getattr(getattr(attention, norm, None), "weight", None) for norm in _NORMS]
        if any(weight is not None and weight.numel() != size for weight in norms):
            return f"the attention of {name} normalises over all heads together"
    return ""


class Sliced:
    """One block with some heads of its attention and some groups of its MLP's channels, as many groups as heads.

    Args:
        kind: of the block.
        block: the module.

    Attributes:
        heads: how many there are.
        channels: of the MLP.
    """

    def __init__(self, kind: BlockSpec, block: nn.Module) -> None:
        assert kind.mlp is not None
        self.mlp, self.block = kind.mlp, block
        self.attentions = attentions(kind, block)
        self.heads = max(attention.heads for attention in self.attentions.values())
        self.channels = kind.mlp.channels(block)
        self._weights = {"image": 0, "text": 0}
        for stream, patterns in (("image", kind.streams.image), ("text", kind.streams.text)):
            for name, layer in block.named_modules():
                inside = name.partition(".")[0] in self.attentions and isinstance(layer, nn.Linear)
                if inside and any(fnmatchcase(name, pattern) for pattern in patterns):
                    self._weights[stream] += layer.weight.numel()
        self._known: dict[tuple[Units, Units], tuple[dict[str, int], dict[str, Tensor]]] = {}

    def forget(self) -> None:
        """Drop the slices: they are made again from the weights as they are then."""
        self._known.clear()

    def at(self, heads: Units, groups: Units) -> tuple[dict[str, int], dict[str, Tensor]]:
        """(attributes, parameters) by name relative to the block, in the place of its own, where these run alone."""
        if (heads, groups) not in self._known:
            self._known[heads, groups] = self._slices(heads, groups)
        return self._known[heads, groups]

    def _slices(self, heads: Units, groups: Units) -> tuple[dict[str, int], dict[str, Tensor]]:
        sizes: dict[str, int] = {}
        slices: dict[str, Tensor] = {}
        for name, attention in self.attentions.items():
            own = members(attention.heads, self.heads, heads)
            sizes[f"{name}.heads"] = len(own)
            for row in _ROWS:
                if (layer := layer_of(attention, row)) is not None:
                    rows = _units(own, layer.out_features // attention.heads, layer.weight.device)
                    slices |= {f"{name}.{row}.{part}": value[rows] for part, value in layer.named_parameters()}
            for column in COLUMNS:
                if (layer := layer_of(attention, column)) is not None:
                    columns = _units(own, layer.in_features // attention.heads, layer.weight.device)
                    slices[f"{name}.{column}.weight"] = layer.weight[:, columns]
        down = self.block.get_parameter(f"{self.mlp.down}.weight")
        run = _units(members(self.channels, self.heads, groups), 1, down.device)
        for up in self.mlp.up:
            parameters = self.block.get_submodule(up).named_parameters()
            slices |= {f"{up}.{part}": value[run] for part, value in parameters}
        slices[f"{self.mlp.down}.weight"] = down[:, run]
        return sizes, slices

    def saved(self, cost: BlockCost, heads: Share, channels: Share, tokens: int, text: int) -> Share:
        """FLOPs of one sample that are left out where these shares run: of the heads, and of the MLP's channels times those of the
        tokens that enter it."""
        linear = 2 * (self._weights["image"] * tokens + self._weights["text"] * text)
        joint = (
            cost.joint_width * (tokens + text) ** 2 + cost.image_width * tokens**2 + cost.cross_width * tokens * text
        )
        return (1 - heads) * (linear + 4 * joint) + (1 - channels) * 2 * cost.channel_weights * self.channels * tokens


def members(count: int, groups: int, chosen: Units) -> Units:
    """Which of `count` units, in as many equal runs as there are groups, belong to the chosen ones.

    >>> members(8, 4, (0, 3)), members(2, 4, (0, 1))
    ((0, 1, 6, 7), (0,))
    """
    wanted = set(chosen)
    return tuple(unit for unit in range(count) if unit * groups // count in wanted) or (0,)


def _units(units: Units, size: int, device: torch.device) -> slice | Tensor:
    """An index of the rows of these units: the first ones as a slice, which copies nothing."""
    if units == tuple(range(len(units))):
        return slice(len(units) * size)
    return (torch.tensor(units)[:, None] * size + torch.arange(size)).flatten().to(device)
