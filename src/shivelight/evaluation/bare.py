"""A backbone without a pipeline, stepped through a schedule on random input: for timing shapes whose weights are not at hand.

What is timed does not depend on the weights: which tokens and blocks run may, how many do not.
"""

import os
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import BackboneSpec, find_spec
from shivelight.config import BlockRouting, Reuse, RoutingConfig, TokenRouting
from shivelight.errors import ShivelightError, UnsupportedBackboneError
from shivelight.evaluation.latency import Timings, interleave, peak_memory_mb, synchronize
from shivelight.evaluation.results import new_row


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

    def __init__(
        self, model: nn.Module, samples: int, tokens: int, text_tokens: int, steps: int, seed: int = 0
    ) -> None:
        self.transformer, self.spec, self.steps = model, find_spec(model), steps
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        reference = next(model.parameters())
        self.call = example_call(model, self.spec, samples, tokens, text_tokens, seed)
        self._first = self.spec.model_arguments[0]
        self._times = torch.zeros(samples, device=reference.device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One generation; what the backbone gave last."""
        self.scheduler.set_timesteps(self.steps, device=self._times.device)
        latents = output = self.call[self._first]
        for time in self.scheduler.timesteps:
            now = self._times + time / self.spec.timestep_scale
            output = self.transformer(**self.call | {self._first: latents, self.spec.timestep_argument: now})
            output = output if isinstance(output, Tensor) else output[0]
            # Wherever a family gives more than velocities (learned variances), the first channels are of the input's kind.
            velocity = output if output.shape == latents.shape else torch.zeros_like(latents)
            latents = self.scheduler.step(velocity, time, latents)[0].to(latents.dtype)
        reset = getattr(self.transformer, "_reset_stateful_cache", None)
        if reset is not None:
            reset()
        return output


def example_call(
    model: nn.Module, spec: BackboneSpec, samples: int, tokens: int, text_tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Random arguments of one call of a backbone, on its device and in its dtype; the timestep is left out."""
    if spec.example is None:
        raise UnsupportedBackboneError(
            f"The spec {spec.name!r} does not say what input of a {type(model).__name__} looks like; fill in `example`."
        )
    reference = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = spec.example(model, samples, tokens, text_tokens)
    call = {name: _moved(value, reference, name) for name, value in made.items()}
    if "return_dict" in spec.model_arguments:
        call["return_dict"] = False
    return call


def _moved(value: Any, reference: Tensor, name: str) -> Any:
    """On a parameter's device, and in its dtype unless it counts places."""
    if isinstance(value, dict):
        return {key: _moved(entry, reference, key) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    casts = value.is_floating_point() and not name.endswith("_ids")
    return value.to(reference.device, reference.dtype if casts else None)


def routings(
    keeps: list[float], computes: list[float], spec: BackboneSpec
) -> dict[str, tuple[str, dict[str, float], Any]]:
    """What is timed beside dense, by a name: (method, budget, config).

    Args:
        keeps: mean keep ratios of learned token routers (random ones, which cost as much).
        computes: shares of the dense FLOPs, for what needs no training: tokens that reuse, and whole blocks.
        spec: of the backbone.
    """
    points: dict[str, tuple[str, dict[str, float], Any]] = {}
    if not spec.no_tokens:
        for keep in keeps:
            config = RoutingConfig(TokenRouting(), keep=keep)
            points[f"tokens keep {keep:g}"] = ("tokens", {"keep": keep}, config)
    for compute in computes:
        budget = {"compute": compute}
        if not spec.no_tokens:
            config = RoutingConfig.training_free(compute=compute)
            points[f"tokens+reuse compute {compute:g}"] = ("tokens+reuse", budget, config)
        blocks = RoutingConfig(None, BlockRouting(router="interval", widths=(1.0,)), reuse=Reuse(), compute=compute)
        points[f"blocks+reuse compute {compute:g}"] = ("blocks+reuse", budget, blocks)
    return points


@contextmanager
def _attached(loop: BareLoop, config: RoutingConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sl.attach(loop, config)
    try:
        yield
    finally:
        sl.detach(loop)


def timed_rows(
    model: nn.Module,
    samples: int,
    tokens: int,
    text_tokens: int,
    steps: int,
    points: dict[str, tuple[str, dict[str, float], Any]],
    rounds: int,
    seed: int = 0,
    progress: Any = None,
    described: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of results.json: dense and every point, timed in turns; speed-ups are of whole generations of the backbone.

    Args:
        model: the backbone, on its device.
        samples, tokens, text_tokens, steps: see `BareLoop`.
        points: from `routings`.
        rounds: timed ones.
        seed: of input and intervals.
        progress: told the name of each run.
        described: further entries of every row.
    """
    loop = BareLoop(model, samples, tokens, text_tokens, steps, seed)
    device = next(model.parameters()).device
    planned = {}
    for name, (_, _, config) in points.items():
        with _attached(loop, config):
            planned[name] = routed_of(loop).planned_ratio(_steps(loop), tokens, text_tokens)
    states: dict[str, Any] = {name: partial(_attached, loop, config) for name, (_, _, config) in points.items()}
    timings = interleave(
        dict.fromkeys(["dense", *points], loop), rounds, 1, synchronize(device), None, progress, states
    )
    common = {
        "steps": steps,
        "batch": samples,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compiled": False,
    } | (described or {})
    rows = [_row("dense", {}, "dense", timings, 1.0, loop, None, common, seed)]
    for name, (method, budget, _) in points.items():
        rows.append(_row(method, budget, name, timings, planned[name], loop, states[name], common, seed))
    return rows


def _steps(loop: BareLoop) -> tuple[float, ...]:
    probe = FlowMatchEulerDiscreteScheduler()
    probe.set_timesteps(loop.steps)
    return tuple(float(time) for time in probe.timesteps)


def _row(
    method: str, budget: dict[str, float], name: str, timings: Timings, planned: float | None, loop: BareLoop,
    state: Any, common: dict[str, Any], seed: int,
) -> dict[str, Any]:  # fmt: skip
    speedup = None if method == "dense" else timings.speedup(name, seed=seed)
    with nullcontext() if state is None else state():
        peak = peak_memory_mb(loop, next(loop.transformer.parameters()).device)
    return new_row(
        method, budget, planned_ratio=planned, latency_ms=timings.latency_ms(name), speedup=speedup,
        efficiency=None if speedup is None or planned is None else speedup.value * planned, peak_memory_mb=peak, **common,
    )  # fmt: skip


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
