"""FLOPs, bytes and milliseconds of a block and of a schedule: pure functions, the only place that counts.

One multiply-add is two FLOPs. Counted are matrix products (linear layers and attention), as torch's FlopCounterMode
counts them; norms, activations and the routers themselves are not in the plan.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from shivelight.backbones.spec import BackboneSpec, Mlp, Streams
from shivelight.errors import BudgetError, UnsupportedBackboneError


def kept_channels(mlp_width: float, channels: int) -> int:
    """Hidden channels that an MLP of this width runs, floor(width * H) and at least 1; plan and execution share it.

    >>> kept_channels(0.75, 1024), kept_channels(0.29, 100), kept_channels(0.001, 100), kept_channels(1.0, 100)
    (768, 29, 1, 100)
    """
    if not 0.0 < mlp_width <= 1.0:
        raise BudgetError(f"The MLP width is {mlp_width}; give a share in (0, 1], for example 0.5.")
    # 0.29 * 100 is 28.999999999999996: without rounding first, such a width loses a channel.
    return min(max(math.floor(round(mlp_width * channels, 6)), 1), channels)


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block for one sample as a function of the image tokens that enter it and the width of its MLP.

    Attributes:
        image_weights: elements of all weight matrices applied to each image token.
        text_weights: likewise for each text token.
        sample_weights: likewise once per sample.
        joint_width: summed width (heads x head size) of the attentions over image and text tokens.
        image_width: summed width of the attentions over image tokens alone.
        channels: hidden channels H of the image stream's MLP that can be narrowed; 0 where none can.
        channel_weights: elements of the image stream's weight matrices that each of them adds.
        text_channel_weights: likewise of the text stream's, where both go through the same MLP.
        cross_width: summed width of the attentions of image tokens over text tokens.
        linear_area: summed width x (head size + 1) of the attentions whose cost is linear in the image tokens.
        both_weights: elements that are in `image_weights` and in `text_weights`, being the same.
        completes: whether keys and values of tokens that do not run can be kept, so that they are attended to.
    """

    image_weights: int
    text_weights: int
    sample_weights: int
    joint_width: int
    image_width: int
    channels: int = 0
    channel_weights: int = 0
    text_channel_weights: int = 0
    cross_width: int = 0
    linear_area: int = 0
    both_weights: int = 0
    completes: bool = True

    def flops(self, tokens: int, text_tokens: int, mlp_width: float = 1.0, attended: int | None = None) -> int:
        """FLOPs of one forward pass of one sample with `tokens` image tokens and this share of the MLP's channels.

        The image tokens that are attended to are those that run, unless `attended` says more (keys and values reused).
        """
        attended = tokens if attended is None or not self.completes else attended
        image_weights, text_weights = self._token_weights(mlp_width)
        linear = 2 * (image_weights * tokens + text_weights * text_tokens + self.sample_weights)
        # Scores and weighted sum: two products of (queries x keys x width) each.
        joint = (tokens + text_tokens) * (attended + text_tokens)
        attention = self.joint_width * joint + self.image_width * tokens * attended
        return linear + 4 * (attention + self.cross_width * tokens * text_tokens + self.linear_area * tokens)

    def bytes_moved(self, tokens: int, text_tokens: int, width: int, element_size: int, mlp_width: float = 1.0) -> int:
        """Least memory traffic: every weight in use once, both streams in and out once."""
        image_weights, text_weights = self._token_weights(mlp_width)
        shared = self.both_weights - (self.text_weights - text_weights)  # read once
        weights = image_weights + text_weights - shared + self.sample_weights
        return element_size * (weights + 2 * width * (tokens + text_tokens))

    def _token_weights(self, mlp_width: float) -> tuple[int, int]:
        left_out = self.channels - kept_channels(mlp_width, self.channels)
        text = self.text_weights - self.text_channel_weights * left_out
        return self.image_weights - self.channel_weights * left_out, text


def block_cost(block: nn.Module, streams: Streams, mlp: Mlp | None = None) -> BlockCost:
    """Count one block; a linear layer or convolution that no stream claims raises, so nothing is forgotten."""
    totals = {"image": 0, "text": 0, "both": 0, "sample": 0}
    for name, weight in _linear_weights(block):
        claimed = [stream for stream in totals if _matches(name, getattr(streams, stream))]
        if len(claimed) != 1:
            raise UnsupportedBackboneError(
                f"The linear layer {name!r} of {type(block).__name__} is claimed by {claimed or 'no stream'}; "
                "its spec's Streams must name every linear layer exactly once."
            )
        totals[claimed[0]] += weight
    joint, alone, cross = (
        sum(_attention_width(block, name) for name in names)
        for names in (streams.joint_attention, streams.image_attention, streams.cross_attention)
    )
    # Beside its values, such an attention sums a row of ones, by which it divides.
    linear = sum(_attention_width(block, name) * (_head_size(block, name) + 1) for name in streams.linear_attention)
    channels, channel_weights, text_channel_weights = 0, 0, 0
    if mlp is not None:
        elsewhere = [name for name in (*mlp.up, mlp.down) if not _matches(name, (*streams.image, *streams.both))]
        if elsewhere:
            raise UnsupportedBackboneError(
                f"The spec's MLP of {type(block).__name__} names {elsewhere}, which its Streams do not count for the image "
                "tokens; only the image stream's MLP can be narrowed."
            )
        channels, channel_weights = mlp.channels(block), mlp.channel_weights(block)
        text_channel_weights = channel_weights if _matches(mlp.down, streams.both) else 0
    return BlockCost(
        totals["image"] + totals["both"], totals["text"] + totals["both"], totals["sample"], joint, alone,
        channels, channel_weights, text_channel_weights, cross, linear, totals["both"],
    )  # fmt: skip


def backbone_costs(model: nn.Module, spec: BackboneSpec) -> list[BlockCost]:
    """`BlockCost` of every block of a model."""
    return [
        replace(block_cost(block, kind.streams, kind.mlp), completes=bool(kind.context_linears))
        for kind, block in spec.block_list(model)
    ]


def step_flops(
    costs: Sequence[BlockCost],
    tokens: Sequence[int],
    text_tokens: int,
    mlp_widths: Sequence[float] | None = None,
    attended: int | None = None,
) -> int:
    """FLOPs of all blocks of one step of one sample; `tokens` and `mlp_widths` (None: whole) have one entry per block."""
    widths = [1.0] * len(costs) if mlp_widths is None else mlp_widths
    return sum(
        cost.flops(kept, text_tokens, width, attended) for cost, kept, width in zip(costs, tokens, widths, strict=True)
    )


def planned_ratio(
    costs: Sequence[BlockCost],
    rows: Sequence[Sequence[int]],
    routed: Sequence[int],
    tokens: int,
    text_tokens: int,
    mlp_widths: Sequence[Sequence[float]] | None = None,
    attended: int | None = None,
) -> float:
    """Planned FLOPs of a schedule over those of the dense blocks.

    Args:
        costs: of every block of the backbone.
        rows: kept tokens [steps][routed blocks].
        routed: indices of the routed blocks.
        tokens: N, the image tokens of a dense block.
        text_tokens: length of the text stream.
        mlp_widths: shares of the MLP's channels [steps][routed blocks]; None where every MLP runs whole.
        attended: image tokens that are attended to, if more than those that run.
    """
    dense = step_flops(costs, [tokens] * len(costs), text_tokens) * len(rows)
    planned = 0
    width_rows = [[1.0] * len(routed)] * len(rows) if mlp_widths is None else mlp_widths
    for row, width_row in zip(rows, width_rows, strict=True):
        kept, widths = [tokens] * len(costs), [1.0] * len(costs)
        for block, count, width in zip(routed, row, width_row, strict=True):
            kept[block], widths[block] = count, width
        planned += step_flops(costs, kept, text_tokens, widths, attended)
    return planned / dense


def _linear_weights(block: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in block.named_modules():
        # Quantised linears are other classes with the same two attributes; a peft layer counts by its base layer.
        linear = (
            hasattr(module, "in_features") and hasattr(module, "out_features") and not hasattr(module, "base_layer")
        )
        if linear and ".lora_" not in name and not name.startswith("lora_"):
            yield name.removesuffix(".base_layer"), module.in_features * module.out_features
        elif isinstance(module, nn.Conv2d):  # each of its weights meets each place once
            yield name, module.weight.numel()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _attention(block: nn.Module, name: str) -> Any | None:
    """An attention module of a block ("" is the block itself), or None: only some blocks have dual attention."""
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _head_size(block: nn.Module, name: str) -> int:
    attention = _attention(block, name)
    return 0 if attention is None else _attention_width(block, name) // int(attention.heads)


def _attention_width(block: nn.Module, name: str) -> int:
    attention = _attention(block, name)
    if attention is None:
        return 0
    width = getattr(attention, "inner_dim", None) or getattr(attention, "hidden_size", None)
    if width is None:
        raise UnsupportedBackboneError(
            f"The attention {name!r} of {type(block).__name__} has neither `inner_dim` nor `hidden_size`, so its cost cannot be "
            "counted; give it one, or name another module in the spec's Streams."
        )
    return int(width)
