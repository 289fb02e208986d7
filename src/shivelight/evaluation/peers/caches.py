"""What the caches that come with diffusers have in common: its own hooks, run on any backbone whose blocks they understand.

They ask for a `cache_context` around each call of the backbone. FLUX's, Qwen-Image's and Wan's pipelines open one; for all
others, and for bare loops, one is opened here, named by the guidance branch of the call, and the state is forgotten where a
generation begins. Two things are added, and taken away again: what diffusers' registry must know of a block (from our spec), and
text for the last block of SD3, which gives None for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from torch import nn

from shivelight.backbones.spec import BlockSpec
from shivelight.evaluation.peers.ground import Ground, Passes, unchanged
from shivelight.execution.call import BlockCall

_APPLY: dict[type, Callable[[nn.Module, Any], None]] = {
    FirstBlockCacheConfig: apply_first_block_cache,
    MagCacheConfig: apply_mag_cache,
    TaylorSeerCacheConfig: apply_taylorseer_cache,
}


def check_stack(ground: Ground, method: str) -> None:
    """Raises where diffusers' hooks would misread the blocks.

    Raises:
        ShivelightError: with the reason.
    """
    kinds = [kind for kind, _ in ground.blocks]
    for kind in kinds:
        if kind.path not in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS:
            raise ground.refuse(method, f"diffusers' hooks do not look for blocks in {kind.path!r}")
        if kind.image_argument != "hidden_states":
            raise ground.refuse(method, f"diffusers' hooks read hidden_states, its blocks {kind.image_argument!r}")
    if kinds[0].joined != kinds[-1].joined:
        raise ground.refuse(
            method, "its last blocks hold text and image joined, which diffusers' hooks compare with its first"
        )


@contextmanager
def cached(
    ground: Ground, config: Any, decide: Callable[[list[ModelHook], int], None] | None = None
) -> Iterator[list[ModelHook]]:
    """A cache of this config on the backbone.

    Args:
        ground: of the backbone.
        config: FirstBlockCacheConfig, MagCacheConfig or TaylorSeerCacheConfig.
        decide: told the cache's hooks and the step before each call, for forced patterns.

    Yields:
        The hooks of the cache.
    """
    with unchanged(ground.backbone), ExitStack() as stack:
        stack.enter_context(_described(ground))
        _fill_text(ground)
        others = set(_hooks(ground.backbone))
        _APPLY[type(config)](ground.backbone, config)
        HookRegistry.check_if_exists_or_initialize(ground.backbone).invalidate_child_registries_cache()
        hooks = [hook for hook in _hooks(ground.backbone) if hook not in others]
        managers = list(
            {id(m): m for hook in hooks for m in vars(hook).values() if isinstance(m, StateManager)}.values()
        )
        passes, opened = Passes(ground), False

        def begin(fresh: bool) -> None:
            nonlocal opened
            for manager in managers if fresh else ():
                context = manager._context  # a pipeline may have opened it already
                manager.reset()
                manager.set_context(context)
            opened = any(manager._context is None for manager in managers)
            if opened:
                for manager in managers:
                    manager.set_context(CacheContext(passes.branch))
            if decide is not None:
                decide(hooks, passes.context.step)

        def end() -> None:
            for manager in managers if opened else ():
                manager.set_context(None)

        stack.enter_context(passes.followed(begin, end))
        yield hooks


def _hooks(model: nn.Module) -> list[ModelHook]:
    registries = (module.__dict__.get("_diffusers_hook") for module in model.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


@contextmanager
def _described(ground: Ground) -> Iterator[None]:
    """What diffusers' registry does not know of the blocks is told it, from their specs, for a while."""
    TransformerBlockRegistry._register()
    known, told = TransformerBlockRegistry._registry, []
    for kind, block in ground.blocks:
        if type(block) not in known:
            text = kind.returns.index("text") if "text" in kind.returns else None
            TransformerBlockRegistry.register(
                type(block), TransformerBlockMetadata(kind.returns.index("image"), text, kind.image_argument)
            )
            told.append(type(block))
    try:
        yield
    finally:
        for cls in told:
            del known[cls]


class _TextHook(ModelHook):
    """On a last block that gives None for the text: gives the text it was given, which nothing reads."""

    def __init__(self, kind: BlockSpec) -> None:
        super().__init__()
        self.kind = kind

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's own, completed."""
        call = BlockCall(self.kind, args, kwargs)
        image, text = call.split(self.fn_ref.original_forward(*args, **kwargs))
        return call.join(image, call.text if text is None else text)


def _fill_text(ground: Ground) -> None:
    kind, block = ground.blocks[-1]
    if "text" in kind.returns and getattr(block, "context_pre_only", False):
        HookRegistry.check_if_exists_or_initialize(block).register_hook(_TextHook(kind), "shivelight_peer_text")
