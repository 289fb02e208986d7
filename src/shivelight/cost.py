"""FLOPs, bytes and milliseconds of a block and of a schedule: pure functions, the only place that counts.

One multiply-add is two FLOPs. Counted are matrix products (linear layers and attention), as torch's FlopCounterMode
counts them; norms, activations and the routers themselves are not in the plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from shivelight.backbones.spec import BackboneSpec, Streams
from shivelight.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block for one sample as a function of the image tokens that enter it.

    Attributes:
        image_weights: elements of all weight matrices applied to each image token.
        text_weights: likewise for each text token.
        sample_weights: likewise once per sample.
        joint_width: summed width (heads x head size) of the attentions over image and text tokens.
        image_width: summed width of the attentions over image tokens alone.
    """

    image_weights: int
    text_weights: int
    sample_weights: int
    joint_width: int
    image_width: int

    def flops(self, tokens: int, text_tokens: int) -> int:
        """FLOPs of one forward pass of one sample with `tokens` image tokens."""
        linear = 2 * (self.image_weights * tokens + self.text_weights * text_tokens + self.sample_weights)
        # Scores and weighted sum: two products of (tokens x tokens x width) each.
        attention = 4 * (self.joint_width * (tokens + text_tokens) ** 2 + self.image_width * tokens**2)
        return linear + attention

    def bytes_moved(self, tokens: int, text_tokens: int, width: int, element_size: int) -> int:
        """Least memory traffic: every weight once, both streams in and out once."""
        weights = self.image_weights + self.text_weights + self.sample_weights
        return element_size * (weights + 2 * width * (tokens + text_tokens))


def block_cost(block: nn.Module, streams: Streams) -> BlockCost:
    """Count one block; a linear layer or attention that no stream claims raises, so nothing is forgotten."""
    totals = {"image": 0, "text": 0, "sample": 0}
    for name, weight in _linear_weights(block):
        claimed = [stream for stream in totals if _matches(name, getattr(streams, stream))]
        if len(claimed) != 1:
            raise UnsupportedBackboneError(
                f"The linear layer {name!r} of {type(block).__name__} is claimed by {claimed or 'no stream'}; "
                "its spec's Streams must name every linear layer exactly once."
            )
        totals[claimed[0]] += weight
    joint = sum(_attention_width(block, name) for name in streams.joint_attention)
    alone = sum(_attention_width(block, name) for name in streams.image_attention)
    return BlockCost(totals["image"], totals["text"], totals["sample"], joint, alone)


def backbone_costs(model: nn.Module, spec: BackboneSpec) -> list[BlockCost]:
    """`BlockCost` of every block of a model."""
    return [block_cost(block, spec.streams) for block in spec.block_list(model)]


def step_flops(costs: Sequence[BlockCost], tokens: Sequence[int], text_tokens: int) -> int:
    """FLOPs of all blocks of one step of one sample; `tokens` holds the image tokens of every block."""
    return sum(cost.flops(kept, text_tokens) for cost, kept in zip(costs, tokens, strict=True))


def planned_ratio(
    costs: Sequence[BlockCost], rows: Sequence[Sequence[int]], routed: Sequence[int], tokens: int, text_tokens: int
) -> float:
    """Planned FLOPs of a schedule over those of the dense blocks.

    Args:
        costs: of every block of the backbone.
        rows: kept tokens [steps][routed blocks].
        routed: indices of the routed blocks.
        tokens: N, the image tokens of a dense block.
        text_tokens: length of the text stream.
    """
    dense = step_flops(costs, [tokens] * len(costs), text_tokens) * len(rows)
    planned = 0
    for row in rows:
        kept = [tokens] * len(costs)
        for block, count in zip(routed, row, strict=True):
            kept[block] = count
        planned += step_flops(costs, kept, text_tokens)
    return planned / dense


def _linear_weights(block: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in block.named_modules():
        # Quantised linears are other classes with the same two attributes; a peft layer counts by its base layer.
        linear = (
            hasattr(module, "in_features") and hasattr(module, "out_features") and not hasattr(module, "base_layer")
        )
        if linear and ".lora_" not in name and not name.startswith("lora_"):
            yield name.removesuffix(".base_layer"), module.in_features * module.out_features


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _attention_width(block: nn.Module, name: str) -> int:
    attention = getattr(block, name, None)
    return 0 if attention is None else int(attention.inner_dim)
