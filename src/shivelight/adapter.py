"""Attach and detach: what is on a model, where it is found, and how it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from shivelight.backbones import find_spec
from shivelight.config import RoutingConfig
from shivelight.errors import AdapterError, ShivelightError, UnsupportedBackboneError
from shivelight.execution.attachment import check_named, compile_blocks, put_on, refuse_unsupported, take_off
from shivelight.execution.compiled import CompiledRegions, Lengths
from shivelight.execution.context import Branch
from shivelight.execution.folding import Delta
from shivelight.execution.replay import Replays
from shivelight.execution.routed import NAME, Routed


def attach(model: Any, config: RoutingConfig | None = None, *, pipeline: Any | None = None) -> Any:
    """Route a backbone, at the budget of the config: by default everything runs, bit-identical to the dense model.

    Args:
        model: a diffusers pipeline (guidance and steps are then known), or its transformer.
        config: what to attach; token routing by default, `RoutingConfig.training_free()` where there is no adapter.
            Attaching again replaces what was attached.
        pipeline: where `model` is one of a pipeline's two transformers, that pipeline.

    Returns:
        `model`, changed in place.

    Raises:
        UnsupportedBackboneError: the class is unknown, or set up in a way that cannot be routed.
    """
    install(model, prepare(model, config or RoutingConfig(), pipeline), {})
    return model


def prepare(model: Any, config: RoutingConfig, pipeline: Any | None = None) -> Routed:
    """What `install` puts on a model; nothing is changed yet."""
    backbone, own = _backbone_of(model)
    pipeline = own if pipeline is None else pipeline
    spec = find_spec(backbone)
    refuse_unsupported(backbone)
    if config.granularity and spec.no_tokens:
        raise UnsupportedBackboneError(
            f"The tokens of a {type(backbone).__name__} cannot be routed. {spec.no_tokens} Route its blocks: "
            "RoutingConfig(tokens=None, blocks=BlockRouting())."
        )
    check_named(backbone, spec, config.activation is not None)
    drifting = (config.tokens is not None and config.tokens.scores == "drift") or (
        config.blocks is not None and not config.blocks.learned
    )
    if pipeline is None and drifting:
        raise UnsupportedBackboneError(
            f"A bare {type(backbone).__name__} has no order in time, but training-free routing goes by the residuals of "
            "earlier steps. Attach to the pipeline."
        )
    return Routed(backbone, spec, config, pipeline)


def install(model: Any, routed: Routed, deltas: dict[str, Delta]) -> None:
    """Attach what was prepared, in the place of an earlier adapter, which stays if the deltas do not fit."""
    backbone, _ = _backbone_of(model)
    earlier = routed_of(backbone, missing_ok=True)
    was_enabled = earlier is not None and earlier.enabled
    if earlier is not None:
        earlier.enable(False)  # new deltas are folded into the backbone's own weights
    try:
        routed.set_deltas(backbone, deltas)
    except ShivelightError:
        if earlier is not None:
            earlier.enable(was_enabled)
        raise
    if earlier is not None:
        detach(backbone)
    put_on(backbone, routed)


def detach(model: Any) -> Any:
    """Take everything off again: weights, hooks and keys are exactly as before. Harmless where nothing is attached."""
    backbone, _ = _backbone_of(model)
    routed = routed_of(backbone, missing_ok=True)
    if routed is None:
        return model
    take_off(backbone, routed)
    return model


@contextmanager
def dense(model: Any) -> Iterator[Any]:
    """The untouched model for a while: routing and deltas off, bit for bit.

    The activation of an adapter that brings one (`RoutingConfig.activation`) stays: the backbone's weights are right with
    that one alone, so this is their dense model. Without it, too: `detach`.
    """
    with routed_of(model).switched(False):
        yield model


@contextmanager
def branch(model: Any, name: Branch) -> Iterator[Any]:
    """Say which guidance branch the passes in this block belong to, in a sampling loop of your own.

    Args:
        model: an attached pipeline or transformer.
        name: "both" for a batch of [unconditional; conditional] halves; "cond", then "uncond", for separate calls (the
            unconditional one reuses the conditional one's choices); "single" for independent samples (the default).
    """
    with routed_of(model).clock.forced(name):
        yield model


def compile(model: Any, *, lengths: Lengths = "auto", cuda_graphs: bool = False, **options: Any) -> Any:
    """Run the blocks of an attached model as compiled graphs, routed and dense; the decisions around them stay Python.

    Graphs are compiled when a generation first needs them, shared by blocks of one kind, kept on disk by torch, and reported by
    `summary`. Without gradients only: training runs as before. Compiling again, with other options, starts anew; `detach` ends it.

    Args:
        model: an attached pipeline or transformer; not one that `torch.compile` has wrapped as a whole.
        lengths: how blocks on fewer tokens are compiled. "static": a graph for each number of tokens, which are then rounded to
            32nds of all, so that there are few. "dynamic": one graph for any number. "auto" measures which is faster.
        cuda_graphs: record each step's pass of the backbone as a CUDA graph, and replay it without Python: for small models, whose
            kernels are shorter than what launches them. The first generation of a kind (shapes, steps, budget) runs as it is, the
            second is recorded, and those of the last four kinds keep the memory of their passes. Where samples decide for
            themselves, and off CUDA, passes run as they are.
        options: of `torch.compile`, such as mode="max-autotune-no-cudagraphs"; fullgraph=True by default.

    Returns:
        `model`, changed in place.

    Raises:
        AdapterError: nothing is attached.
        ShivelightError: it is compiled as a whole; or, in the first generation, a block is no single graph.
    """
    whole = getattr(model, "transformer", model)
    if hasattr(whole, "_orig_mod"):
        raise ShivelightError(
            "This model was compiled as a whole by torch.compile, which would trace the routing too. Give the model itself "
            "(`model._orig_mod`) to the pipeline, and to shivelight.compile."
        )
    routed = routed_of(model)
    replays = Replays(routed) if cuda_graphs else None
    compile_blocks(backbone_of(model), routed, CompiledRegions(lengths, options), replays)
    return model


def routed_of(model: Any, missing_ok: bool = False) -> Any:
    """The `Routed` state of an attached pipeline or transformer; AdapterError (or None) where nothing is attached."""
    backbone, _ = _backbone_of(model)
    routed = getattr(backbone, NAME, None)
    if routed is None and not missing_ok:
        raise AdapterError(
            f"Nothing is attached to this {type(backbone).__name__}; call shivelight.attach(model) or load_adapter first."
        )
    return routed


def backbone_of(model: Any) -> nn.Module:
    """The transformer of a pipeline, or the module itself."""
    return _backbone_of(model)[0]


def _backbone_of(model: Any) -> tuple[nn.Module, Any | None]:
    if isinstance(model, DiffusionPipeline):
        backbone = getattr(model, "transformer", None)
        if not isinstance(backbone, nn.Module):
            raise UnsupportedBackboneError(
                f"{type(model).__name__} has no `transformer`: only Diffusion Transformers can be routed, not UNets."
            )
        if isinstance(getattr(model, "transformer_2", None), nn.Module):
            raise UnsupportedBackboneError(
                f"{type(model).__name__} has two transformers; attach to each of them by itself, and say whose they are: "
                "attach(pipe.transformer, config, pipeline=pipe), and the same of pipe.transformer_2."
            )
        return _unwrapped(backbone), model
    if isinstance(model, nn.Module):
        return _unwrapped(model), None
    for name in ("transformer", "model"):  # somebody's own loop, or hy3dgen's pipeline
        if isinstance(getattr(model, name, None), nn.Module) and hasattr(model, "scheduler"):
            return _unwrapped(getattr(model, name)), model
    raise UnsupportedBackboneError(
        f"Expected a diffusers pipeline or its transformer, got {type(model).__module__}.{type(model).__qualname__}. For a "
        "loop of your own, give an object with `transformer` and `scheduler` (docs/bring-your-own-dit.md)."
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    """torch.compile's wrapper taken off."""
    return getattr(module, "_orig_mod", module)
