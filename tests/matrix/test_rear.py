"""Steps at rest at which the last blocks run on all tokens, in every family: as the backbone's own blocks would do, were what the
first make given to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import close, counted_beyond_half
from taping import taped
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import find_spec

STEPS, RUNS = 4, (0, 2)


def rearwards(pipe: Any, compute: float = 0.68, **reuse: Any) -> Any:
    """Two of four steps run, and the last blocks at another."""
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis="blocks", partial="rear", **reuse))
    return routed_of(pipe)


class Given:
    """Hooks on a dense backbone by which some blocks put out, in their pass of one step, what they put out in that of another."""

    def __init__(self, model: nn.Module, passes: int, swaps: dict[int, tuple[int, int]]) -> None:
        """swaps: {step: (block, step whose output it is)}."""
        self.blocks = [block for _, block in find_spec(model).block_list(model)]
        self.passes, self.swaps = passes, swaps
        self.kept: dict[tuple[int, int, int], Any] = {}
        self.seen = [0] * len(self.blocks)
        for place, block in enumerate(self.blocks):
            block.register_forward_hook(lambda module, args, output, place=place: self._put(place, output))

    def _put(self, place: int, output: Any) -> Any:
        step, call = divmod(self.seen[place], self.passes)
        self.seen[place] += 1
        self.kept[step, call, place] = output
        block, other = self.swaps.get(step, (-1, -1))
        return self.kept[other, call, place] if place == block else None


@pytest.mark.parametrize("guided", [False, True])
def test_it_is_what_the_blocks_make_of_the_first_ones_last_output(name: str, guided: bool) -> None:
    pipe, call = build(name), FAMILIES[name]
    options = call.guided if guided else call.unguided
    routed = rearwards(pipe)
    drawn = call(pipe, 0, 1, steps=STEPS, **options)
    rear = next(rear for rear in range(len(routed.routed) - 1, 0, -1) if _costs(routed, rear) <= 0.68)
    sl.detach(pipe)
    counted: list[int] = []
    handle = pipe.transformer.register_forward_hook(lambda *_: counted.append(1))
    call(pipe, 0, 1, steps=STEPS, **options)
    handle.remove()
    passes = len(counted) // STEPS
    last = len(find_spec(pipe.transformer).block_list(pipe.transformer)) - 1
    Given(pipe.transformer, passes, {1: (last - rear, 0), 3: (last, 2)})
    close(drawn, call(pipe, 0, 1, steps=STEPS, **options))


def _costs(routed: Any, rear: int) -> float:
    tokens, text = routed.shape
    dense, always = routed.planner.dense_flops(tokens, text)
    assert always == 0
    own = sum(routed.planner.costs[block].flops(tokens, text) for block in routed.routed[-rear:])
    return float((2 * dense + own) / (STEPS * dense))


def test_it_costs_what_is_planned_and_what_torch_counts(name: str) -> None:
    pipe = build(name)
    rearwards(pipe)
    counted_beyond_half(pipe, name, STEPS, 0.68)


def test_maps_are_fitted_saved_replayed_and_a_batch_is_its_samples(name: str, tmp_path: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    routed, fitting = rearwards(pipe, 1.0), []
    (found,) = sl.fit_stand_ins(
        pipe, generate=lambda: fitting.append(call(pipe, 1, 2, steps=STEPS)), computes=(0.68,), rank=2
    )
    assert found.plan.key[:3] == (STEPS, RUNS, 1) and found.plan.rear and 0.5 < found.compute < 1
    sl.set_budget(pipe, compute=found.compute)  # what is said to ask for
    drawn = call(pipe, 0, steps=STEPS)
    close(call(pipe, 1, 2, steps=STEPS), fitting[0])  # walked as it will be
    call(pipe, 0, steps=STEPS)
    assert routed.spending.ratio == pytest.approx(sl.planned_ratio(pipe, STEPS)) and routed.spending.ratio > 0.55
    assert f"2 and {found.plan.rear} blocks of 4" in sl.summary(pipe)
    sl.save_adapter(pipe, tmp_path)
    sl.detach(pipe)
    sl.load_adapter(pipe, tmp_path)
    sl.set_budget(pipe, compute=found.compute)
    assert torch.equal(call(pipe, 0, steps=STEPS), drawn)
    close(call(pipe, 0, 1, steps=STEPS)[:1], drawn)
    taped(pipe)
    for _ in range(3):
        assert torch.equal(call(pipe, 0, steps=STEPS), drawn)
    routed_of(pipe).replays = None
    own = routed_of(pipe).stand_ins.find(found.plan, 1, 0)
    with torch.no_grad():
        own.bias.copy_(torch.linspace(-1, 1, len(own.bias)))  # a norm takes no notice of what all channels share
    moved: Tensor = call(pipe, 0, steps=STEPS)
    assert not torch.allclose(moved, drawn, atol=1e-3)
    for place in routed_of(pipe).stand_ins.maps.values():
        place.weaken(0.0)
    rested = call(pipe, 0, steps=STEPS)
    sl.detach(pipe)
    rearwards(pipe, found.compute)
    close(rested, call(pipe, 0, steps=STEPS))  # what adds nothing to the last output is none
