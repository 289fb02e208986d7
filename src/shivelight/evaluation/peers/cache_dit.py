"""DBCache (Dual Block Cache), as the package cache-dit runs it (https://github.com/vipshop/cache-dit), if it is installed.

The first F blocks always run; while what they add has moved by less than a threshold, the others rest and add what they last did.
The package chooses how a family's blocks are called, and patches the pipeline's class, the backbone and its blocks; it does not
undo all of that where there are other hooks, so everything is put back from notes taken before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Where, block_share, resting, rests

METHOD = "cache-dit"
_CLASS_ATTRIBUTES = ("__call__", "_original_call", "_is_cached")
_PIPELINE_ATTRIBUTES = ("_context_manager", "_context_kwargs")


def cache_dit(where: Where, threshold: float | None = None, *, skip: float | None = None) -> OperatingPoint:
    """DBCache with F = a quarter of the blocks, at most 8, and a quarter of the steps, at most 8, to warm up; what else is the
    package's default.

    Args:
        where: a comparison or a bare loop.
        threshold: of the residual's change; the package's default is 0.08.
        skip: instead of a threshold, the share of steps at which the others rest, by the package's static mask of steps.

    Raises:
        ShivelightError: the package is not installed, or does not know the backbone.
    """
    ground = Ground(where)
    package = _package()
    target = ground.backbone if ground.bare else ground.pipe
    if not package.BlockAdapterRegister.is_supported(target):
        _check_described(ground, target)
    first = min(8, max(1, len(ground.blocks) // 4))
    options: dict[str, Any] = {"Fn_compute_blocks": first, "max_warmup_steps": min(8, max(1, ground.steps // 4))}
    if skip is not None:
        mask = [0 if rests(step, skip) else 1 for step in range(ground.steps)]
        options |= {"max_warmup_steps": 0, "steps_computation_mask": mask, "steps_computation_policy": "static"}
    elif threshold is not None:
        options["residual_diff_threshold"] = threshold
    else:
        raise ShivelightError("DBCache needs a threshold, or a share of steps to skip.")
    if ground.bare:  # no guidance, whatever the family's pipelines do
        options |= {"enable_separate_cfg": False, "num_inference_steps": ground.steps}

    @contextmanager
    def state() -> Iterator[None]:
        def begin(fresh: bool) -> None:
            if fresh and ground.bare:  # a pipeline's call does so itself
                package.refresh_context(ground.backbone)

        with _as_it_was(ground, target), Passes(ground).followed(begin):
            known = package.BlockAdapterRegister.is_supported(target)
            applied = target if known else _described(ground, package)
            package.enable_cache(applied, cache_config=package.DBCacheConfig(**options))
            yield

    if skip is None:
        return ground.point(METHOD, {"threshold": threshold or 0.0}, state)
    return ground.point(METHOD, {"skip": skip}, state, _plan(ground, first, skip))


def _package() -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported; it tells every step it takes
    try:
        import cache_dit as package
    except ImportError as error:
        raise ShivelightError(
            f"{METHOD} is not installed ({error}): pip install 'shivelight[peers]', or leave this peer out."
        ) from error
    return package


def _check_described(ground: Ground, target: Any) -> None:
    """Of some families (SD3) the package knows the pipeline alone; a backbone is then described to it, where that can be done."""
    kind = ground.blocks[0][0]
    if not ground.bare or len(ground.spec.blocks) > 1 or kind.joined or kind.image_argument != "hidden_states":
        raise ground.refuse(METHOD, f"the package does not know {type(target).__name__}")


def _described(ground: Ground, package: Any) -> Any:
    kind = ground.blocks[0][0]
    patterns = package.ForwardPattern
    pattern = {
        ("image",): patterns.Pattern_3,
        ("image", "text"): patterns.Pattern_0,
        ("text", "image"): patterns.Pattern_1,
    }
    blocks = ground.backbone.get_submodule(kind.path)
    return package.BlockAdapter(transformer=ground.backbone, blocks=blocks, forward_pattern=pattern[kind.returns])


def _plan(ground: Ground, first: int, skip: float) -> Callable[[tuple[int, int]], float]:
    """Where streams are joined halfway, the package caches both halves of the stack for themselves."""
    paths = [kind.path for kind, _ in ground.blocks]
    halves = paths if any(kind.joined for kind, _ in ground.blocks) else [""] * len(paths)
    others = [index for index, half in enumerate(halves) if index - halves.index(half) >= first]
    return lambda shape: 1.0 - block_share(ground, others, shape) * resting(ground.steps, skip) / ground.steps


@contextmanager
def _as_it_was(ground: Ground, target: Any) -> Iterator[None]:
    """Attributes of all modules of the backbone, the backbone's children, and what the package sets on the pipeline and its class
    are put back."""
    before = [(module, dict(module.__dict__)) for module in ground.backbone.modules()]
    children: dict[str, nn.Module | None] = dict(ground.backbone._modules)
    cls = type(target)
    known = {name: cls.__dict__[name] for name in _CLASS_ATTRIBUTES if name in cls.__dict__}
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        ground.backbone._modules.clear()
        ground.backbone._modules.update(children)
        if not isinstance(target, nn.Module):
            for name in _PIPELINE_ATTRIBUTES:
                target.__dict__.pop(name, None)
            for name in _CLASS_ATTRIBUTES:
                if name in known:
                    setattr(cls, name, known[name])
                elif name in cls.__dict__:
                    delattr(cls, name)


def cache_dit_points(ground: Ground) -> list[OperatingPoint]:
    """The package's default threshold and two above it; three shares of steps where weights are random."""
    if ground.bare:
        return [cache_dit(ground.where, skip=skip) for skip in (0.25, 0.5, 0.75)]
    return [cache_dit(ground.where, threshold) for threshold in (0.08, 0.16, 0.32)]
