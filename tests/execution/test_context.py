import gc

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Pipeline,
)

import shivelight as sl
from shivelight.execution.context import Clock, StepContext


def advance(pipe: StableDiffusion3Pipeline, passes: int = 1, clock: Clock | None = None) -> list[StepContext]:
    """One step of the pipeline's scheduler after `passes` calls of the backbone."""
    scheduler = pipe.scheduler
    time = scheduler.timesteps[scheduler.step_index or scheduler.begin_index or 0]
    contexts = [clock.tick(time[None]) for _ in range(passes)] if clock else []
    scheduler.step(torch.zeros(1, 4), time, torch.zeros(1, 4))
    return contexts


def started(pipe: StableDiffusion3Pipeline, steps: int = 3, guidance: float = 3.0, begin: int | None = None) -> None:
    pipe._guidance_scale = guidance
    pipe.scheduler.set_timesteps(steps)
    if begin is not None:
        pipe.scheduler.set_begin_index(begin)


def test_every_step_is_counted_and_a_new_generation_starts_from_nothing(pipe: StableDiffusion3Pipeline) -> None:
    clock = Clock(pipe, "batched")
    for generation in (1, 2):
        started(pipe)
        contexts = [advance(pipe, clock=clock)[0] for _ in range(3)]
        assert [(c.generation, c.step, c.call, c.branch) for c in contexts] == [
            (generation, step, 0, "both") for step in range(3)
        ]
        assert all(c.steps == tuple(pipe.scheduler.timesteps.tolist()) for c in contexts)
        assert [c.timestep.item() for c in contexts] == list(contexts[0].steps)


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [("batched", ["both", "single", "single"]), ("separate", ["cond", "uncond", "single"]), ("none", ["single"] * 3)],
)
def test_the_passes_of_a_step_are_told_apart(
    pipe: StableDiffusion3Pipeline, guidance: str, branches: list[str]
) -> None:
    clock = Clock(pipe, guidance)
    started(pipe)
    for step in range(3):
        contexts = advance(pipe, passes=3, clock=clock)
        assert [(c.step, c.call, c.branch) for c in contexts] == [(step, call, branches[call]) for call in range(3)]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_scheduler_without_a_step_index_is_followed_by_its_timesteps(
    pipe: StableDiffusion3Pipeline, scheduler: type
) -> None:
    pipe.scheduler = scheduler()
    assert not hasattr(pipe.scheduler, "step_index")
    clock = Clock(pipe, "separate")
    for generation in (1, 2):
        pipe.scheduler.set_timesteps(4)
        contexts = [clock.tick(time.expand(2)) for time in pipe.scheduler.timesteps for _ in range(2)]
        assert [(c.generation, c.step, c.call) for c in contexts] == [
            (generation, step, call) for step in range(4) for call in range(2)
        ]
        assert contexts[0].steps == tuple(float(time) for time in pipe.scheduler.timesteps)
    # A timestep that is none of them, and one that is not given, belong to no generation.
    assert clock.tick(torch.tensor(0.5)).steps is None and clock.tick(None).steps is None


@pytest.mark.parametrize("times", [None, [800, 700, 800, 700, 600]])
def test_a_timestep_that_is_listed_twice_never_goes_back(
    pipe: StableDiffusion3Pipeline, times: list[int] | None
) -> None:
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    pipe.scheduler.set_timesteps(4)
    if times is not None:  # back and forth, as inpainting by resampling does
        pipe.scheduler.timesteps = torch.tensor(times)
    listed = pipe.scheduler.timesteps.tolist()
    assert len(set(listed)) < len(listed)
    clock = Clock(pipe, "none")
    steps = [clock.tick(time).step for time in pipe.scheduler.timesteps]
    assert steps == sorted(steps) and [listed[step] for step in steps] == listed


class SilentPipeline:
    """Guides by separate calls without a property that says so, as Qwen-Image's pipeline does."""

    def __init__(self, pipe: StableDiffusion3Pipeline) -> None:
        self.scheduler = pipe.scheduler


def test_a_pipeline_that_does_not_say_whether_it_guides_is_told_by_its_calls(pipe: StableDiffusion3Pipeline) -> None:
    silent = SilentPipeline(pipe)
    clock = Clock(silent, "separate")
    pipe.scheduler.set_timesteps(2)
    for _ in range(2):
        assert [c.branch for c in advance(pipe, passes=2, clock=clock)] == ["cond", "uncond"]


def test_choices_live_for_one_step(pipe: StableDiffusion3Pipeline) -> None:
    clock = Clock(pipe, "separate")
    started(pipe)
    cond = clock.tick(None)
    cond.choices[1] = torch.ones(1)
    assert clock.tick(None).choices is cond.choices
    advance(pipe)
    assert clock.tick(None).choices == {}
    started(pipe)
    for _ in range(2):
        clock.tick(None).choices[1] = torch.ones(1)
        started(pipe)  # interrupted in its first step: the same step index and shapes, another generation
        context = clock.tick(None)
        assert (context.choices, context.call, context.branch) == ({}, 0, "cond")


def test_without_guidance_a_batch_is_independent_samples(pipe: StableDiffusion3Pipeline) -> None:
    started(pipe, guidance=1.0)
    assert Clock(pipe, "batched").tick(None).branch == "single"


def test_the_begin_index_is_where_the_schedule_starts(pipe: StableDiffusion3Pipeline) -> None:
    clock = Clock(pipe, "batched")
    started(pipe, steps=5, begin=3)
    contexts = [advance(pipe, clock=clock)[0] for _ in range(2)]
    assert [c.step for c in contexts] == [0, 1]
    assert contexts[0].steps == tuple(pipe.scheduler.timesteps[3:].tolist())


@pytest.mark.parametrize(("dtype", "place"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float32, None)])
def test_a_generation_that_nobody_announced_begins_at_the_timestep_it_is_called_with(
    pipe: StableDiffusion3Pipeline, dtype: torch.dtype, place: int | None
) -> None:
    pipe.scheduler.set_timesteps(7)
    # A timestep of nobody's schedule says nothing.
    time = pipe.scheduler.timesteps[2] if place is not None else pipe.scheduler.timesteps[2] + 5.0
    context = Clock(pipe, "none").tick(time.to(dtype).expand(2))
    assert context.step == 0 and len(context.steps) == 7 - (place or 0)


def test_every_call_of_a_multi_call_solver_is_a_step(pipe: StableDiffusion3Pipeline) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    clock = Clock(pipe, "batched")
    started(pipe, steps=3)
    contexts = [advance(pipe, clock=clock)[0] for _ in range(5)]
    assert [(c.step, c.call) for c in contexts] == [(step, 0) for step in range(5)]
    assert [c.timestep.item() for c in contexts] == list(contexts[0].steps)


def test_a_finished_generation_leaves_a_bare_transformer(pipe: StableDiffusion3Pipeline) -> None:
    clock = Clock(pipe, "batched")
    started(pipe, steps=2)
    for _ in range(2):
        advance(pipe, clock=clock)
    clock.reset()
    context = clock.tick(torch.tensor([400.0]))
    assert (context.steps, context.branch, context.step) == (None, "single", 0)


def test_before_any_generation_and_without_a_pipeline_passes_are_independent(pipe: StableDiffusion3Pipeline) -> None:
    for clock in (Clock(pipe, "batched"), Clock(None, "batched")):
        context = clock.tick(torch.tensor([400.0]))
        assert (context.generation, context.steps, context.branch) == (0, None, "single")


def test_the_pipeline_is_held_weakly(pipe: StableDiffusion3Pipeline) -> None:
    mine = StableDiffusion3Pipeline(**pipe.components)
    clock = Clock(mine, "batched")
    assert clock.pipeline is mine
    del mine
    gc.collect()
    assert clock.pipeline is None and clock.tick(None).steps is None


def test_a_forced_branch_ends_with_its_block_and_passes_choices_on() -> None:
    clock = Clock(None, "batched")
    with clock.forced("cond"):
        clock.tick(None).choices[1] = torch.ones(1)
    with clock.forced("uncond"):
        context = clock.tick(None)
        assert context.branch == "uncond" and 1 in context.choices
    with pytest.raises(RuntimeError), clock.forced("both"):
        raise RuntimeError
    assert clock.tick(None).branch == "single" and clock.context.choices == {}
    with pytest.raises(sl.ShivelightError, match="'left'.*'both'"), clock.forced("left"):  # type: ignore[arg-type]
        pass
