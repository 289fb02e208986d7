"""Peers whose cost is known before sampling: blocks left out, and fewer steps, against models that simply lack them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peering import STEPS, attributes, bare, captions, compared
from torch import Tensor

import shivelight as sl
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.peers import fewer_steps, interval_cache, peer_points, placed_steps, static_drop
from shivelight.evaluation.peers.ground import Ground
from shivelight.evaluation.peers.static_drop import block_influence, spread


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_dropped_blocks_are_as_good_as_deleted(name: str) -> None:
    loop = bare(name)
    before, dense = attributes(loop.transformer), loop()
    point = static_drop(loop, 2)
    with point.state():
        dropped = loop()
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before
    blocks = list(loop.transformer.transformer_blocks)
    del blocks[1:3]
    loop.transformer.transformer_blocks = torch.nn.ModuleList(blocks)
    assert torch.equal(loop(), dropped) and not torch.equal(dropped, dense)


def test_those_that_turn_their_input_least_go_first() -> None:
    comparison = compared("sd3")
    blocks = list(comparison.backbone.transformer_blocks)
    with torch.no_grad():  # the second block adds next to nothing, since its gates are closed
        blocks[1].norm1.linear.weight.mul_(0.1)
        blocks[1].norm1.linear.bias.mul_(0.1)
    inputs: dict[int, list[Tensor]] = {index: [] for index in range(len(blocks))}
    ends: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda m, a, k, i=index: inputs[i].append(k["hidden_states"]), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    handles.append(blocks[-1].register_forward_hook(lambda m, a, o: ends.append(o[1])))
    comparison.pictures(comparison.dense(), [comparison.any])
    for handle in handles:
        handle.remove()
    states = [torch.stack(inputs[index]).double() for index in inputs] + [torch.stack(ends).double()]
    expected = [
        float(1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())
        for x, y in zip(states, states[1:], strict=False)
    ]
    influence = block_influence(Ground(comparison))
    assert influence == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert influence[1] == min(influence)
    inner = sorted(range(1, len(blocks) - 1), key=lambda index: expected[index])
    point, drawn = static_drop(comparison, 1), captions("sd3")
    assert torch.equal(
        comparison.pictures(point, drawn), comparison.pictures(static_drop(comparison, 1, inner[:1]), drawn)
    )


def test_without_data_they_are_evenly_spread() -> None:
    assert spread([1, 2, 3, 4, 5, 6, 7]) == [4, 2, 6, 1, 3, 5, 7] and spread([]) == []
    with pytest.raises(sl.ShivelightError, match="static-drop cannot run on DiTTransformer2DModel: 3 of its 2 blocks"):
        static_drop(bare("dit"), 3)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2"])
def test_the_interval_cache_adds_what_the_stack_last_added(name: str) -> None:
    """At rest the picture that enters the head is that of the last run, moved by what the input has moved."""
    loop = bare(name)
    head, starts, ends = loop.transformer.norm_out, [], []
    first = loop.transformer.transformer_blocks[0]

    def entered(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        starts.append(kwargs["hidden_states"])

    handles = [
        first.register_forward_pre_hook(entered, with_kwargs=True),
        head.register_forward_pre_hook(lambda m, args: ends.append(args[0])),
    ]
    with interval_cache(loop, 2 / 3).state():
        loop()
    for handle in handles:
        handle.remove()
    assert len(starts) == len(ends) == STEPS
    for step in range(STEPS):
        run = 3 * (step // 3)
        torch.testing.assert_close(ends[step] - starts[step], ends[run] - starts[run], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ends[3] - starts[3], ends[0] - starts[0], atol=1e-4)


def test_fewer_steps_of_a_loop() -> None:
    loop = bare("dit")
    shorter = BareLoop(loop.transformer, 2, 16, 8, 3)
    point = fewer_steps(loop, 3)
    with point.state():
        assert torch.equal(loop(), shorter())
    assert loop.steps == STEPS and point.name == "fewer-steps 3 steps"
    points, _ = peer_points(compared("sd3"), ["fewer-steps"])
    assert [(point.method, point.steps) for point in points] == [
        ("fewer-steps", 6),
        ("fewer-steps", 4),
        ("fewer-steps", 2),
    ]


def test_placed_steps_leave_noise_levels_out() -> None:
    comparison, runs = compared("sd3"), (0, 2, 5)
    scheduler, first = comparison.pipe.scheduler, [comparison.any]
    point = placed_steps(comparison, runs)
    assert point.name == "fewer-steps-placed 3 steps" and comparison.planned(point) == 3 / STEPS
    drawn = comparison.pictures(point, first)
    with point.state():  # any other number of steps is as it was
        assert torch.equal(comparison.call(first, STEPS), comparison.pictures(comparison.dense(), first))
    assert "set_timesteps" not in vars(scheduler)
    scheduler.set_timesteps(STEPS)
    levels = scheduler.sigmas[list(runs)].tolist()
    setting = comparison.setting
    comparison.setting = replace(setting, options=setting.options | {"sigmas": levels})
    torch.testing.assert_close(drawn, comparison.pictures(comparison.dense(3), first), atol=1e-6, rtol=0)
    comparison.setting = setting
    assert not torch.allclose(drawn, comparison.pictures(comparison.dense(3), first), atol=1e-3)
    points, _ = peer_points(comparison, ["placed-steps"])
    assert [(point.method, point.steps) for point in points] == [("fewer-steps-placed", steps) for steps in (6, 4, 2)]


def test_placed_steps_are_refused() -> None:
    comparison = compared("sd3")
    with pytest.raises(
        sl.ShivelightError, match=r"runs is \(1, 2\); give ascending steps below 8, the first of them 0"
    ):
        placed_steps(comparison, (1, 2))
    with pytest.raises(sl.ShivelightError, match="below 8"):
        placed_steps(comparison, (0, 8))
    assert "says no more than fewer-steps" in peer_points(bare("dit"), ["placed-steps"])[1][0]
    comparison.pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(sl.ShivelightError, match="fewer-steps-placed cannot run .*not of DPMSolverMultistep"):
        placed_steps(comparison, (0, 1))
