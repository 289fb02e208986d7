"""The description of a DiT family, and the registry that finds the one a model belongs to."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shivelight.errors import UnsupportedBackboneError

# (cosines, sines) of places [S, C], where heads have size 2 C.
Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Streams:
    """Which of a block's linear layers work on what: patterns (fnmatch) of names relative to the block.

    Attributes:
        image: applied to every image token.
        text: applied to every text token.
        both: applied to every image token and to every text token.
        sample: applied once per sample (modulation).
        joint_attention: attention modules in which image and text tokens attend to each other; "" is the block itself. Their
            width is their `inner_dim` or `hidden_size`.
        image_attention: attention modules among the image tokens alone.
        cross_attention: attention modules in which image tokens attend to text tokens.
        linear_attention: attention modules among the image tokens whose cost is linear in their number.
    """

    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()
    joint_attention: tuple[str, ...] = ()
    image_attention: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    linear_attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block whose hidden channels can be narrowed: names of linear layers relative to the block.

    Attributes:
        up: the layers whose outputs are the H hidden channels; several where gate and value are layers of their own.
        down: the layer that reads them, as the last H of its columns. Columns before them (in_features - H) stay whole:
            FLUX's single blocks put the attention's output there.
        halves: how many parts of H rows an up-projection's output stacks; 2 for GEGLU and SwiGLU, which then take one
            as the gate of the other.
        fused: how many projections come before them in the same output, each as wide as the columns before those of the
            hidden channels; 3 where queries, keys and values do.
        size: attribute, relative to the block, that holds H and by which its forward splits such an output, or None.
        activated: the module of diffusers' GELU class that projects up and activates, where there is one: its activation
            can be exchanged (`RoutingConfig.activation`).
    """

    up: tuple[str, ...]
    down: str
    halves: int = 1
    fused: int = 0
    size: str | None = None
    activated: str | None = None

    def channels(self, block: nn.Module) -> int:
        """H, the hidden channels of this block's MLP."""
        made = {name: self._layer(block, name).out_features for name in self.up}
        stacked = min(made.values(), default=0)
        read = self._layer(block, self.down).in_features
        # stacked = fused (read - H) + halves H
        hidden, rest = divmod(stacked - self.fused * read, self.halves - self.fused)
        if set(made.values()) != {stacked} or rest or not 0 < hidden <= read:
            raise UnsupportedBackboneError(
                f"The MLP of {type(block).__name__} does not fit its spec: {made} output features in {self.halves} parts "
                f"cannot be the last of the {read} inputs of {self.down!r}. Correct `mlp` in the spec."
            )
        return hidden

    def rows_before(self, block: nn.Module) -> int:
        """Rows of the up-projections before those of the hidden channels."""
        return self.fused * self.offset(block)

    def offset(self, block: nn.Module) -> int:
        """Columns of the down-projection before those of the hidden channels; 0 for an MLP that stands alone."""
        return self._layer(block, self.down).in_features - self.channels(block)

    def channel_weights(self, block: nn.Module) -> int:
        """Elements of the weight matrices that one hidden channel adds."""
        above = sum(self.halves * self._layer(block, name).in_features for name in self.up)
        return above + self._layer(block, self.down).out_features

    def _layer(self, block: nn.Module, name: str) -> Any:
        try:
            layer = block.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedBackboneError(
                f"{type(block).__name__} has no layer {name!r}, which its spec names as part of the MLP."
            ) from error
        # Quantised and peft's layers are other classes with the same two attributes.
        if not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
            raise UnsupportedBackboneError(
                f"The layer {name!r} of {type(block).__name__} is a {type(layer).__name__}; the MLP of a spec names "
                "linear layers."
            )
        return layer


@dataclass(frozen=True)
class Rotary:
    """How a block turns queries and keys by the places of their tokens, where that embedding has no batch dimension: every
    sample keeps tokens of its own, so the block is then run without it, and what these modules put out is turned instead.

    Attributes:
        argument: the block's argument that holds the embedding of all tokens.
        angles: (what it holds, M) -> angles of the N image tokens, and of the M text tokens or None; neighbouring channels
            of a head are turned as pairs.
        image: modules whose outputs [B, S, *] are queries or keys of image tokens.
        text: likewise of text tokens.
        both: likewise of text tokens followed by image tokens.
        obstacle: block -> why it cannot be run so as it is set up, a sentence; empty where it can.
    """

    argument: str
    angles: Callable[[Any, int], tuple[Angles, Angles | None]]
    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    obstacle: Callable[[Any], str] = lambda block: ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all modules whose outputs are turned."""
        return *self.image, *self.text, *self.both


@dataclass(frozen=True)
class BlockSpec:
    """One kind of block of a family: where they are, what their forward takes and gives, and where its work is done.

    Attributes:
        path: attribute path of their ModuleList in the backbone.
        arguments: names of the block's forward parameters, in order.
        image_argument: the one that holds the image tokens [B, N, D].
        returns: what the block returns, in order; ("image",) means the bare tensor.
        streams: where its work is done, for `cost.py`.
        joined: the image argument holds the text tokens too, before the image tokens [B, M + N, D], and so does what the block
            returns; `BackboneSpec.text_length` says how many they are.
        text_argument: the one that holds the text tokens [B, M, D] which the block returns changed, or None.
        context_argument: the one that holds text tokens [B, M, *] which image tokens attend to and no block changes, or None.
        token_arguments: further ones whose dimension 1 follows the image tokens and must be gathered along.
        token_dimensions: of those among them that follow the tokens only where they have so many dimensions.
        shared_arguments: those without a batch dimension, the same for all samples: never sliced, whatever their length.
        stacked_arguments: those whose dimension 0 holds several sets of B rows, one after the other.
        text_mask_argument: the mask [B, M] of text tokens that attention itself lengthens by one entry for each image token it
            is given; more are added where more tokens are attended to than run.
        context_linears: names, relative to the block, of the projections whose outputs [B, N, E] image tokens are attended
            by (the last N rows, if text comes first); a rejected token keeps its last one where residuals are reused.
        rotary: how it turns queries and keys by their places, where that embedding has no batch dimension, or None.
        mlp: the MLP of the image stream, whose hidden layer can be narrowed, or None.
    """

    path: str
    arguments: tuple[str, ...]
    image_argument: str
    returns: tuple[str, ...]
    streams: Streams
    joined: bool = False
    text_argument: str | None = None
    context_argument: str | None = None
    token_arguments: tuple[str, ...] = ()
    token_dimensions: Mapping[str, int] = field(default_factory=dict)
    shared_arguments: tuple[str, ...] = ()
    stacked_arguments: tuple[str, ...] = ()
    text_mask_argument: str | None = None
    context_linears: tuple[str, ...] = ()
    rotary: Rotary | None = None
    mlp: Mlp | None = None

    def list_in(self, model: nn.Module, family: str) -> nn.ModuleList:
        """These blocks of a model."""
        try:
            blocks = model.get_submodule(self.path)
        except AttributeError as error:
            raise UnsupportedBackboneError(
                f"{type(model).__name__} has no {self.path!r}, where the spec {family!r} expects blocks."
            ) from error
        if not isinstance(blocks, nn.ModuleList):
            raise UnsupportedBackboneError(
                f"{type(model).__name__}.{self.path} is a {type(blocks).__name__}; the spec {family!r} needs a ModuleList."
            )
        return blocks

    def context_layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """Those of `context_linears` that this block has (only some blocks have dual attention), by name; looked up anew
        each time, since a user's LoRA may have wrapped them."""
        layers = {}
        for name in self.context_linears:
            with suppress(AttributeError):
                layers[name] = block.get_submodule(name)
        return layers


@dataclass(frozen=True)
class BackboneSpec:
    """Data that lets routing run on a family without copying its forward.

    Attributes:
        name: short name of the family, stored in adapters.
        classes: class names of the models it fits (any class of a model's MRO counts).
        blocks: the kinds of its blocks, in the order in which they run.
        timestep_embedding: path of the module whose output [B, T] embeds the timestep.
        timestep_argument: name of the backbone's forward parameter that holds the timesteps.
        model_arguments: names of the backbone's forward parameters, in order.
        delta_targets: regular expression (full match, names relative to the backbone) of the linears that DoRA tunes.
        widths: model -> (token width D, width of the timestep embedding, of the condition embedding or None).
        default_shape: model -> (image tokens, text tokens) of its native resolution, for summaries before the first run.
        example: (model, samples, image tokens, text tokens) -> random arguments of one call, the timestep left out: for timing
            backbones without a pipeline; None where nothing says what they look like.
        condition_embedding: path of the module whose output [B, C] embeds the pooled condition, or None.
        timestep_scale: what the backbone's timestep is multiplied by to run from 0 to 1000.
        guidance: how the family's pipelines run classifier-free guidance: in one batch (unconditional half first), as
            separate calls, or never (or without saying so: every sample is then routed for itself).
        first_routed: blocks before this index are never pruned.
        text_length: the backbone's arguments by name -> M, for blocks whose streams are joined, or None.
        sample_times: the backbone's timesteps, one for each sample or for each token -> one for each sample.
        sample_embeddings: (what the timestep embedding puts out, the backbone's timesteps) -> one row for each sample.
        no_tokens: why its tokens cannot be routed, a sentence; empty where they can.
        call_obstacle: the backbone's arguments by name -> why such a call cannot be routed, a sentence; empty where it can.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[BlockSpec, ...]
    timestep_embedding: str
    timestep_argument: str
    model_arguments: tuple[str, ...]
    delta_targets: str
    widths: Callable[[Any], tuple[int, int, int | None]]
    default_shape: Callable[[Any], tuple[int, int]]
    example: Callable[[Any, int, int, int], dict[str, Any]] | None = None
    condition_embedding: str | None = None
    timestep_scale: float = 1.0
    guidance: Literal["batched", "separate", "none"] = "none"
    first_routed: int = 1
    text_length: Callable[[dict[str, Any]], int] | None = None
    sample_times: Callable[[Tensor], Tensor] = lambda times: times
    sample_embeddings: Callable[[Tensor, Tensor], Tensor] = lambda rows, times: rows
    no_tokens: str = ""
    call_obstacle: Callable[[dict[str, Any]], str] = lambda arguments: ""

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call of the backbone, by name."""
        return dict(zip(self.model_arguments, args, strict=False)) | dict(kwargs)

    def block_list(self, model: nn.Module) -> list[tuple[BlockSpec, nn.Module]]:
        """The blocks of a model of this family in the order in which they run, each with its kind."""
        if self.text_length is None and any(kind.joined for kind in self.blocks):
            raise UnsupportedBackboneError(
                f"The spec {self.name!r} has blocks whose streams are joined, but does not say how many text tokens are in them; "
                "fill in `text_length`."
            )
        blocks = [(kind, block) for kind in self.blocks for block in kind.list_in(model, self.name)]
        if len(blocks) <= self.first_routed:
            raise UnsupportedBackboneError(
                f"{type(model).__name__} has {len(blocks)} blocks in {', '.join(kind.path for kind in self.blocks)}; routing "
                f"never prunes the first {self.first_routed}, so there would be none to route."
            )
        return blocks

    def mlps(self, model: nn.Module) -> dict[int, Mlp]:
        """The MLP of each block that has one which can be narrowed, by the block's index."""
        kinds = enumerate(kind for kind, _ in self.block_list(model))
        return {index: kind.mlp for index, kind in kinds if kind.mlp is not None}


def near_square(tokens: int) -> tuple[int, int]:
    """(rows, columns) of so many places, as near to a square as they divide.

    >>> near_square(256), near_square(6889), near_square(12), near_square(7)
    ((16, 16), (83, 83), (3, 4), (1, 7))
    """
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def grid_latents(config: Any, samples: int, tokens: int) -> Tensor:
    """Random latents [B, C, h, w] of `near_square` pictures that a backbone of this config makes so many image tokens of."""
    rows, columns = (side * config.patch_size for side in near_square(tokens))
    return torch.randn(samples, config.in_channels, rows, columns)


_REGISTRY: dict[str, BackboneSpec] = {}


def register_backbone(spec: BackboneSpec) -> None:
    """Make a family known; a later spec for the same class name replaces the earlier one."""
    if not spec.classes:
        raise UnsupportedBackboneError(f"The spec {spec.name!r} names no class; fill in `classes`.")
    for name in spec.classes:
        _REGISTRY[name] = spec


def find_spec(model: nn.Module) -> BackboneSpec:
    """The spec of a model, by the class names of its MRO; `UnsupportedBackboneError` where there is none."""
    for cls in type(model).__mro__:
        if spec := _REGISTRY.get(cls.__name__):
            return spec
    raise UnsupportedBackboneError(
        f"Shivelight does not know the backbone {type(model).__module__}.{type(model).__qualname__}. Known: "
        f"{', '.join(sorted(_REGISTRY))}. Describe it in a BackboneSpec (see shivelight/backbones/sd3.py for one of 40 "
        "lines) and call shivelight.register_backbone(spec)."
    )
