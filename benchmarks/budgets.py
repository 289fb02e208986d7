"""Budgets of time: what was asked for against what was realised, on the embedded pipeline and on a wider bare backbone.

    python benchmarks/budgets.py        # writes benchmarks/results/budgets.json

Dense and every point are timed in turns; a speed-up is the median over the rounds of the ratio within the round, of the backbone
over one generation. `held` says whether it is within 3% of what was asked for, or within the interquartile range of the rounds
if that is larger. Routing at intervals runs a whole number of steps, so it is held to the speed-up of the nearest number below,
which the row has as `predicted`. Tables are measured anew, into a folder of their own.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import shivelight as sl
from shivelight.adapter import install, prepare, routed_of
from shivelight.adapter_files import read_adapter
from shivelight.backbones.presets import read_preset
from shivelight.cli import common
from shivelight.cli.evaluate import describe
from shivelight.config import RoutingConfig, TokenRouting
from shivelight.demo import pipeline as embedded
from shivelight.errors import BudgetError
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.comparison import Adapter, Comparison, Setting
from shivelight.evaluation.results import new_results, new_row, write_results
from shivelight.evaluation.standard import method_name
from shivelight.execution.pricing import passes_per_step, predicted_ms
from shivelight.measurement.latency import ModuleClock, Timings, interleave, synchronize

State = Callable[[], AbstractContextManager[Any]]
TOLERANCE = 0.03
# What is asked for, by axis; the embedded backbone is small, so that routing tokens gains little there.
EMBEDDED: dict[str, tuple[float, ...]] = {"tokens": (1.2, 1.5), "blocks": (1.3, 1.5, 2.0), "tokens+blocks": (1.3, 1.6)}
FREE: dict[Literal["tokens", "blocks", "both"], tuple[float, ...]] = {
    "tokens": (1.2, 1.4),
    "blocks": (1.3, 1.5, 2.0),
    "both": (1.5,),
}
BARE_TOKENS = (1.2, 1.5, 2.0)


@contextmanager
def under(model: Any, adapter: Adapter, budget: dict[str, float]) -> Iterator[None]:
    """The model with this adapter at a budget of time."""
    install(model, *adapter)
    adapter[0].enable(True)
    sl.set_budget(model, **budget)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sl.detach(model)


def iqr(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float((high - low) / middle)


def predicted_speedup(model: Any, budget: dict[str, float], steps: tuple[float, ...]) -> tuple[float, float, float]:
    """(speed-up, milliseconds of a generation, share of the FLOPs) that the table promises for the plan that was chosen."""
    routed = routed_of(model)
    settled = routed.settling.settled(routed.budget, steps, routed.settling.load)
    table = routed.settling.stopwatch(routed.settling.load, False)
    request = routed.request(steps, routed.settling.load.tokens, routed.settling.load.text_tokens, settled)
    ms = predicted_ms(routed, table, request, settled)
    return table.dense_ms / ms, ms * len(steps) * passes_per_step(routed, routed.settling.load.branch), settled.value


def judged(
    model: Any,
    run: Callable[[], object],
    module: nn.Module,
    points: Sequence[tuple[str, dict[str, float], Adapter]],
    rounds: int,
    **described: Any,
) -> list[dict[str, Any]]:
    """One row for each point that can be reached."""
    device = next(module.parameters()).device
    states: dict[str, State] = {"dense": nullcontext}
    promised: dict[str, tuple[float, float, float]] = {}
    kept: dict[str, tuple[str, dict[str, float]]] = {}
    for method, budget, adapter in points:
        name = f"{described['variant']} {method} {budget}"
        state = partial(under, model, adapter, budget)
        try:
            with state():
                run()  # measures the table, if there is none
                steps = tuple(float(time) for time in model.scheduler.timesteps.tolist())
                promised[name] = predicted_speedup(model, budget, steps)
        except BudgetError as error:
            print(f"left out: {name}: {error}")
            continue
        states[name], kept[name] = state, (method, budget)
        print(f"{name}: compute {promised[name][2]:.4f}, predicted {promised[name][0]:.3f}x", flush=True)
    clock = ModuleClock(module)
    timings: Timings = interleave(
        dict.fromkeys(states, run), rounds, 1, synchronize(device), clock, lambda name: None, states
    )
    rows = [new_row("dense", latency_ms=timings.latency_ms("dense", inner=True), **described)]
    for name, (method, budget) in kept.items():
        ((kind, asked),) = budget.items()
        inner = timings.inner[name]
        ratios = [dense / own for dense, own in zip(timings.inner["dense"], inner, strict=True)]
        speedup = timings.speedup(name, "dense", inner=True)
        latency = timings.latency_ms(name, inner=True)
        realised = speedup.value if kind == "speedup" else latency["median"]
        predicted = promised[name][0 if kind == "speedup" else 1]
        spread = iqr(ratios if kind == "speedup" else inner)
        aim = predicted if method.startswith("training-free-b") else asked
        held = abs(realised / aim - 1) <= max(TOLERANCE, spread)
        rows.append(
            new_row(
                method, budget, latency_ms=latency, speedup=speedup, realised=realised, predicted=predicted,
                error=realised / aim - 1, interquartile=spread, held=held, compute=promised[name][2], **described,
            )
        )  # fmt: skip
        print(
            f"{name}: asked {asked:g}, predicted {predicted:.3f}, realised {realised:.3f} ({realised / aim - 1:+.1%}, "
            f"IQR {spread:.1%}) {'held' if held else 'MISSED'}",
            flush=True,
        )
    return rows


def embedded_rows(rounds: int, steps: int, device: str, results: dict[str, Any]) -> None:
    """The embedded pipeline with its adapters, and without any."""
    pipe = common.open_pipeline(None, device)
    sl.load_adapter(pipe, embedded.ADAPTER)
    comparison = Comparison(pipe, Setting(steps, embedded.GUIDANCE, options=common.call_options(pipe, None)))
    comparison.call([comparison.any], 1)
    results["backbone"] = describe(pipe)
    points: list[tuple[str, dict[str, float], Adapter]] = []
    for folder in (embedded.ADAPTER, embedded.REFRESHING, embedded.BOTH):
        if not folder.is_dir():
            continue
        adapter = read_adapter(pipe, folder)
        axes = "+".join(axis for axis in ("tokens", "blocks") if getattr(adapter[0].config, axis) is not None)
        points += [(method_name(adapter[0].config), {"speedup": asked}, adapter) for asked in EMBEDDED[axes]]
    for axis, asked_for in FREE.items():
        adapter = prepare(pipe, RoutingConfig.training_free(compute=1.0, axis=axis)), {}
        points += [(f"training-free-{axis}", {"speedup": asked}, adapter) for asked in asked_for]
    sl.detach(pipe)
    run = partial(comparison.call, [comparison.any], steps)
    # Milliseconds: what a speed-up of 1.4 takes here.
    clock = ModuleClock(pipe.transformer)
    dense = interleave({"dense": run}, 3, 1, synchronize(device), clock).latency_ms("dense", inner=True)["median"]
    points.append(("tokens", {"latency_ms": round(dense / 1.4, 1)}, points[0][2]))
    results["rows"] += judged(pipe, run, pipe.transformer, points, rounds, variant="embedded", steps=steps)


def bare_rows(rounds: int, steps: int, device: str, dtype: torch.dtype, results: dict[str, Any]) -> None:
    """A backbone of width 1024 on 1024 tokens, random weights."""
    preset = read_preset("sd3-cpu")
    loop = BareLoop(preset.build(device, dtype), 1, preset.image_tokens, preset.text_tokens, steps)
    points: list[tuple[str, dict[str, float], Adapter]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens: Adapter = prepare(loop, RoutingConfig(TokenRouting())), {}
    points += [("tokens", {"speedup": asked}, tokens) for asked in BARE_TOKENS]
    for axis, asked_for in FREE.items():
        adapter = prepare(loop, RoutingConfig.training_free(compute=1.0, axis=axis)), {}
        points += [(f"training-free-{axis}", {"speedup": asked}, adapter) for asked in asked_for]
    results["rows"] += judged(loop, loop, loop.transformer, points, rounds, variant="sd3-cpu", steps=steps)


@torch.no_grad()
def main() -> None:
    """Time both, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=["embedded", "bare"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the bare backbone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budgets.json"))
    args = parser.parse_args()
    device = common.DEFAULT_DEVICE
    common.quiet_libraries()
    if torch.device(device).type == "cpu":
        common.keep_freed_memory()
    results = new_results(device=device, tolerance=TOLERANCE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SHIVELIGHT_CACHE"] = cache
        if args.only != "bare":
            embedded_rows(args.rounds, args.steps, device, results)
        if args.only != "embedded":
            bare_rows(args.rounds, args.steps, device, getattr(torch, args.dtype), results)
    write_results(args.out, results)
    routed = [row for row in results["rows"] if "held" in row]
    print(f"{sum(row['held'] for row in routed)} of {len(routed)} held; {args.out}")


if __name__ == "__main__":
    main()
