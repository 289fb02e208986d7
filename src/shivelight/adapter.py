"""The verbs: attach and detach, budgets, summaries, and adapters on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.hooks.hooks import HookFunctionReference
from diffusers.models.activations import GELU
from torch import nn

from shivelight.backbones import BackboneSpec, find_spec
from shivelight.config import UNTRAINED, RoutingConfig
from shivelight.errors import AdapterError, BudgetError, ShivelightError, UnsupportedBackboneError
from shivelight.execution.context import GRID, Branch, is_set
from shivelight.execution.folding import Delta
from shivelight.execution.hook import ActivationHook, BlockHook, EmbeddingHook, RootHook, refuse_parallel
from shivelight.execution.planning import Budget
from shivelight.execution.routed import NAME, Routed
from shivelight.routing import Schedule

# What enable_layerwise_casting leaves alone, in diffusers' models.
_NEVER_CAST = "_skip_layerwise_casting_patterns"


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
    _refuse_unsupported(backbone)
    if config.tokens is not None and spec.no_tokens:
        raise UnsupportedBackboneError(
            f"The tokens of a {type(backbone).__name__} cannot be routed. {spec.no_tokens} Route its blocks: "
            "RoutingConfig(tokens=None, blocks=BlockRouting())."
        )
    if config.activation is not None:
        _activated(backbone, spec)
    for path in (spec.timestep_embedding, spec.condition_embedding):
        if path is not None:
            _embedder(backbone, spec, path)
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
    if (device := _onload_device(backbone)) is not None:
        routed.to(device)
    backbone.add_module(NAME, routed)
    _register_hooks(backbone, routed, routed.spec)


def detach(model: Any) -> Any:
    """Take everything off again: weights, hooks and keys are exactly as before. Harmless where nothing is attached."""
    backbone, _ = _backbone_of(model)
    routed = routed_of(backbone, missing_ok=True)
    if routed is None:
        return model
    routed.enable(False)
    for module in backbone.modules():
        if "_diffusers_hook" in module.__dict__:
            with _below_accelerate(module):
                module._diffusers_hook.remove_hook(NAME, recurse=False)
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
    return model


def _onload_device(backbone: nn.Module) -> torch.device | None:
    """Where the parts of a backbone under group offloading run: what is attached later must be there by itself."""
    for module in backbone.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook(_GROUP_OFFLOADING)
        if hook is not None:
            return hook.config.onload_device
    return None


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


def set_budget(
    model: Any,
    *,
    keep: float | None = None,
    compute: float | None = None,
    threshold: float | None = None,
    cap: bool = False,
) -> Any:
    """Bound what every generation from now on may cost; no retraining.

    Args:
        model: an attached pipeline or transformer.
        keep: mean token keep ratio over steps and routed blocks, in (0, 1]; 1.0 runs all tokens.
        compute: mean share of the dense blocks' FLOPs, in (0, 1], over all that is routed; gates and widths, which samples
            decide for themselves, are set so that it is met on average (by what the routers said in training).
        threshold: E-DiT's own knob, alone or with `keep`: blocks run where their router's probability is at least this.
        cap: with `compute`: no sample exceeds it, at the price of what its late steps would have run.

    Raises:
        BudgetError: neither or both of keep and compute, out of range, or not reachable; the message says the nearest that is.
    """
    routed = routed_of(model)
    budget = _budget(keep, compute, threshold, cap)
    if routed.config.tokens is None and routed.config.blocks is None and not budget.everything:
        raise BudgetError("The attached adapter has no routing, so it always runs everything: keep=1.0.", nearest=1.0)
    if routed.config.tokens is None and budget.kind == "keep" and budget.value < 1:
        raise BudgetError("The attached adapter routes no tokens; bound it by compute= or threshold=.", nearest=1.0)
    if routed.gates is None and (budget.threshold is not None or budget.cap):
        raise BudgetError("The attached adapter has no block routers: threshold= and cap=True are about those.")
    if budget.cap and routed.clock.pipeline is None:
        raise BudgetError(
            "cap=True bounds a whole generation, and a bare transformer does not know where one begins. Attach to the pipeline."
        )
    if routed.routed:
        # Raises if it cannot be reached. The length of the text is known once a picture was made; until then, the least.
        tokens, text_tokens = routed.shape
        # What goes by earlier steps has none at the first; how many will follow is not known here.
        steps = (500.0,) * (1 if routed.config.blocks is None else 50)
        routed.planned_ratio(steps, tokens, text_tokens if routed.shape_seen else 0, budget)
    routed.budget = budget
    return model


def _budget(keep: float | None, compute: float | None, threshold: float | None, cap: bool) -> Budget:
    if threshold is not None and keep is None and compute is None:
        keep = 1.0
    if (keep is None) == (compute is None):
        raise BudgetError("Give exactly one of keep= and compute=, for example set_budget(model, keep=0.6).")
    if compute is None:
        if cap:
            raise BudgetError("cap=True bounds compute=; give that one.")
        return Budget("keep", keep, threshold)  # type: ignore[arg-type]
    if threshold is not None:
        raise BudgetError("compute= chooses the threshold itself; give threshold= alone or with keep=.")
    return Budget("compute", compute, cap=cap)


def current_schedule(model: Any, steps: int | None = None) -> Schedule:
    """The integers that a generation follows: kept tokens per step and routed block.

    Args:
        model: an attached pipeline or transformer with token routing.
        steps: number of sampling steps; the scheduler's current timesteps (else the 1000-point grid) by default.
    """
    routed = routed_of(model)
    if routed.config.tokens is None:
        raise BudgetError("The attached adapter has no token routing, so there is no schedule.")
    return routed.schedule(routed.request(_timesteps(routed, steps), *routed.shape))


def _timesteps(routed: Routed, steps: int | None) -> tuple[float, ...]:
    """Those of the next generation, of this many steps or as the scheduler holds them."""
    scheduler = getattr(routed.clock.pipeline, "scheduler", None)
    if steps is not None:
        if scheduler is None:
            raise BudgetError("A bare transformer has no sampling steps; attach to the pipeline, or leave `steps` out.")
        probe = type(scheduler).from_config(scheduler.config)
        probe.set_timesteps(steps)
        return tuple(float(t) for t in probe.timesteps.tolist())
    if scheduler is not None and is_set(scheduler):
        begin = getattr(scheduler, "begin_index", None) or 0
        return tuple(float(t) for t in scheduler.timesteps[begin:].tolist())
    return GRID


def planned_ratio(model: Any, steps: int | None = None) -> float | None:
    """Planned FLOPs of the next generation over those of the dense blocks.

    With gates, as expected from their records; None where there are none (weights of others at a threshold of their own).
    """
    routed = routed_of(model)
    return routed.planned_ratio(_timesteps(routed, steps), *routed.shape) if routed.routed else 1.0


def summary(model: Any) -> str:
    """What is attached, how large it is, and what it is expected to cost."""
    backbone, _ = _backbone_of(model)
    routed = routed_of(backbone)
    own = sum(p.numel() for p in routed.parameters()) + sum(
        t.numel() for delta in routed.deltas.values() for t in (delta.down, delta.up, delta.magnitude)
    )
    whole = sum(p.numel() for p in backbone.parameters()) - sum(p.numel() for p in routed.parameters())
    lines = [
        f"{type(backbone).__name__} ({routed.spec.name}), {len(routed.planner.costs)} blocks, {whole / 1e6:.1f} M parameters",
        f"adapter: {own / 1e6:.3f} M parameters ({100 * own / whole:.2f}% of the backbone), "
        f"{len(routed.deltas)} linears with DoRA deltas",
    ]
    if routed.config.activation is not None:
        lines.append(f"activation of the image MLPs: {routed.config.activation}, also while dense")
    if not routed.routed:
        return "\n".join([*lines, "no routing: every token runs in every block"])
    tokens, blocks, reuse, budget = routed.config.tokens, routed.config.blocks, routed.config.reuse, routed.budget
    lines.append(f"routed blocks: {routed.routed[0]} to {routed.routed[-1]}")
    if tokens is not None:
        lines.append(f"tokens: scores {tokens.scores}, ratios {tokens.ratios}, guidance {tokens.cfg_scores}")
    if blocks is not None:
        lines.append(
            f"blocks: {UNTRAINED[blocks.router]}"
            if routed.gates is None
            else f"blocks: {blocks.router} routers decide by {blocks.decide}, guidance {blocks.cfg_gates}; MLP widths "
            f"{', '.join(f'{width:g}' for width in blocks.widths)}; {routed.gates.records.filled} records"
        )
    if reuse is not None:
        lines.append(
            f"reuse: residuals up to {reuse.max_age} steps old, warm-up of {reuse.warmup:.0%} of the steps, forecasts between "
            f"runs less than {reuse.forecast:.0%} of the steps apart; "
            f"{routed.residuals.megabytes:.1f} MB held of at most {reuse.max_cache_mb:g}"
        )
    gates = "" if budget.threshold is None else f", threshold = {budget.threshold}"
    planned = planned_ratio(backbone)
    known = "unknown (no statistics of the routers)" if planned is None else f"{planned:.4f} of dense"
    lines += [
        f"budget: {budget.kind} = {budget.value}{gates}{' (hard cap)' if budget.cap else ''}",
        f"planned FLOPs: {known}, at {routed.shape[0]} image and {routed.shape[1]} text tokens"
        + ("" if routed.shape_seen else " (assumed until the first picture)"),
    ]
    if routed.spending.ratio is not None:
        acted = ", ".join(f"{action} {count}" for action, count in routed.spending.actions.items() if count)
        lines.append(f"realised by the last generation: {routed.spending.ratio:.4f} of dense ({acted})")
    if tokens is not None:
        lines.append(f"schedule: {current_schedule(backbone)}")
    return "\n".join(lines)


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


def _refuse_unsupported(backbone: nn.Module) -> None:
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


def _register(module: nn.Module, hook: ModelHook) -> HookRegistry:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _below_accelerate(module):
        registry.register_hook(hook, NAME)
    return registry


@contextmanager
def _below_accelerate(module: nn.Module) -> Iterator[None]:
    """Hooks that come or go inside do so below accelerate's (enable_model_cpu_offload), which the pipeline takes off and puts on
    again after every picture, and whatever lay above them with it."""
    above = module.__dict__.get("forward") if "_old_forward" in module.__dict__ else None
    if above is None:
        yield
        return
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward, module.forward = module.forward, above


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
