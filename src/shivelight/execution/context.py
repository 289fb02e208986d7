"""Time has one owner: which generation, step and guidance branch a forward pass of the backbone belongs to.

With a pipeline attached, everything is read live from `pipe.scheduler`: its `step_index` (multi-call solvers such as Heun
list every call in `timesteps`), or, of an older scheduler that keeps none, the place of the pass's timestep among its
`timesteps`, which costs one transfer a pass. A bare transformer has no steps: its passes are
independent, and its timesteps are looked up on a grid of 1000 points.
"""

import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shivelight.errors import ShivelightError

Branch = Literal["single", "both", "cond", "uncond"]
BRANCHES: tuple[Branch, ...] = ("single", "both", "cond", "uncond")
GRID = tuple(float(t) for t in range(1, 1001))


@dataclass
class StepContext:
    """Where the current forward pass stands.

    Attributes:
        generation: number of generations begun since attach; 0 where no pipeline runs.
        steps: timesteps of the generation's model calls, from its first one on; None for a bare transformer.
        step: index into `steps`.
        call: how many passes this step has seen before this one (guidance by separate calls, extra passes).
        branch: "both" is a batch of [unconditional; conditional] halves, "single" a batch of independent samples.
        timestep: of each sample, from 0 to 1000, [B] or scalar.
        given_timestep: as passed to the backbone; a family may take one for each token.
        time_embedding: [B, T], the backbone's own.
        condition: [B, C], the backbone's embedding of the pooled condition, or None.
        text_tokens: M, noted by the root for blocks whose streams are joined.
        choices: the conditional branch's scores per block, which rank the tokens of a separate unconditional call too.
        memo: what is worked out once in a pass and asked for by every block.
    """

    generation: int = 0
    steps: tuple[float, ...] | None = None
    step: int = 0
    call: int = 0
    branch: Branch = "single"
    timestep: Tensor | None = None
    given_timestep: Tensor | None = None
    time_embedding: Tensor | None = None
    condition: Tensor | None = None
    text_tokens: int = 0
    choices: dict[int, Tensor] = field(default_factory=dict)
    memo: dict[Hashable, Any] = field(default_factory=dict)


def is_set(scheduler: Any) -> bool:
    """Whether a scheduler holds the timesteps of a generation, rather than those it was made with."""
    if hasattr(scheduler, "num_inference_steps"):
        return scheduler.num_inference_steps is not None
    # hy3dgen's does not note how many it was given; all that it trains on are those it was made with.
    return len(scheduler.timesteps) != getattr(scheduler.config, "num_train_timesteps", None)


class Clock:
    """Turns calls of the backbone into `StepContext`s.

    Args:
        pipeline: the diffusers pipeline, held weakly, or None for a bare transformer.
        guidance: how the family's pipelines do classifier-free guidance (see `BackboneSpec`).
    """

    def __init__(self, pipeline: Any | None, guidance: str) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._guidance = guidance
        self._timesteps: Tensor | None = None
        self._finished: Tensor | None = None
        self._begin = 0
        self._forced: Branch | None = None
        self.context = StepContext()

    @property
    def pipeline(self) -> Any | None:
        """The attached pipeline, while it lives."""
        return None if self._pipeline is None else self._pipeline()

    def reset(self) -> None:
        """Forget the generation: the next pass starts from nothing."""
        if self._timesteps is not None:
            # A generation that its user stopped early leaves its scheduler in the middle.
            self._finished, self._timesteps = self._timesteps, None
        self.context = StepContext(generation=self.context.generation)

    def tick(self, timestep: Tensor | None) -> StepContext:
        """Note one forward pass that begins now."""
        running = self._running_scheduler(timestep)
        previous = self.context
        if running is None:
            kept = previous.choices if self._forced == "uncond" else {}
            self.context = StepContext(previous.generation, branch=self._forced or "single", choices=kept)
        else:
            scheduler, index, begin = running
            # set_timesteps makes a new tensor each time, so an interrupted generation never leaks into the next one.
            fresh = scheduler.timesteps is not self._timesteps
            if fresh:
                self._timesteps, self._begin = scheduler.timesteps, begin
                steps: tuple[float, ...] | None = tuple(float(t) for t in scheduler.timesteps[begin:].tolist())
            else:
                steps = previous.steps
            same_step = not fresh and previous.step == index - begin and previous.steps is not None
            call = previous.call + 1 if same_step else 0
            self.context = StepContext(
                generation=previous.generation + fresh,
                steps=steps,
                step=index - begin,
                call=call,
                branch=self._forced or self._pipeline_branch(call),
                choices=previous.choices if call else {},
            )
        self.context.timestep = timestep
        return self.context

    @contextmanager
    def forced(self, branch: Branch) -> Iterator[None]:
        """Say what the passes in this block are, for loops that are not a pipeline's."""
        if branch not in BRANCHES:
            raise ShivelightError(f"branch is {branch!r}; one of {', '.join(map(repr, BRANCHES))}.")
        previous, self._forced = self._forced, branch
        try:
            yield
        finally:
            self._forced = previous

    def _running_scheduler(self, timestep: Tensor | None) -> tuple[Any, int, int] | None:
        """(scheduler, index of this call in its timesteps, index of the generation's first call), inside a generation."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        if scheduler is None or not is_set(scheduler):
            return None
        if scheduler.timesteps is self._finished:
            return None
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:
            begin = self._begin if scheduler.timesteps is self._timesteps else self._first_place(timestep, scheduler)
        if hasattr(scheduler, "step_index"):
            index = begin if scheduler.step_index is None else scheduler.step_index
        else:
            found = self._place_of(timestep, scheduler.timesteps)
            if found is None:
                return None
            index = found
        return (scheduler, index, begin) if begin <= index < len(scheduler.timesteps) else None

    def _first_place(self, timestep: Tensor | None, scheduler: Any) -> int:
        """Where a generation begins of which nobody told the scheduler (image to image, in some pipelines)."""
        if timestep is None or getattr(scheduler, "step_index", 0) is not None:
            return 0
        now, times = float(timestep.reshape(-1)[0]), scheduler.timesteps.tolist()
        nearest = min(abs(time - now) for time in times)
        rounding = torch.finfo(timestep.dtype).eps * now if timestep.is_floating_point() else 0.0
        if nearest > max(0.1, rounding):
            return 0
        places = [place for place, time in enumerate(times) if abs(time - now) == nearest]
        return (*places, 0)[1 if len(places) > 1 else 0]  # the second of a pair of calls, as schedulers have it

    def _place_of(self, timestep: Tensor | None, timesteps: Tensor) -> int | None:
        """Where a pass's timestep lies among those of the generation; where it is listed twice, not before the last pass."""
        if timestep is None:
            return None
        steps = self.context.steps if timesteps is self._timesteps and self.context.steps else None
        last, places = (0, timesteps.tolist()) if steps is None else (self.context.step, list(steps))
        now = float(timestep.reshape(-1)[0])
        return next((place for place in range(last, len(places)) if abs(places[place] - now) < 1e-3), None)

    def _pipeline_branch(self, call: int) -> Branch:
        # Some pipelines of true guidance do not say whether they guide; a step's second call tells.
        says = hasattr(self.pipeline, "do_classifier_free_guidance") or self._guidance != "separate"
        if says and not getattr(self.pipeline, "do_classifier_free_guidance", False):
            return "single"
        if self._guidance == "batched":
            # Extra passes of a step (skip-layer guidance) hold the conditional samples alone.
            return "both" if call == 0 else "single"
        if self._guidance == "separate":
            return ("cond", "uncond", "single")[min(call, 2)]
        return "single"
