"""A backbone without a pipeline, stepped through a schedule on random input: for timing shapes whose weights are not at hand.

What is timed does not depend on the weights: which tokens and blocks run may, how many do not.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import shivelight as sl
from shivelight.adapter import install, prepare
from shivelight.backbones import find_spec
from shivelight.backbones.examples import example_call
from shivelight.budgets import planned_ratio
from shivelight.config import BlockRouting, RoutingConfig, TokenRouting
from shivelight.errors import BudgetError, ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.results import new_row
from shivelight.execution.attachment import compile_blocks
from shivelight.execution.compiled import CompiledRegions, Lengths
from shivelight.execution.replay import Replays
from shivelight.measurement.latency import interleave, synchronize
from shivelight.measurement.memory import peak_memory_mb


class BareLoop:
    """Samples on a schedule, as a pipeline runs them, without guidance, text encoders and autoencoder.

    Args:
        model: the backbone, on its device.
        samples: B of every pass.
        tokens: N, image tokens of a pass.
        text_tokens: M, of its text.
        steps: of the schedule.
        seed: of the input.

    Raises:
        UnsupportedBackboneError: the family's spec does not say what input looks like.
    """

    def __init__(self, model: Any, samples: int, tokens: int, text_tokens: int, steps: int, seed: int = 0) -> None:
        self.transformer, self.spec, self.steps = model, find_spec(model), steps
        self.samples, self.shape = samples, (tokens, text_tokens)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        reference = next(model.parameters())
        self.call = example_call(model, self.spec, samples, tokens, text_tokens, seed)
        self.regions: CompiledRegions | None = None
        self.cuda_graphs = False
        self._first = self.spec.model_arguments[0]
        self._times = torch.zeros(samples, device=reference.device)
        self._dense: Callable[[], AbstractContextManager[None]] | None = None
        self._whole: Any = None

    def compile(self, lengths: Lengths = "auto", cuda_graphs: bool = False, **options: Any) -> None:
        """Compile the backbone's blocks in every state; arguments as for `shivelight.compile`."""
        self.regions, self.cuda_graphs = CompiledRegions(lengths, options), cuda_graphs

    def attached(self, config: RoutingConfig, enabled: bool = True) -> Callable[[], AbstractContextManager[None]]:
        """A state in which the backbone is routed so, by fresh routers, or only hooked; compiled where the loop is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            routed = prepare(self, config)
            if routed.gates is not None:
                logits = torch.randn(64, len(routed.routed), 1 + len(routed.gates.config.widths))
                routed.gates.records.add(1000 * torch.rand(64), logits[..., 0], logits[..., 1:])
        routed.shape = self.shape

        @contextmanager
        def state() -> Iterator[None]:
            if self.regions is not None and routed.regions is not self.regions:
                compile_blocks(self.transformer, routed, self.regions, Replays(routed) if self.cuda_graphs else None)
            install(self, routed, {})
            routed.enable(enabled)
            try:
                yield
            finally:
                sl.detach(self)

        return state

    def dense(self) -> AbstractContextManager[None]:
        """The state in which nothing is routed; its blocks are compiled where the loop is."""
        if self.regions is None:
            return nullcontext()
        if self._dense is None:
            self._dense = self.attached(RoutingConfig.training_free(compute=1.0, axis="blocks"), enabled=False)
        return self._dense()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The state in which torch.compile runs the dense backbone as one graph, without us."""
        model = self.transformer
        if self._whole is None:
            options = {} if self.regions is None else self.regions.options
            if self.cuda_graphs:
                options = {"mode": "reduce-overhead", **options}
            self._whole = torch.compile(model, **{**options, "fullgraph": False, "dynamic": False})
        self.transformer = self._whole
        try:
            yield
        finally:
            self.transformer = model

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One generation; what the backbone gave last."""
        self.scheduler.set_timesteps(self.steps, device=self._times.device)
        latents = output = self.call[self._first]
        for time in self.scheduler.timesteps:
            now = self._times + time / self.spec.timestep_scale
            output = self.transformer(**self.call | {self._first: latents, self.spec.timestep_argument: now})
            output = output if isinstance(output, Tensor) else output[0]
            # Where a family gives more than velocities (learned variances), the first channels are of the input's kind.
            velocity = output if output.shape == latents.shape else output[:, : latents.shape[1]]
            latents = self.scheduler.step(velocity, time, latents)[0].to(latents.dtype)
        reset = getattr(self.transformer, "_reset_stateful_cache", None)
        if reset is not None:
            reset()
        return output


def bare_points(
    loop: BareLoop, keeps: Sequence[float], computes: Sequence[float]
) -> tuple[list[OperatingPoint], list[str]]:
    """What is timed beside dense; and of what cannot meet a budget, in so few steps, why.

    Args:
        loop: of the backbone.
        keeps: mean keep ratios of learned token routers (random ones, which cost as much).
        computes: shares of the dense FLOPs: for tokens that reuse, whole blocks and both, which need no training; and for block
            routers that skip, whose statistics are drawn at random, so that what they decide is known before the first step.
    """
    tokens = not loop.spec.no_tokens
    asked = [("tokens", {"keep": keep}, RoutingConfig(TokenRouting(), keep=keep)) for keep in keeps if tokens]
    axes: dict[str, Literal["tokens", "blocks", "both"]] = {"blocks+reuse": "blocks"}
    if tokens:
        axes = {"tokens+reuse": "tokens", **axes, "tokens+blocks+reuse": "both"}
    for compute in computes:
        for method, axis in axes.items():
            asked.append((method, {"compute": compute}, RoutingConfig.training_free(compute=compute, axis=axis)))
        static = RoutingConfig(None, BlockRouting(decide="static", widths=(1.0,)), compute=compute)
        asked.append(("blocks", {"compute": compute}, static))
    points, reasons = [], []
    for method, budget, config in asked:
        point = OperatingPoint(method, budget, loop.steps, loop.attached(config))
        try:
            with point.state():
                planned_ratio(loop, loop.steps)
            points.append(point)
        except BudgetError as error:
            reasons.append(f"{method}: {error}")
    return points, reasons


def timed_rows(
    loop: BareLoop,
    points: Sequence[OperatingPoint],
    rounds: int,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    described: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of results.json: dense and every point, timed in turns; speed-ups are of whole generations of the backbone.

    Args:
        loop: of the backbone.
        points: from `bare_points`.
        rounds: timed ones.
        seed: of the intervals.
        progress: told the name of each run.
        described: further entries of every row.
    """
    dense = OperatingPoint("dense", {}, loop.steps, loop.dense)
    points = [dense, *points]
    if loop.regions is not None:
        points.append(OperatingPoint("dense", {"whole": 1}, loop.steps, loop.whole, peer=True))
    device = next(loop.transformer.parameters()).device
    warmup = 2 if loop.cuda_graphs else 1  # what is recorded is so at the second run
    timings = interleave(
        {point.name: loop for point in points}, rounds, warmup, synchronize(device), None, progress,
        {point.name: point.state for point in points},
    )  # fmt: skip
    rows = []
    for point in points:
        speedup = None if point is dense else timings.speedup(point.name, dense.name, seed=seed)
        with point.state():
            planned = _planned(loop, point, dense.steps)
            peak = peak_memory_mb(loop, device)
        rows.append(
            new_row(
                point.method, point.budget, planned_ratio=planned, latency_ms=timings.latency_ms(point.name), speedup=speedup,
                efficiency=None if speedup is None or planned is None else speedup.value * planned, peak_memory_mb=peak,
                steps=point.steps, batch=loop.samples, dtype=str(loop.transformer.dtype).removeprefix("torch."),
                compiled=loop.regions is not None, cuda_graphs=loop.cuda_graphs or None,
                **described or {},
            )
        )  # fmt: skip
    return rows


def _planned(loop: BareLoop, point: OperatingPoint, steps: int) -> float | None:
    """Planned FLOPs of the blocks over those of so many dense steps, in the point's own state; None where nothing is known."""
    if point.plan is not None:
        return point.plan(loop.shape) * point.steps / steps
    if not point.budget:
        return point.steps / steps
    return None if point.peer else planned_ratio(loop, steps)


def check_memory(parameters: int, dtype: torch.dtype, device: torch.device | str, name: str) -> None:
    """`ShivelightError` where the weights alone do not fit into what the device has free."""
    device = torch.device(device)
    needed = parameters * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    else:
        return
    if needed > 0.9 * free:
        raise ShivelightError(
            f"The weights of {name} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}. Time fewer of its "
            "blocks (--blocks 2), use --dtype bfloat16, or a larger device."
        )
