"""Guidance in one batch, in two calls and in the pipelines' own way; and generations that someone stopped."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import TOKENS, close, decided, free, gated, kept, of_samples, one_batch, run, widths_of

import shivelight as sl
from shivelight.backbones import find_spec


def guided_both_ways(model: Any, call: dict[str, Any]) -> None:
    """A batch of [unconditional; conditional] halves is the conditional call, then the unconditional one, which left to itself
    would choose otherwise."""
    with sl.branch(model, "both"):
        batched = run(model, call)
    with sl.branch(model, "cond"):
        cond = run(model, of_samples(call, 4, 2, 3))
    with sl.branch(model, "uncond"):
        uncond = run(model, of_samples(call, 4, 0, 1))
    close(batched, torch.cat([uncond, cond]))
    assert not torch.allclose(run(model, of_samples(call, 4, 0, 1)), uncond, atol=1e-3)


def four_samples(pipe: Any, name: str) -> dict[str, Any]:
    first, second = one_batch(pipe, name, 0, 1), one_batch(pipe, name, 2, 0)

    def both(key: str) -> Any:
        one, other = first[key], second[key]
        if isinstance(one, torch.Tensor) and one.ndim and len(one) == 2:
            return torch.cat([one, other])
        return one + other if isinstance(one, list) and len(one) == 2 else one

    return {key: both(key) for key in first}


def test_batched_guidance_is_split_guidance_for_blocks_and_widths(name: str) -> None:
    pipe = build(name)
    call = four_samples(pipe, name)
    for seed in range(9):  # until random routers tell the samples apart
        seen = decided(gated(pipe.transformer, reuse=False, seed=seed, widths=widths_of(name)))
        run(pipe.transformer, call)
        if any(samples[:2] != samples[2:] for _, _, samples in seen):
            break
    guided_both_ways(pipe.transformer, call)


@pytest.mark.parametrize("name", TOKENS)
def test_batched_guidance_is_split_guidance_for_tokens(name: str) -> None:
    pipe = build(name)
    call = four_samples(pipe, name)
    kept(pipe.transformer)
    guided_both_ways(pipe.transformer, call)


def test_the_conditional_branch_decides_for_both(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    guidance = find_spec(pipe.transformer).guidance
    if guidance == "none":
        pytest.skip("its pipelines do not say that they guide: each sample decides for itself")
    if not call.guided:
        pytest.skip("its pipeline runs one pass a step: guidance is distilled into the backbone")
    routed = gated(pipe, widths=widths_of(name))
    seen = decided(routed)
    call(pipe, 0, 1, **call.guided)
    if guidance == "batched":
        assert len(seen) == 6 * len(routed.routed)
        pairs = [(samples[:2], samples[2:]) for _, _, samples in seen]
    else:
        assert len(seen) == 2 * 6 * len(routed.routed)
        first = {(step, block): samples for step, block, samples in reversed(seen)}
        last = {(step, block): samples for step, block, samples in seen}
        pairs = [(first[place], last[place]) for place in first]
    assert all(one == other for one, other in pairs)
    assert len({samples for one, _ in pairs for samples in one}) > 1


class Stopped(Exception):
    pass


def in_mid_pass(pipe: Any, run: Callable[..., object]) -> None:
    """A failure in the middle of a pass, as when memory runs out: at the fifth time that any block attends."""
    seen = []

    def fail(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 5:
            raise Stopped

    handles = []
    for _, block in find_spec(pipe.transformer).block_list(pipe.transformer):
        attention = next(part for part in block.modules() if "Attention" in type(part).__name__)
        handles.append(attention.register_forward_hook(fail))
    with pytest.raises(Stopped):
        run()
    for handle in handles:
        handle.remove()


def by_callback(pipe: Any, run: Callable[..., object]) -> None:
    """The user's callback raises."""

    def raising(*state: Any) -> dict[str, Any]:
        if state[-3] == 1:
            raise Stopped
        return state[-1]

    parameters = inspect.signature(type(pipe).__call__).parameters
    place = next((place for place in ("callback_on_step_end", "callback") if place in parameters), None)
    if place is not None:
        with pytest.raises(Stopped):
            run(**{place: raising})


def quietly(pipe: Any, run: Callable[..., object]) -> None:
    """The pipeline's own way to stop early."""

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return tensors

    if hasattr(type(pipe), "interrupt"):
        run(callback_on_step_end=stop)


WAYS: dict[str, Callable[[Any], Any]] = {
    "blocks": free,
    "gates": lambda pipe: gated(pipe, widths=widths_of(find_spec(pipe.transformer).name)),
    "tokens": lambda pipe: sl.attach(pipe, sl.RoutingConfig.training_free(0.5)),
    "learned tokens": kept,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_does_not_depend_on_one_that_was_stopped(name: str, way: str) -> None:
    if "tokens" in way and name not in TOKENS:
        return  # its tokens are refused, which a test of its own shows
    pipe, call = build(name), FAMILIES[name]
    WAYS[way](pipe)
    alone = call(pipe, 0, steps=4)
    for stop in (in_mid_pass, by_callback, quietly):
        stop(pipe, lambda **options: call(pipe, 1, steps=5, **options))
        assert torch.equal(call(pipe, 0, steps=4), alone), stop.__name__
