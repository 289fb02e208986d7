"""Block routing without training: which blocks run, what it costs, and the limits."""

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import guided_walk, tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.reuse import BlockResiduals
from shivelight.execution.stale import run_steps

PROMPTS = ["a red apple", "blue bird"]


def free(pipe: StableDiffusion3Pipeline, compute: float = 0.6, axis: Any = "blocks", **reuse: Any) -> Any:
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=compute, axis=axis, **reuse))
    return routed_of(pipe)


def by(router: Any, pipe: StableDiffusion3Pipeline, compute: float, **reuse: Any) -> Any:
    blocks = sl.BlockRouting(router=router, widths=(1.0,))
    sl.attach(pipe, sl.RoutingConfig(None, blocks, reuse=sl.Reuse(**reuse), compute=compute))
    return routed_of(pipe)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.floats(1.0, 10.0))
def test_intervals_never_shrink_and_fill_the_generation(count: int, steps: int, longest: int, growth: float) -> None:
    steps = max(steps, count)
    longest = max(longest, math.ceil(steps / count))
    runs = run_steps(count, steps, longest, growth)
    intervals = [end - start for start, end in zip(runs, [*runs[1:], steps], strict=True)]
    assert len(runs) == count and runs[0] == 0
    assert intervals == sorted(intervals) and intervals[0] >= 1 and intervals[-1] <= longest
    # No further from even than the growth from first to last makes them, up to rounding.
    mean = steps / count
    assert intervals[-1] <= math.ceil(2 * growth / (1 + growth) * mean) + 1
    assert intervals[0] >= math.floor(2 / (1 + growth) * mean) - 1
    if growth == 1 and longest >= math.ceil(mean):
        assert intervals[-1] - intervals[0] <= 1


@pytest.mark.parametrize(
    ("growth", "runs"), [(1.0, [0, 4, 8, 12, 16, 20]), (2.0, [0, 3, 6, 10, 14, 19]), (3.0, [0, 2, 5, 8, 13, 18])]
)
def test_the_growth_says_how_late_runs_lie(growth: float, runs: list[int]) -> None:
    assert run_steps(6, 24, 24, growth) == runs


@pytest.mark.parametrize("whole", ["output", "residual"])
@pytest.mark.parametrize(("compute", "runs"), [(0.7, [0, 1, 2, 3, 4, 6, 8]), (0.5, [0, 1, 2, 4, 7]), (0.25, [0, 2])])
def test_at_intervals_all_blocks_run_or_none(
    pipe: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch, compute: float, runs: list[int], whole: str
) -> None:
    monkeypatch.setattr(BlockResiduals, "relative_drift", None)  # nothing is read from the device
    routed = free(pipe, compute, forecast=1.0, growth=3.0, whole=whole)
    assert routed.config.reuse is not None
    horizon = routed.config.reuse.horizon(10)
    assert routed.routed == (0, 1, 2, 3)  # the first as well: no router reads what it makes
    known: dict[str, dict[int, Tensor]] = {"image": {}, "text": {}}

    def watch(block: int, x: Tensor, out: Tensor, kept: Any, text: tuple[Tensor, Tensor] | None) -> None:
        step = routed.context.step
        streams = {"image": (x, out)} | ({} if text is None else {"text": text})  # the last block drops the text
        for name, (before, after) in streams.items():
            values = known[name]
            if step in runs and whole == "residual":
                values[step] = values.get(step, 0) + after - before
            elif step in runs:
                values[step] = after
            elif block < 3:
                assert after is before
            elif name == "text" and whole == "output":
                torch.testing.assert_close(after, before)  # the last block makes none, and nothing reads it
            else:  # the last one adds what all of them are expected to, or stands in for them
                *older, at = sorted(values)
                expected = values[at]
                if older:
                    interval = at - older[-1]
                    share = max(0, 1 - interval / horizon) * min(1, (step - at) / interval)
                    expected = expected + share * (expected - values[older[-1]])
                wanted = before + expected if whole == "residual" else expected
                torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
                seen.add((step, name))

    seen: set[tuple[int, str]] = set()
    routed.observer = watch
    walk(pipe, tiny_inputs(2), 10)
    checked = ("image", "text") if whole == "residual" else ("image",)
    assert seen == {(step, name) for step in range(10) if step not in runs for name in checked}
    assert routed.spending.ratio == pytest.approx(len(runs) / 10)
    assert sl.planned_ratio(pipe, 10) == pytest.approx(len(runs) / 10)
    routed.observer = None
    with routed.variant(blocks={"router": "age"}):  # the same request, another plan
        walk(pipe, tiny_inputs(2), 10)
        assert any(0 < sum(row) < 4 for row in routed.spending.map())


def test_an_output_that_changes_evenly_is_forecast_exactly() -> None:
    entry = BlockResiduals(torch.zeros(1, 3, 2), torch.zeros(1, 2, 2), 1e9)
    start, rate = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(5)).unbind()
    for step in (0, 3):
        entry.refresh(start + step * rate, step)
    x, text = torch.full((1, 3, 2), 7.0), torch.ones(1, 2, 2)
    image, kept = entry.stand_in(x, text, 5, max_age=4)
    torch.testing.assert_close(image, start + 5 * rate)
    assert torch.equal(kept, text)  # never made
    image, _ = entry.stand_in(x, text, 8, max_age=4)
    assert torch.equal(image, x)  # too old
    assert entry.reused == [2]


def test_no_residual_serves_longer_than_its_greatest_age(pipe: StableDiffusion3Pipeline) -> None:
    routed = free(pipe, 0.4, max_age=3)
    walk(pipe, tiny_inputs(1), 10)
    assert routed.spending.ratio == pytest.approx(0.4)  # 0, 3, 6, 9 or closer
    with pytest.raises(sl.BudgetError, match=r"4 run everything \(Reuse.max_age\)") as caught:
        sl.set_budget(pipe, compute=0.35)
        walk(pipe, tiny_inputs(1), 10)
    sl.set_budget(pipe, compute=caught.value.nearest)
    walk(pipe, tiny_inputs(1), 10)


def test_the_oldest_residuals_are_made_new_in_the_order_of_the_backbone(
    pipe: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockResiduals, "relative_drift", None)  # nothing is read from the device
    routed = by("age", pipe, 0.6, warmup=0.1, forecast=0.0)
    ran: dict[int, list[int]] = {}

    def watch(block: int, x: Tensor, out: Tensor, kept: Any, text: Any) -> None:
        before = memory.get(block)
        memory[block] = out - x
        if before is None or not torch.allclose(memory[block], before, atol=1e-6):
            ran.setdefault(routed.context.step, []).append(block)

    memory: dict[int, Tensor] = {}
    routed.observer = watch
    walk(pipe, tiny_inputs(1), 12)
    assert ran[0] == [1, 2, 3]
    last = dict.fromkeys(routed.routed, 0)
    for step in range(1, 12):
        waiting = sorted(routed.routed, key=lambda block: (last[block], block))
        now = ran.get(step, [])
        # Block 1 has two attentions and is dearer: where it does not fit, the next ones may go before it.
        cheap = [block for block in waiting if block != 1]
        assert [block for block in cheap if block in now] == cheap[: len([block for block in now if block != 1])]
        last |= dict.fromkeys(now, step)
    assert all(step - last[block] <= 6 for block in routed.routed)


@pytest.mark.parametrize("compute", [0.95, 0.7, 0.6, 0.5])
def test_the_warm_up_leaves_the_later_steps_a_third(pipe: StableDiffusion3Pipeline, compute: float) -> None:
    routed = by("age", pipe, compute)
    walk(pipe, tiny_inputs(1), 20)
    request = routed.request(tuple(float(time) for time in pipe.scheduler.timesteps), 64, 7)
    plan = routed.stale.plan(request, routed.budget, [(64,) * 3] * 20)
    whole = plan.allotted[0]
    warm, rest = sum(cost == whole for cost in plan.allotted), plan.allotted[-1] / whole
    assert 1 <= warm <= 5 and (warm == 5) == (compute > 0.6) and (warm == 1) == (compute < 0.6)
    assert rest >= 1 / 3 or warm == 1
    if warm < 5:  # one step more would leave them less
        more = (plan.cost - (warm + 1) * whole) / ((20 - warm - 1) * whole)
        assert more < 1 / 3


def test_the_blocks_that_moved_most_run_as_far_as_the_budget_goes(pipe: StableDiffusion3Pipeline) -> None:
    routed = by("drift", pipe, 0.6, warmup=0.1, forecast=0.0)
    needs: dict[int, dict[int, float]] = {}
    ran: dict[int, set[int]] = {}
    memory: dict[int, tuple[Tensor, int, float]] = {}

    def watch(block: int, x: Tensor, out: Tensor, kept: Any, text: Any) -> None:
        step = routed.context.step
        if block == routed.routed[0]:
            needs[step] = {
                b: memory[b][2] * (step - memory[b][1]) if b in memory else float("inf") for b in routed.routed
            }
            ran[step] = set()
        residual = out - x
        if block not in memory or not torch.allclose(residual, memory[block][0], atol=1e-6):
            before = memory[block][0] if block in memory else torch.zeros_like(residual)
            memory[block] = (residual, step, float((residual - before).norm() / residual.norm()))
            ran[step].add(block)
        else:
            torch.testing.assert_close(out, x + memory[block][0])

    routed.observer = watch
    walk(pipe, tiny_inputs(1), 12)
    assert ran[0] == set(routed.routed) and sum(len(blocks) for blocks in ran.values()) < 30
    assert len({frozenset(blocks) for blocks in ran.values()}) > 2
    # Blocks 2 and 3 cost the same (dual attention makes block 1 dearer), so the one that needs it more runs first.
    for step, blocks in ran.items():
        for block, other in ((2, 3), (3, 2)):
            if block in blocks and other not in blocks:
                assert needs[step][block] >= needs[step][other]


@pytest.mark.parametrize("axis", ["blocks", "both"])
@pytest.mark.parametrize("compute", [0.8, 0.7, 0.63, 0.55])
def test_the_budget_is_met_from_below_within_one_block(
    pipe: StableDiffusion3Pipeline, axis: str, compute: float
) -> None:
    routed = free(pipe, compute, axis)
    walk(pipe, tiny_inputs(1), 10)  # the length of the text is known from here on
    planned = sl.planned_ratio(pipe, 10)
    walk(pipe, tiny_inputs(2), 10)
    dense = 10 * routed.planner.dense_flops(64, 7)[0]
    dearest = max(cost.flops(64, 7) for cost in routed.planner.costs)
    assert planned <= compute and planned - dearest / dense <= routed.spending.ratio <= planned * (1 + 1e-9)


def test_each_block_has_its_own_price_at_each_step(pipe: StableDiffusion3Pipeline) -> None:
    tokens = sl.TokenRouting(scores="drift", policy_width=16, granularity=1)
    blocks = sl.BlockRouting(router="drift", widths=(1.0,))
    sl.attach(pipe, sl.RoutingConfig(tokens, blocks, reuse=sl.Reuse(warmup=0.1), compute=0.6))
    routed = routed_of(pipe)
    with torch.no_grad():
        routed.policy.layer_out.copy_(
            3 * torch.randn(routed.policy.layer_out.shape, generator=torch.Generator().manual_seed(0))
        )
    walk(pipe, tiny_inputs(1), 12)
    assert len(set(sl.current_schedule(pipe, 12).keep[-1])) > 1
    planned = sl.planned_ratio(pipe, 12)
    walk(pipe, tiny_inputs(2), 12)
    dearest = max(cost.flops(64, 7) for cost in routed.planner.costs) / (12 * routed.planner.dense_flops(64, 7)[0])
    assert planned - dearest <= routed.spending.ratio <= planned * (1 + 1e-9) <= 0.6 * (1 + 1e-9)


def test_a_batch_is_its_samples_and_guidance_may_be_split(pipe: StableDiffusion3Pipeline) -> None:
    for axis in ("blocks", "both"):
        free(pipe, 0.6, axis)
        call = tiny_inputs(3)
        together = walk(pipe, call, 6)
        for i in range(3):
            alone = walk(pipe, {name: value[i : i + 1] for name, value in call.items()}, 6)
            torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_conditional_branch_decides_for_both_batched_or_split(pipe: StableDiffusion3Pipeline) -> None:
    runs = {}
    for split in (False, True):
        routed = free(pipe, 0.55, warmup=0.05)
        decided = []
        decide = routed.decide

        def noting(block: int, x: Tensor, text: Tensor | None, text_tokens: int) -> Any:
            parts = decide(block, x, text, text_tokens)  # noqa: B023
            decided.append(parts * (len(x) // len(parts)))  # noqa: B023
            return parts

        routed.decide = noting
        runs[split] = guided_walk(pipe, 16, split)
        halves = zip(decided[::2], decided[1::2], strict=True) if split else ((p[:2], p[2:]) for p in decided)
        assert split or all(first == second for first, second in halves)
        assert routed.spending.actions["reuse"] > 0
    torch.testing.assert_close(runs[True], runs[False], atol=2e-5, rtol=1e-4)


def test_what_must_run_is_paid_for_by_later_steps(pipe: StableDiffusion3Pipeline) -> None:
    routed = by("age", pipe, 0.7, warmup=0.1)
    entry = routed._entry
    routed._entry = lambda block, x, text: None if block == 3 else entry(block, x, text)  # no room for its residuals
    walk(pipe, tiny_inputs(1), 12)
    planned = sl.planned_ratio(pipe, 12)
    walk(pipe, tiny_inputs(1), 12)
    assert routed.spending.ratio <= planned * (1 + 1e-9) and routed.spending.actions["reuse"] > 0


def test_everything_is_dense_and_prompts_do_not_meet(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    dense = sample(pipe, PROMPTS[:1])
    free(pipe, 0.6)
    routed = sample(pipe, PROMPTS[:1])
    assert not torch.equal(routed, dense)
    sample(pipe, PROMPTS[1:])
    assert torch.equal(sample(pipe, PROMPTS[:1]), routed)
    assert "blocks: all run at growing intervals" in sl.summary(pipe)
    sl.set_budget(pipe, compute=1.0)
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)


def test_without_memory_blocks_run(pipe: StableDiffusion3Pipeline) -> None:
    routed = free(pipe, 0.6, max_cache_mb=1e-6)
    walk(pipe, tiny_inputs(1), 4)
    assert routed.spending.ratio == 1.0


def test_what_cannot_be_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    with pytest.raises(sl.AdapterError, match="give compute="):
        sl.RoutingConfig.training_free(axis="blocks")
    for router in ("interval", "age", "drift"):
        with pytest.raises(sl.AdapterError, match=f"router='{router}' knows no widths"):
            sl.BlockRouting(router=router)
    with pytest.raises(sl.AdapterError, match="give RoutingConfig reuse"):
        sl.RoutingConfig(None, sl.BlockRouting(router="drift", widths=(1.0,)))
    with pytest.raises(sl.AdapterError, match="axis is 'width'"):
        sl.RoutingConfig.training_free(compute=0.5, axis="width")  # type: ignore[arg-type]
    with pytest.raises(sl.AdapterError, match="no keep beside it"):
        sl.RoutingConfig(keep=0.5, compute=0.5)
    with pytest.raises(sl.UnsupportedBackboneError, match="Attach to the pipeline"):
        sl.attach(pipe.transformer, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    free(pipe, 0.6)
    with pytest.raises(sl.BudgetError, match=r"5 run everything \(Reuse.max_age\). The nearest is compute=0.1"):
        sl.set_budget(pipe, compute=0.05)
    with pytest.raises(sl.BudgetError, match="in 2 steps: the first runs everything"):
        sl.set_budget(pipe, compute=0.4)
        walk(pipe, tiny_inputs(1), 2)
