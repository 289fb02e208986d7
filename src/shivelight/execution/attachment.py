"""Hooks, handles and the submodule that are put on a backbone and taken off it again, without a trace.

Other people's hooks stay where they are: accelerate's (enable_model_cpu_offload), diffusers' group offloading and layer-wise
casting.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.hooks.hooks import HookFunctionReference
from diffusers.models.activations import GELU
from torch import nn

from shivelight.backbones import BackboneSpec
from shivelight.errors import UnsupportedBackboneError
from shivelight.execution.compiled import CompiledRegions
from shivelight.execution.hook import BlockHook, WholeHook
from shivelight.execution.listeners import ActivationHook, EmbeddingHook, RootHook, refuse_parallel
from shivelight.execution.replay import Replays
from shivelight.execution.routed import NAME, Routed

# What enable_layerwise_casting leaves alone, in diffusers' models.
_NEVER_CAST = "_skip_layerwise_casting_patterns"


def put_on(backbone: nn.Module, routed: Routed) -> None:
    """Make `routed` a part of the backbone, and register all hooks."""
    if (device := _onload_device(backbone)) is not None:
        routed.to(device)
    backbone.add_module(NAME, routed)
    _register_hooks(backbone, routed, routed.spec)


def take_off(backbone: nn.Module, routed: Routed) -> None:
    """Undo `put_on`: weights, hooks and keys are exactly as before."""
    routed.enable(False)
    for module in backbone.modules():
        if "_diffusers_hook" in module.__dict__:
            registry: Any = module._diffusers_hook
            with _below_accelerate(module):
                registry.remove_hook(NAME, recurse=False)
    for handle in routed.handles:
        handle.remove()
    # Most of diffusers' transformers have one of their own class, and were given none.
    given = routed.reset_function
    if given is not None and backbone.__dict__.get("_reset_stateful_cache") is given:
        del backbone._reset_stateful_cache
    delattr(backbone, NAME)
    if backbone.__dict__.get(_NEVER_CAST) is routed.never_cast:
        delattr(backbone, _NEVER_CAST)
    HookRegistry.check_if_exists_or_initialize(backbone).invalidate_child_registries_cache()
    _drop_empty_registries(backbone)


def check_named(backbone: nn.Module, spec: BackboneSpec, activation: bool) -> None:
    """`UnsupportedBackboneError` where a backbone lacks the embeddings that its spec names, or modules whose activation is to be
    exchanged."""
    if activation:
        _activated(backbone, spec)
    for path in (spec.timestep_embedding, spec.condition_embedding):
        if path is not None:
            _embedder(backbone, spec, path)


def refuse_unsupported(backbone: nn.Module) -> None:
    """`UnsupportedBackboneError` where a model is set up in a way that cannot be routed."""
    refuse_parallel(backbone)
    if any(_runs_another_module(module) for module in backbone.modules()):
        raise UnsupportedBackboneError(
            "This model is a deep copy of a hooked one: its hooks would run the original's weights. Copy before attaching "
            "hooks, or load it anew."
        )


def _runs_another_module(module: nn.Module) -> bool:
    """A deep copy has a registry of its own, but its `forward` is a closure over the original's."""
    registry = module.__dict__.get("_diffusers_hook")
    closure = getattr(getattr(module.__dict__.get("forward"), "func", None), "__closure__", None) or ()
    called = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, HookFunctionReference)]
    return registry is not None and any(all(mine is not it for mine in registry._fn_refs) for it in called)


def _onload_device(backbone: nn.Module) -> torch.device | None:
    """Where the parts of a backbone under group offloading run: what is attached later must be there by itself."""
    for module in backbone.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook(_GROUP_OFFLOADING)
        if hook is not None:
            return hook.config.onload_device
    return None


def _register_hooks(backbone: nn.Module, routed: Routed, spec: BackboneSpec) -> None:
    _listen(backbone, routed, spec.timestep_embedding, "time_embedding")
    if spec.condition_embedding is not None:
        _listen(backbone, routed, spec.condition_embedding, "condition")
    if routed.config.activation is not None:
        for module in _activated(backbone, spec):
            _register(module, ActivationHook(routed.config.activation))
    blocks = spec.block_list(backbone)
    for index in routed.routed:
        kind, block = blocks[index]
        _register(block, BlockHook(routed, index, kind))
    if isinstance(routed.regions, CompiledRegions):
        _cover_unrouted(backbone, routed)
    registry = _register(backbone, RootHook(routed))
    registry.invalidate_child_registries_cache()
    if hasattr(backbone, _NEVER_CAST):
        # enable_layerwise_casting would store the routers in eight bits, and they read their weights themselves.
        routed.never_cast = (*(getattr(backbone, _NEVER_CAST) or ()), f"^{NAME}$")
        setattr(backbone, _NEVER_CAST, routed.never_cast)
    if not hasattr(backbone, "_reset_stateful_cache"):
        # pipe.maybe_free_model_hooks() calls this at the end of a generation, where it exists.
        routed.reset_function = lambda: registry.reset_stateful_hooks(recurse=True)
        object.__setattr__(backbone, "_reset_stateful_cache", routed.reset_function)
    routed.handles = [
        backbone.register_state_dict_post_hook(_dense_state_dict),
        backbone.register_load_state_dict_pre_hook(_before_load),
        backbone.register_load_state_dict_post_hook(_after_load),
    ]


def compile_blocks(
    backbone: nn.Module, routed: Routed, regions: CompiledRegions, replays: Replays | None = None
) -> None:
    """Run all blocks as these compiled graphs from now on, while `routed` is on the backbone; with replays, whole passes of it as
    recorded."""
    routed.regions, routed.replays = regions, replays
    # A block that holds an embedder we listen to (DiT's first) would be compiled anew at each attach.
    heard = {routed.spec.timestep_embedding, routed.spec.condition_embedding} - {None}
    listened = {backbone.get_submodule(path) for path in heard if path is not None}
    regions.left.update(block for _, block in routed.spec.block_list(backbone) if listened & set(block.modules()))
    # Few numbers of tokens, if each may have a graph: the coarsest that `count_unit` allows.
    tokens = routed.config.tokens
    routed.planner.granularity = 1 if tokens is None else tokens.granularity if regions.chosen == "dynamic" else 0
    routed.planner.forget()
    if getattr(backbone, NAME, None) is routed:
        _cover_unrouted(backbone, routed)
        HookRegistry.check_if_exists_or_initialize(backbone).invalidate_child_registries_cache()


def _cover_unrouted(backbone: nn.Module, routed: Routed) -> None:
    for index, (kind, block) in enumerate(routed.spec.block_list(backbone)):
        if index not in routed.routed and _registry_hook(block) is None:
            _register(block, WholeHook(routed, index, kind))


def _registry_hook(module: nn.Module) -> ModelHook | None:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(NAME)


def _register(module: nn.Module, hook: ModelHook) -> HookRegistry:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _below_accelerate(module):
        registry.register_hook(hook, NAME)
    return registry


@contextmanager
def _below_accelerate(module: nn.Module) -> Iterator[None]:
    """Hooks that come or go inside do so below accelerate's (enable_model_cpu_offload), which the pipeline takes off and puts on
    again after every picture, and whatever lay above them with it."""
    held: dict[str, Callable[..., Any]] = module.__dict__
    above = held.get("forward") if "_old_forward" in held else None
    if above is None:
        yield
        return
    held["forward"] = held["_old_forward"]
    try:
        yield
    finally:
        held["_old_forward"], held["forward"] = held["forward"], above


def _activated(backbone: nn.Module, spec: BackboneSpec) -> list[nn.Module]:
    """The modules of all blocks whose activation can be exchanged."""
    modules = []
    for index, (kind, block) in enumerate(spec.block_list(backbone)):
        name = None if kind.mlp is None else kind.mlp.activated
        if name is None:
            raise UnsupportedBackboneError(
                f"The adapter brings an activation, but the spec {spec.name!r} names no module that has one to exchange; fill "
                "in `mlp.activated`."
            )
        try:
            module = block.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, GELU):
            raise UnsupportedBackboneError(
                f"{name!r} of block {index} is {'missing' if module is None else 'a ' + type(module).__name__}; only the "
                "activation of diffusers' GELU class can be exchanged. Correct `mlp.activated` in the spec "
                f"{spec.name!r}."
            )
        modules.append(module)
    return modules


def _embedder(backbone: nn.Module, spec: BackboneSpec, path: str) -> nn.Module:
    try:
        return backbone.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedBackboneError(
            f"{type(backbone).__name__} has no {path!r}, which its spec {spec.name!r} names; correct the spec."
        ) from error


def _listen(backbone: nn.Module, routed: Routed, path: str, field: str) -> None:
    _register(_embedder(backbone, routed.spec, path), EmbeddingHook(routed, field))


def _dense_state_dict(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """The backbone's own save_pretrained writes its own weights: no routers, no folded deltas."""
    for key in [key for key in state if key.startswith(f"{prefix}{NAME}.")]:
        del state[key]
    routed = getattr(module, NAME, None)
    if routed is not None and routed.folded is not None:
        for name, weight in routed.folded.originals().items():
            for key in (f"{prefix}{name}.weight", f"{prefix}{name}.base_layer.weight"):
                if key in state:
                    state[key] = weight


def _before_load(module: nn.Module, *_: Any) -> None:
    """Weights are loaded over the backbone's own, not over the folded ones."""
    routed = getattr(module, NAME, None)
    if routed is not None and routed.folded is not None:
        routed.folded.apply(False)


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """A dense state dict loads into an attached backbone: our parameters are not part of it; deltas are folded anew."""
    # The keys carry the prefix of whatever module the backbone is part of.
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if f".{NAME}." not in f".{k}"]
    routed = getattr(module, NAME, None)
    if routed is not None and routed.deltas:
        routed.set_deltas(module, routed.deltas)


def _drop_empty_registries(backbone: nn.Module) -> None:
    for module in backbone.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and not registry.hooks:
            del module._diffusers_hook
            # The registry leaves a bound copy of the class's forward on the instance.
            forward = module.__dict__.get("forward")
            if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
                del module.forward
