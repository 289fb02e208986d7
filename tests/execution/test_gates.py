"""Blocks that run, reuse or pass by, per sample: the rule against a simulation, and routing through a real pipeline."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_inputs, walk
from torch import Tensor

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cost import step_flops
from shivelight.execution.gates import Cap, Decision, choose_action, choose_width
from shivelight.execution.planning import Budget
from shivelight.routing import Dial

PROMPTS = ["a red apple", "blue bird", "an owl on stripes"]
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def gated(pipe: StableDiffusion3Pipeline, reuse: sl.Reuse | None = None, tokens: bool = False, **options: Any) -> Any:
    """Attach random block routers whose gates stand near the threshold, with records of what they say."""
    torch.manual_seed(1)
    blocks = sl.BlockRouting(**{"start": "random", "token_stride": 1} | options)
    routing = sl.TokenRouting(bottleneck=8, policy_width=16, granularity=1) if tokens else None
    sl.attach(pipe, sl.RoutingConfig(routing, blocks, reuse=reuse))
    routed = routed_of(pipe)
    said: dict[int, list[Tensor]] = {block: [] for block in routed.routed}
    times = []

    def listen(block: int, x: Tensor, out: Tensor, kept: Tensor | None, text: Any) -> None:
        said[block].append(routed.read_gates(block, x, None))
        if block == routed.routed[0]:
            times.append(routed.context.timestep.expand(len(x)))

    with torch.no_grad():
        for _, parameter in routed.gates.router.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)  # far enough apart that samples and steps differ
        pipe._guidance_scale = 0.0
        routed.observer = listen
        walk(pipe, tiny_inputs(4), 6)
        for block, logits in said.items():
            routed.gates.router.routers[str(block)].gate_head.bias -= torch.cat(logits)[:, 0].median()
        for block in said:
            said[block].clear()
        times.clear()
        walk(pipe, tiny_inputs(4), 6)
        routed.observer = None
        together = torch.stack([torch.cat(said[block]) for block in routed.routed], dim=1)
        routed.gates.records.add(torch.cat(times), together[..., 0], together[..., 1:])
    return routed


def watch(routed: Any) -> dict[tuple[int, int], tuple[Decision, ...]]:
    """Every decision from now on, by (step, block)."""
    seen: dict[tuple[int, int], tuple[Decision, ...]] = {}
    decide = routed.decide

    def noting(block: int, x: Tensor, text: Tensor | None) -> tuple[Decision, ...]:
        decisions = decide(block, x, text)
        seen[routed.context.step, block] = decisions * (len(x) // len(decisions))
        return decisions

    routed.decide = noting
    return seen


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
    routed = gated(pipe, sl.Reuse(margin=0.9, max_reuses=2), widths=(1.0,))
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
    with routed.variant(reuse=sl.Reuse(margin=0.9, max_reuses=2, blocks_after=0.4)):
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


@pytest.mark.parametrize("reuse", [None, sl.Reuse(margin=0.1, max_reuses=2)])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("compute", [0.8, 0.5])
def test_static_gates_read_no_router_and_their_cost_is_known_before(
    pipe: StableDiffusion3Pipeline, reuse: sl.Reuse | None, tokens: bool, compute: float
) -> None:
    routed = gated(pipe, reuse, tokens, decide="static")
    walk(pipe, tiny_inputs(1), 5)  # the length of the text is known from here on
    routed.read_gates = None
    sl.set_budget(pipe, compute=compute)
    planned = sl.planned_ratio(pipe, 5)
    walk(pipe, tiny_inputs(2), 5)
    assert planned == pytest.approx(routed.spending.ratio, rel=1e-9)
    assert compute - 0.12 < planned <= compute


def test_a_compute_budget_is_met_on_average(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe)
    walk(pipe, tiny_inputs(1), 6)
    for compute in (0.85, 0.7, 0.5):
        sl.set_budget(pipe, compute=compute)
        assert compute - 0.06 < sl.planned_ratio(pipe, 6) <= compute
        walk(pipe, tiny_inputs(4), 6)  # what the records were made of, so nearly the expectation itself
        assert abs(routed.spending.ratio - compute) < 0.2
    sl.set_budget(pipe, compute=1.0)
    assert sl.planned_ratio(pipe, 6) == 1.0


def test_a_hard_cap_is_never_exceeded_by_any_sample_and_late_steps_still_run(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe)
    walk(pipe, tiny_inputs(1), 8)
    with torch.no_grad():  # routers that now say far more than they did when the records were made
        for block in routed.routed:
            routed.gates.router.routers[str(block)].gate_head.bias += 2.0
    steps, samples, compute = 8, 3, 0.6
    seen = watch(routed)
    sl.set_budget(pipe, compute=compute)
    walk(pipe, tiny_inputs(samples, seed=5), steps)
    assert routed.spending.ratio > compute  # on average only, by records that no longer hold
    sl.set_budget(pipe, compute=compute, cap=True)
    walk(pipe, tiny_inputs(samples, seed=5), steps)
    costs = routed.planner.costs
    dense = steps * step_flops(costs, [64] * 4, 7)
    for sample in range(samples):
        spent = steps * costs[0].flops(64, 7) + sum(
            costs[block].flops(64, 7, parts[sample].width)
            for (_, block), parts in seen.items()
            if parts[sample].action == "run"
        )
        assert 0.4 * dense < spent <= compute * dense
        late = [seen[step, block][sample] for step in (6, 7) for block in routed.routed]
        assert any(part.action == "run" for part in late)


def test_the_cap_steers_by_what_is_left() -> None:
    cap = Cap(10.0, [-1.0, 0.0, 1.0], [[4.0, 8.0, 12.0], [2.0, 4.0, 6.0]])
    assert cap.shift(0, 0, 2) == [0.0, 0.0]
    assert cap.spend(0, 0, 1, 2, 7.0)
    assert cap.shift(0, 0, 2) == [0.0, 0.0]  # settled for this step
    assert cap.shift(0, 1, 2) == [1.0, -1.0]
    # Half of the last step's 4 is kept for it.
    assert not cap.spend(0, 1, 1, 2, 3.1) and not cap.spend(0, 0, 1, 2, 1.1)
    assert cap.spend(0, 0, 1, 2, 1.0) and cap.spend(0, 1, 1, 2, 2.0)
    # Another batch in mid-generation: nobody gets more than the dearest had left.
    assert not cap.spend(0, 1, 0, 3, 0.1)
    assert cap.shift(1, 1, 1) == [1.0]  # a pass of its own


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


def test_budgets_that_an_adapter_cannot_keep_are_refused(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig())
    for options in ({"threshold": 0.5}, {"compute": 0.5, "cap": True}):
        with pytest.raises(sl.BudgetError, match="no block routers"):
            sl.set_budget(pipe, **options)
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    with pytest.raises(sl.BudgetError, match="no statistics.*threshold="):
        sl.set_budget(pipe, compute=0.5)
    with pytest.raises(sl.BudgetError, match="routes no tokens"):
        sl.set_budget(pipe, keep=0.5)
    with pytest.raises(sl.BudgetError, match="cap=True bounds compute"):
        sl.set_budget(pipe, keep=1.0, cap=True)
    with pytest.raises(sl.BudgetError, match="chooses the threshold"):
        sl.set_budget(pipe, compute=0.5, threshold=0.5)
    for threshold in (0.0, 1.0, -1, float("nan"), "half"):
        with pytest.raises(sl.BudgetError, match="probability in"):
            sl.set_budget(pipe, threshold=threshold)
    gated(pipe)
    with pytest.raises(sl.BudgetError, match="compute=0.1 cannot be reached") as caught:
        sl.set_budget(pipe, compute=0.1)
    sl.set_budget(pipe, compute=caught.value.nearest)


def test_samples_that_never_ran_whole_do_not_share_keys_with_those_that_did(pipe: StableDiffusion3Pipeline) -> None:
    """A sample whose block was skipped in the warm-up has no keys and values to lend its rejected tokens."""
    routed = gated(pipe, sl.Reuse(margin=0.0, warmup=0.1), tokens=True, widths=(1.0,))
    sl.set_budget(pipe, keep=0.6, threshold=0.5)
    words = {0: [[5.0, 0.0], [-5.0, 0.0]]}  # at the first step the second sample skips every block; then both run
    read = routed.read_gates

    def scripted(block: int, x: Tensor, text: Any, first: int = 0) -> Tensor:
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


def test_an_mlp_that_cannot_be_narrowed_is_planned_and_counted_whole(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, decide="static")
    walk(pipe, tiny_inputs(1), 5)
    sl.set_budget(pipe, compute=0.6)
    free_plan = sl.planned_ratio(pipe, 5)
    for block in pipe.transformer.transformer_blocks[1:]:
        block.ff.net[2].forward = block.ff.net[2].forward  # as a layer-wise hook leaves it
    routed.gates.clear()
    seen = watch(routed)
    planned = sl.planned_ratio(pipe, 5)
    walk(pipe, tiny_inputs(2), 5)
    assert {part.width for parts in seen.values() for part in parts if part.action == "run"} == {1.0}
    assert planned == pytest.approx(routed.spending.ratio, rel=1e-9) and planned <= 0.6
    assert free_plan <= 0.6


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


def test_the_first_step_of_step_mode_is_in_the_plan(pipe: StableDiffusion3Pipeline) -> None:
    for decide, first in (("step", 1.0), ("block", 0.0)):
        routed = gated(pipe, decide=decide)
        walk(pipe, tiny_inputs(1), 4)
        request = routed.request((900.0, 600.0, 300.0), 64, 7)
        planner = routed.gates._gate_planner(request, Budget("compute", 0.6), routed.schedule(request).keep)
        whole = sum(routed.planner.costs[block].flops(64, 7) for block in routed.routed)
        assert planner.cost_by_step(-60.0).tolist() == [first * whole, 0.0, 0.0]


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


def test_a_variant_of_the_token_ratios_has_a_plan_of_its_own(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, tokens=True, decide="static")
    with torch.no_grad():
        routed.policy.layer_out.normal_()
    walk(pipe, tiny_inputs(1), 5)
    sl.set_budget(pipe, compute=0.6)
    for variant in ({}, {"ratios": "fixed"}):
        with routed.variant(**variant):
            planned = sl.planned_ratio(pipe, 5)
            walk(pipe, tiny_inputs(2), 5)
            assert routed.spending.ratio == pytest.approx(planned, rel=1e-9) and planned <= 0.6


def test_an_unknown_cost_is_said_to_be_unknown(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    sl.set_budget(pipe, threshold=0.5)
    assert sl.planned_ratio(pipe) is None and "unknown (no statistics" in sl.summary(pipe)


def test_a_fresh_router_stands_on_its_own_threshold_and_runs(pipe: StableDiffusion3Pipeline) -> None:
    sl.attach(pipe, sl.RoutingConfig(None, sl.BlockRouting()))
    sl.set_budget(pipe, threshold=0.7)  # where the full-capacity start lies
    walk(pipe, tiny_inputs(1), 2)
    assert routed_of(pipe).spending.actions["skip"] == 0


@pytest.mark.parametrize("decide", ["block", "static"])
def test_the_expectation_is_of_records_made_at_that_dial(pipe: StableDiffusion3Pipeline, decide: Any) -> None:
    """Routers that open later blocks once earlier ones close: what they say depends on the dial."""
    routed = gated(pipe, widths=(1.0,), decide=decide)
    times = torch.linspace(0, 1000, 64)
    routed.gates.records.clear()
    for shift, logit in ((-4.0, 6.0), (0.0, 1.0), (4.0, -6.0)):
        records = torch.full((64, 3), logit)
        routed.gates.records.add(times, records, torch.zeros(64, 3, 1), torch.full((64,), shift))
    walk(pipe, tiny_inputs(1), 4)
    request = routed.request(tuple(pipe.scheduler.timesteps[:4].tolist()), 64, 7, Budget("compute", 0.9))
    planner = routed.gates._gate_planner(request, Budget("compute", 0.9), [[64] * 3] * 4)
    whole = float(planner.prices.sum())
    for shift, share in ((-4.0, 1.0), (0.0, 1.0), (4.0, 0.0)):  # far from each other's records
        assert float(planner.cost_by_step(shift).sum()) == pytest.approx(share * whole, rel=2e-3, abs=2e-3 * whole)
    plan = planner.solve(0.5 * whole)
    assert float(planner.cost_by_step(plan.dial.shift).sum()) <= 0.5 * whole


def test_budgets_are_met_however_large_the_logits(pipe: StableDiffusion3Pipeline) -> None:
    routed = gated(pipe, widths=(1.0,))
    routed.gates.records.clear()
    logits = 500.0 + 50.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    routed.gates.records.add(torch.linspace(0, 1000, 64), logits, torch.zeros(64, 3, 1))
    walk(pipe, tiny_inputs(1), 4)
    for compute in (0.8, 0.5):
        sl.set_budget(pipe, compute=compute)
        assert compute - 0.1 < sl.planned_ratio(pipe, 4) <= compute
