"""Blocks that run, reuse or pass by, per sample: the rule against a simulation, and routing through a real pipeline."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from gating import gated, watch
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.execution.gates import Decision, choose_action, choose_width
from shivelight.routing import Dial

PROMPTS = ["a red apple", "blue bird", "an owl on stripes"]
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def test_the_rule_is_the_papers() -> None:
    for logit, shift, may, wanted in [
        (-0.01, 0.0, True, "skip"), (0.0, 0.0, True, "reuse"), (0.405, 0.0, True, "reuse"), (0.406, 0.0, True, "run"),
        (0.0, 0.0, False, "run"), (9.0, 0.0, True, "run"), (float("nan"), 0.0, True, "run"), (-1.0, 1.2, True, "reuse"),
        (1.0, -1.2, True, "skip"),
    ]:  # fmt: skip
        assert choose_action(logit, Dial(0.5, shift), 0.1, may) == wanted  # logit(0.6) is 0.4055
    assert choose_action(-2.0, Dial(0.1), 1.0, True) == "reuse" and choose_action(-3.0, Dial(0.1), 1.0, True) == "skip"


def test_a_word_is_read_at_the_dial() -> None:
    word = [0.4, 1.0, 3.0, 2.0, 0.0]
    assert choose_width(word, Dial(), WIDTHS) == 0.5
    assert choose_width(word, Dial(shift=1.5), WIDTHS) == 0.75  # each wider one moves by as much more
    assert choose_width(word, Dial(shift=-9.0), WIDTHS) == 0.25
    assert choose_width([float("nan")] * 5, Dial(), WIDTHS) == 1.0
    assert choose_width([0.0, 1.0, 1.0, 1.0, 1.0], Dial(), WIDTHS) == 1.0  # ties go to the widest


def test_a_fresh_adapter_runs_everything_bit_for_bit(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    dense = sample(pipe, PROMPTS[:1])
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)
    sl.set_budget(pipe, threshold=0.5)  # the full-capacity start is above it, at the full width
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)
    sl.set_budget(pipe, threshold=0.9)
    assert not torch.equal(sample(pipe, PROMPTS[:1]), dense)
    assert "skip" in sl.summary(pipe) and "realised" in sl.summary(pipe)
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)


def test_a_skipped_block_passes_both_streams_and_costs_nothing(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, widths=(1.0,))
    call = tiny_inputs(2) | {"timestep": torch.full((2,), 500.0)}
    with torch.no_grad():
        routed.gates.router.routers["2"].gate_head.bias.fill_(-1e4)
        for block in ("1", "3"):
            routed.gates.router.routers[block].gate_head.bias.fill_(1e4)
        sl.set_budget(pipe, threshold=0.5)
        out = pipe.transformer(**call, return_dict=False)[0]
    costs = routed.planner.costs
    assert routed.spending.flops == 2 * sum(cost.flops(64, 7) for i, cost in enumerate(costs) if i != 2)
    assert routed.spending.actions == {"run": 4, "reuse": 0, "skip": 2}
    assert routed.spending.map() == [[1.0, 0.0, 1.0]]
    sl.detach(pipe)
    del pipe.transformer.transformer_blocks[2]
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**call, return_dict=False)[0], out)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_batch_is_its_samples(pipe: StableDiffusion3Pipeline, tokens: bool, reuse: bool) -> None:
    routed = gated(pipe, sl.Reuse(margin=0.3, max_reuses=2) if reuse else None, tokens)
    sl.set_budget(pipe, **({"keep": 0.7, "threshold": 0.45} if tokens else {"threshold": 0.45}))
    seen, call = watch(routed), tiny_inputs(3)
    together = walk(pipe, call, 6)
    decided = dict(seen)
    differ = [parts for parts in decided.values() if len(set(parts)) > 1]
    kinds = {part.action for parts in decided.values() for part in parts}
    assert differ and kinds == ({"run", "reuse", "skip"} if reuse else {"run", "skip"})
    assert {part.width for parts in decided.values() for part in parts} >= {0.25, 1.0} or len(differ) > 2
    for i in range(3):
        alone = walk(pipe, {name: value[i : i + 1] for name, value in call.items()}, 6)
        assert {place: parts[i] for place, parts in decided.items()} == {p: parts[0] for p, parts in seen.items()}
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cfg_gates", ["cond", "each"])
def test_batched_guidance_is_split_guidance(pipe: StableDiffusion3Pipeline, cfg_gates: str) -> None:
    gated(pipe, tokens=True, cfg_gates=cfg_gates)
    sl.set_budget(pipe, keep=0.6, threshold=0.5)
    call = tiny_inputs(2) | {"timestep": torch.full((2,), 500.0)}
    cond, uncond = call, call | {"encoder_hidden_states": torch.randn(2, 7, 32)}
    both = {name: torch.cat([uncond[name], cond[name]]) for name in call}
    with torch.no_grad():
        with sl.branch(pipe, "both"):
            batched = pipe.transformer(**both, return_dict=False)[0]
        with sl.branch(pipe, "cond"):
            first = pipe.transformer(**cond, return_dict=False)[0]
        with sl.branch(pipe, "uncond"):
            second = pipe.transformer(**uncond, return_dict=False)[0]
    torch.testing.assert_close(torch.cat([second, first]), batched, atol=2e-5, rtol=1e-4)


def test_reuse_adds_the_last_residual_at_most_k_times_in_a_row(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, sl.Reuse(margin=0.9, max_reuses=2, forecast=0.0), widths=(1.0,))
    sl.set_budget(pipe, threshold=0.05)  # every gate is unsure: run, reuse, reuse, run, ...
    with torch.no_grad():
        for block in routed.routed:
            routed.gates.router.routers[str(block)].gate_head.weight.zero_()
            routed.gates.router.routers[str(block)].gate_head.bias.zero_()
    residuals: dict[int, Tensor] = {}
    seen = watch(routed)

    def check(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        if seen[routed.context.step, block][0].action == "run":
            residuals[block] = out - x
        else:
            torch.testing.assert_close(out, x + residuals[block])

    routed.observer = check
    walk(pipe, tiny_inputs(2), 7)
    pattern = ["run", "reuse", "reuse", "run", "reuse", "reuse", "run"]
    for block in routed.routed:
        assert [seen[step, block][0].action for step in range(7)] == pattern
    assert routed.residuals.megabytes == 0  # nothing is held between generations
    # Nor in the first steps, where that was asked for.
    with routed.variant(reuse=sl.Reuse(margin=0.9, max_reuses=2, blocks_after=0.4, forecast=0.0)):
        seen = watch(routed)
        walk(pipe, tiny_inputs(2), 7)
        late = ["run", "run", "run", "reuse", "reuse", "run", "reuse"]
        assert all([seen[step, block][0].action for step in range(7)] == late for block in routed.routed)
    # Without memory for residuals the blocks run.
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting(), reuse=sl.Reuse(margin=0.9, max_cache_mb=1e-6)))
    sl.set_budget(pipe, threshold=0.5)
    walk(pipe, tiny_inputs(2), 3)
    assert routed_of(pipe).spending.actions == {"run": 18, "reuse": 0, "skip": 0}


def test_where_nothing_moves_a_reused_block_is_the_block_itself(pipe: StableDiffusion3Pipeline) -> None:
    """Both streams: the text's residual is reused too."""
    gated(pipe, sl.Reuse(margin=1.0, max_reuses=9), widths=(1.0,))
    sl.set_budget(pipe, threshold=1e-6)
    pipe.scheduler.set_timesteps(3)
    call = tiny_inputs(2) | {"timestep": torch.full((2,), 500.0)}
    outputs = []
    with torch.no_grad():
        for time in pipe.scheduler.timesteps:
            outputs.append(pipe.transformer(**call, return_dict=False)[0])
            pipe.scheduler.step(outputs[-1], time, call["hidden_states"])
    assert routed_of(pipe).spending.actions["reuse"] == 12
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-4)


def test_a_second_prompt_does_not_depend_on_the_first(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    for decide in ("block", "step"):
        gated(pipe, sl.Reuse(margin=0.3), tokens=True, decide=decide)
        sl.set_budget(pipe, compute=0.6)
        alone = sample(pipe, PROMPTS[1:2])
        sample(pipe, PROMPTS[:1])
        assert torch.equal(sample(pipe, PROMPTS[1:2]), alone)

        def stop(_: Any, step: int, time: Any, arguments: dict) -> dict:
            if step == 1:
                raise KeyboardInterrupt
            return arguments

        with pytest.raises(KeyboardInterrupt):
            sample(pipe, PROMPTS[:1], callback_on_step_end=stop)
        assert torch.equal(sample(pipe, PROMPTS[1:2]), alone)


def test_step_mode_follows_the_routers_of_the_step_before(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, decide="step")
    sl.set_budget(pipe, threshold=0.5)
    said: dict[tuple[int, int], Tensor] = {}
    read = routed.read_gates

    def noting(block: int, *rest: Any) -> Tensor:
        said[routed.context.step, block] = read(block, *rest)
        return said[routed.context.step, block]

    routed.read_gates = noting
    seen = watch(routed)
    walk(pipe, tiny_inputs(3), 6)
    assert all(part == Decision("run", 64) for block in routed.routed for part in seen[0, block])
    for (step, block), parts in seen.items():
        for sample, part in enumerate(parts):
            if step:
                word = said[step - 1, block][sample].tolist()
                assert part == (
                    Decision("run", 64, choose_width(word, Dial(), WIDTHS)) if word[0] >= 0 else Decision("skip", 0)
                )


def test_a_nan_in_a_router_runs_the_block(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe)
    dense_call = tiny_inputs(2) | {"timestep": torch.full((2,), 500.0)}
    with torch.no_grad():
        with sl.dense(pipe):
            dense = pipe.transformer(**dense_call, return_dict=False)[0]
        for block in routed.routed:
            routed.gates.router.routers[str(block)].trunk.bias.fill_(float("nan"))
        sl.set_budget(pipe, threshold=0.5)
        assert torch.equal(pipe.transformer(**dense_call, return_dict=False)[0], dense)


def test_a_batch_that_changes_in_mid_generation_and_a_new_budget_are_safe(pipe: StableDiffusion3Pipeline) -> None:
    for decide in ("block", "step", "static"):
        routed = gated(pipe, sl.Reuse(margin=0.5), tokens=True, decide=decide)
        sl.set_budget(pipe, compute=0.6, cap=decide == "block")
        pipe.scheduler.set_timesteps(6)
        latents = torch.zeros(4, 4, 16, 16)
        for step, time in enumerate(pipe.scheduler.timesteps):
            call = tiny_inputs(4 if step < 3 else 2) | {"timestep": time.expand(4 if step < 3 else 2)}
            if step == 4:
                sl.set_budget(pipe, compute=0.8)
            with torch.no_grad():
                assert bool(torch.isfinite(pipe.transformer(**call, return_dict=False)[0]).all())
            pipe.scheduler.step(latents, time, latents)
        assert routed.spending.ratio is not None


def test_samples_that_never_ran_whole_do_not_share_keys_with_those_that_did(pipe: StableDiffusion3Pipeline) -> None:
    """A sample whose block was skipped in the warm-up has no keys and values to lend its rejected tokens."""
    routed = gated(pipe, sl.Reuse(margin=0.0, warmup=0.1), tokens=True, widths=(1.0,))
    sl.set_budget(pipe, keep=0.6, threshold=0.5)
    words = {0: [[5.0, 0.0], [-5.0, 0.0]]}  # at the first step the second sample skips every block; then both run
    read = routed.read_gates

    def scripted(block: int, x: Tensor, text: Any, first: int = 0, log_drift: Any = None) -> Tensor:
        both = words.get(routed.context.step, [[5.0, 0.0]] * 2)
        return torch.tensor(both)[scripted.samples]  # type: ignore[attr-defined]

    call = tiny_inputs(2)
    routed.read_gates = scripted
    scripted.samples = [0, 1]  # type: ignore[attr-defined]
    together = walk(pipe, call, 6)
    for i in range(2):
        scripted.samples = [i]  # type: ignore[attr-defined]
        alone = walk(pipe, {name: value[i : i + 1] for name, value in call.items()}, 6)
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)
    routed.read_gates = read


def test_a_bare_transformer_has_no_step_before(pipe: StableDiffusion3Pipeline) -> None:
    gated(pipe)
    torch.manual_seed(1)
    sl.detach(pipe)
    sl.attach(pipe.transformer, sl.RoutingConfig(None, sl.BlockRouting(start="random", token_stride=1, decide="step")))
    sl.set_budget(pipe.transformer, threshold=0.5)
    first, second = (tiny_inputs(2, seed) | {"timestep": torch.full((2,), 500.0)} for seed in (1, 2))
    with torch.no_grad():
        alone = pipe.transformer(**second, return_dict=False)[0]
        pipe.transformer(**first, return_dict=False)
        assert torch.equal(pipe.transformer(**second, return_dict=False)[0], alone)
    with pytest.raises(sl.BudgetError, match="Attach to the pipeline"):
        sl.set_budget(pipe.transformer, compute=0.9, cap=True)


def test_reuse_needs_one_whole_step_even_without_warm_up(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, sl.Reuse(margin=0.2, max_reuses=3, warmup=0.0), tokens=True, decide="static")
    walk(pipe, tiny_inputs(1), 8)
    sl.set_budget(pipe, compute=0.6)
    assert sl.current_schedule(pipe, 8).row(0) == (64, 64, 64)
    planned = sl.planned_ratio(pipe, 8)
    walk(pipe, tiny_inputs(2), 8)
    assert routed.spending.ratio == pytest.approx(planned, rel=1e-9)


def test_guidance_without_order_is_refused_for_gates_too(pipe: StableDiffusion3Pipeline) -> None:
    gated(pipe)
    sl.set_budget(pipe, threshold=0.5)
    call = tiny_inputs(3) | {"timestep": torch.full((3,), 500.0)}
    with torch.no_grad():
        with sl.branch(pipe, "uncond"), pytest.raises(sl.ShivelightError, match="came before the conditional"):
            pipe.transformer(**call, return_dict=False)
        with sl.branch(pipe, "both"), pytest.raises(sl.ShivelightError, match="has 3 samples"):
            pipe.transformer(**call, return_dict=False)


def test_a_fresh_router_stands_on_its_own_threshold_and_runs(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    sl.set_budget(pipe, threshold=0.7)  # where the full-capacity start lies
    walk(pipe, tiny_inputs(1), 2)
    assert routed_of(pipe).spending.actions["skip"] == 0
