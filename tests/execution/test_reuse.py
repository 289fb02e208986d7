"""Residuals of earlier steps: the state against a token-by-token simulation, and routing with it through a real pipeline."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.cost import step_flops
from shivelight.execution.reuse import BlockResiduals, ResidualCache
from shivelight.routing import top_k_indices

PROMPTS = ["a red apple", "blue bird", "an owl on stripes"]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_residuals_follow_a_token_by_token_simulation(seed: int, max_age: int, kept: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, width = 2, 6, 3
    state, memory = BlockResiduals(torch.zeros(batch, tokens, width)), {}
    for step, k in enumerate(kept):
        x, full = torch.randn(2, batch, tokens, width, generator=generator)
        indices = (
            None if k == tokens else torch.rand(batch, tokens, generator=generator).argsort(1)[:, :k].sort(1).values
        )
        scores = state.scores(step, max_age)
        for sample in range(batch):
            for token in range(tokens):
                residual, last, drift = memory.get((sample, token), (None, None, None))
                if last is not None and step - last <= max_age:
                    torch.testing.assert_close(scores[sample, token], drift * (step - last))
                else:
                    assert scores[sample, token] >= 1e6
        rows = torch.arange(tokens).expand(batch, -1) if indices is None else indices
        out = full.gather(1, rows[..., None].expand(-1, -1, width))
        completed = state.update(x, indices, out, step, max_age)
        for sample in range(batch):
            for token in range(tokens):
                residual, last, _ = memory.get((sample, token), (torch.zeros(width), None, None))
                if token in rows[sample]:
                    assert torch.equal(completed[sample, token], full[sample, token])
                    fresh = full[sample, token] - x[sample, token]
                    memory[sample, token] = (fresh, step, (fresh - residual).norm())
                elif last is not None and step - last <= max_age:
                    torch.testing.assert_close(completed[sample, token], x[sample, token] + residual)
                else:
                    assert torch.equal(completed[sample, token], x[sample, token])


def test_tokens_whose_residual_is_too_old_run_first_oldest_first() -> None:
    state = BlockResiduals(torch.zeros(1, 4, 2))
    state.image.at = torch.tensor([[0, 3, 9, 8]], dtype=torch.int32)
    state.drift = torch.tensor([[0.0, 0.0, 5.0, 50.0]])
    assert top_k_indices(state.scores(10, 4), 1).tolist() == [[0]]
    assert top_k_indices(state.scores(10, 4), 3).tolist() == [[0, 1, 3]]


def test_memory_stays_within_its_bound_and_the_first_blocks_keep_theirs() -> None:
    x = torch.zeros(1, 100, 10)
    each = BlockResiduals(x).bytes / 1e6
    cache = ResidualCache(2.5 * each)
    for _ in range(2):  # the second step finds what the first has left
        for block in (1, 2, 3):
            cache.enter((0, block), x)
            cache.trim()
        assert cache.megabytes == pytest.approx(2 * each)
        assert [cache.find((0, block), x) is None for block in (1, 2, 3)] == [False, False, True]
    small = ResidualCache(0.5 * each)
    small.enter((0, 1), x)
    small.trim()
    assert small.megabytes == 0


def free(pipe: StableDiffusion3Pipeline, keep: float = 0.5, **reuse: Any) -> StableDiffusion3Pipeline:
    return sl.attach(pipe, sl.RoutingConfig.training_free(keep, **reuse))


def test_one_line_attaches_at_a_budget_and_keep_1_is_the_dense_model(
    pipe: StableDiffusion3Pipeline, sample: Any
) -> None:
    dense = sample(pipe, PROMPTS[:1])
    free(pipe)
    assert routed_of(pipe).budget.value == 0.5 and sl.current_schedule(pipe, 4).mean_keep <= 0.5
    assert not torch.equal(sample(pipe, PROMPTS[:1]), dense)
    with sl.dense(pipe):
        assert torch.equal(sample(pipe, PROMPTS[:1]), dense)
    sl.set_budget(pipe, keep=1.0)
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)
    assert routed_of(pipe).residuals.megabytes == 0
    sl.detach(pipe)
    assert torch.equal(sample(pipe, PROMPTS[:1]), dense)


def test_warm_up_runs_everything_and_the_rest_makes_up_for_it(pipe: StableDiffusion3Pipeline) -> None:
    free(pipe, 0.6, warmup=0.3)
    schedule = sl.current_schedule(pipe, 10)
    assert all(row == (64, 64, 64) for row in schedule.keep[:3])
    assert max(max(row) for row in schedule.keep[3:]) < 0.5 * 64
    assert 0.6 * 64 * 30 - 2 < schedule.total <= 0.6 * 64 * 30
    # More warm-up than the budget pays for: as much of it as the budget allows, never more.
    tight = sl.set_budget(pipe, keep=0.2)
    assert sl.current_schedule(tight, 10).mean_keep <= 0.2


@torch.no_grad()
def step_through(pipe: StableDiffusion3Pipeline, call: dict[str, Tensor], steps: int) -> list[Tensor]:
    """The same input at every step of a generation: nothing moves, so what is reused is exact."""
    pipe.scheduler.set_timesteps(steps)
    outputs = []
    for time in pipe.scheduler.timesteps:
        outputs.append(pipe.transformer(**call, return_dict=False)[0])
        pipe.scheduler.step(outputs[-1], time, call["hidden_states"])
    return outputs


def test_where_nothing_moves_reuse_is_the_dense_model(pipe: StableDiffusion3Pipeline) -> None:
    pipe._guidance_scale = 0.0
    with torch.no_grad():
        dense = pipe.transformer(**tiny_inputs(2, 500.0), return_dict=False)[0]
    free(pipe, 0.4, warmup=0.2)
    outputs = step_through(pipe, tiny_inputs(2, 500.0), 5)
    assert sl.current_schedule(pipe).keep[1] != (64, 64, 64)
    for output in outputs:
        torch.testing.assert_close(output, dense, atol=1e-5, rtol=1e-4)
    # Without the keys and values of the tokens that are left out, the others see a smaller picture.
    free(pipe, 0.4, warmup=0.2, context=False)
    assert (step_through(pipe, tiny_inputs(2, 500.0), 5)[1] - dense).abs().max() > 1e-3


def test_residuals_that_grew_too_old_are_not_used(pipe: StableDiffusion3Pipeline) -> None:
    pipe._guidance_scale = 0.0
    free(pipe, 0.4, warmup=0.1, max_age=1)
    seen = {}
    routed_of(pipe).observer = lambda block, x, out, kept, text: seen.update(
        {(block, routed_of(pipe).context.step): (x, out, kept)}
    )
    step_through(pipe, tiny_inputs(2, 500.0), 10)
    state = {(0, token): 0 for token in range(64)}
    for step in range(1, 10):
        x, out, kept = seen[2, step]
        for token in range(64):
            if token in kept[0]:
                state[0, token] = step
            else:
                assert torch.equal(out[0, token], x[0, token]) == (step - state[0, token] > 1)


def test_pictures_of_a_batch_are_pictures_of_one(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    free(pipe)
    together = sample(pipe, PROMPTS, steps=5)
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            together[index : index + 1], sample(pipe, [prompt], steps=5, first_seed=index), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_a_generation_starts_from_nothing(pipe: StableDiffusion3Pipeline, sample: Any, warmup: float) -> None:
    free(pipe, warmup=warmup)
    alone = sample(pipe, PROMPTS[:1], steps=5)
    sample(pipe, PROMPTS[1:2], steps=3)
    assert torch.equal(sample(pipe, PROMPTS[:1], steps=5), alone)

    def stop(pipe: Any, step: int, time: Any, values: dict) -> dict:
        if step == 2:
            raise RuntimeError("stopped")
        return values

    with pytest.raises(RuntimeError, match="stopped"):
        sample(pipe, PROMPTS[1:2], steps=5, callback_on_step_end=stop)
    assert routed_of(pipe).residuals.megabytes > 0
    assert torch.equal(sample(pipe, PROMPTS[:1], steps=5), alone)
    assert routed_of(pipe).residuals.megabytes == 0  # nothing is held between generations


@torch.no_grad()
def test_batched_guidance_equals_separate_calls(pipe: StableDiffusion3Pipeline) -> None:
    free(pipe)
    pipe._guidance_scale = 3.0
    call = tiny_inputs(4, 500.0)

    def loop(split: bool) -> list[Tensor]:
        pipe.scheduler.set_timesteps(5)
        routed_of(pipe).reset()
        outputs, latents = [], call["hidden_states"]
        for time in pipe.scheduler.timesteps:
            now = call | {"hidden_states": latents, "timestep": torch.full((4,), float(time))}
            if split:
                halves = {}
                for name, part in (("cond", slice(2, None)), ("uncond", slice(2))):
                    with sl.branch(pipe, name):  # type: ignore[arg-type]
                        halves[name] = pipe.transformer(**{k: v[part] for k, v in now.items()}, return_dict=False)[0]
                output = torch.cat([halves["uncond"], halves["cond"]])
            else:
                with sl.branch(pipe, "both"):
                    output = pipe.transformer(**now, return_dict=False)[0]
            outputs.append(output)
            latents = pipe.scheduler.step(output, time, latents).prev_sample
        return outputs

    for batched, split in zip(loop(False), loop(True), strict=True):
        torch.testing.assert_close(batched, split, atol=1e-4, rtol=1e-4)


def test_without_memory_it_falls_back_to_the_norm_and_never_holds_more(
    pipe: StableDiffusion3Pipeline, sample: Any
) -> None:
    free(pipe, warmup=0.0, max_cache_mb=1e-6)
    starved = sample(pipe, PROMPTS[:1])
    assert routed_of(pipe).residuals.megabytes == 0
    sl.attach(pipe, sl.RoutingConfig(sl.TokenRouting(scores="norm", ratios="fixed"), keep=0.5))
    assert torch.equal(sample(pipe, PROMPTS[:1]), starved)


def test_the_plan_counts_attention_to_every_token(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    pipe._guidance_scale = 0.0
    free(pipe, 0.5, warmup=0.2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step_through(pipe, tiny_inputs(1, 500.0), 5)
    with sl.dense(pipe), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as dense:
        step_through(pipe, tiny_inputs(1, 500.0), 5)
    skipped = dense.get_total_flops() - counter.get_total_flops()
    routed = routed_of(pipe)
    whole = 5 * step_flops(routed.planner.costs, [64] * 4, 7)
    assert (1 - sl.planned_ratio(pipe)) * whole == pytest.approx(skipped, rel=1e-6)
    # A budget of FLOPs is kept by what is counted.
    sl.set_budget(pipe, compute=0.7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step_through(pipe, tiny_inputs(1, 500.0), 5)
    assert 0.66 * whole < whole - (dense.get_total_flops() - counter.get_total_flops()) <= 0.7 * whole


def test_a_learned_router_can_reuse_too(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    torch.manual_seed(0)
    sl.attach(pipe, sl.RoutingConfig(keep=0.5))
    routed = routed_of(pipe)
    plain = sample(pipe, PROMPTS[:1])
    with routed.variant(reuse=sl.Reuse(warmup=0.0)):
        assert not torch.equal(sample(pipe, PROMPTS[:1]), plain)
    assert torch.equal(sample(pipe, PROMPTS[:1]), plain)


def test_what_cannot_be_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match="Attach to the pipeline"):
        sl.attach(pipe.transformer, sl.RoutingConfig.training_free())
    with pytest.raises(sl.AdapterError, match="reuse=Reuse"):
        sl.RoutingConfig(sl.TokenRouting(scores="drift"))
    for field, value in (("max_age", 0), ("warmup", 1.0), ("max_cache_mb", 0.0)):
        with pytest.raises(sl.AdapterError, match=field):
            sl.RoutingConfig.training_free(**{field: value})
    with pytest.raises(sl.AdapterError, match="keep"):
        sl.RoutingConfig.training_free(keep=1.2)


def test_fused_projections_are_refused_by_name(pipe: StableDiffusion3Pipeline, sample: Any) -> None:
    free(pipe)
    attention = pipe.transformer.transformer_blocks[2].attn  # diffusers itself cannot fuse the dual ones
    attention.fuse_projections()
    separate = attention.processor
    attention.set_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(sl.ShivelightError, match="unfuse_qkv_projections"):
        sample(pipe, PROMPTS[:1])
    attention.set_processor(separate)
    sample(pipe, PROMPTS[:1])


def test_the_summary_tells_what_reuse_holds(pipe: StableDiffusion3Pipeline) -> None:
    free(pipe, max_age=7, max_cache_mb=12)
    text = sl.summary(pipe)
    assert "up to 7 steps old" in text and "at most 12" in text


def test_the_config_survives_json() -> None:
    config = sl.RoutingConfig.training_free(0.7, max_age=3, context=False)
    assert sl.RoutingConfig.from_dict(config.to_dict()) == config
    assert sl.RoutingConfig.from_dict({"tokens": None, "deltas": {"rank": 2}}).keep == 1.0
    assert replace(config, keep=0.5).keep == 0.5
