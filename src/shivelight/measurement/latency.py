"""Latency: methods timed in turns, A B A B, in one process, so that drift of the machine wrongs no method."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from shivelight.errors import ShivelightError
from shivelight.measurement.statistics import Estimate, bootstrap, median


def synchronize(device: torch.device | str) -> Callable[[], None] | None:
    """What to call before a clock is read: waits for the GPU; None on a CPU, where calls return when done."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None


class ModuleClock:
    """Time spent inside a module's forward, summed over its calls: the backbone's share of a whole pipeline call.

    On CUDA it records events and reads them once the call is over, so that the loop being timed is never made to wait.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._spans: list[tuple[Any, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        # Ours must be the outermost hooks: the first before the forward, the last after it.
        self._handles = [
            self.module.register_forward_pre_hook(self._start, prepend=True, with_kwargs=True),
            self.module.register_forward_hook(self._stop, with_kwargs=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> float:
        """Seconds since the last call of `take`."""
        total = 0.0
        for start, stop in self._spans:
            if isinstance(start, float):
                total += stop - start
            else:
                stop.synchronize()
                total += start.elapsed_time(stop) / 1000
        self._spans.clear()
        return total

    def _now(self) -> Any:
        if next((p.is_cuda for p in self.module.parameters()), False):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def _start(self, *_: Any) -> None:
        self._spans.append((self._now(), None))

    def _stop(self, *_: Any) -> None:
        start, _stop = self._spans.pop()
        self._spans.append((start, self._now()))


@dataclass
class Timings:
    """Seconds per method and round; `inner` is the part spent in a `ModuleClock`'s module, where one was passed."""

    total: dict[str, list[float]] = field(default_factory=dict)
    inner: dict[str, list[float]] = field(default_factory=dict)

    def latency_ms(self, method: str, inner: bool = False) -> dict[str, float | int]:
        """Median, 10th and 90th percentile in milliseconds and the number of runs, as results.json has them."""
        runs = 1000 * self._seconds(method, inner)
        p10, middle, p90 = torch.quantile(runs, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return {"median": middle, "p10": p10, "p90": p90, "runs": len(runs)}

    def speedup(self, method: str, baseline: str = "dense", inner: bool = False, seed: int = 0) -> Estimate:
        """How many times faster than the baseline: the median over rounds of the ratio within the round."""
        ratios = self._seconds(baseline, inner) / self._seconds(method, inner)
        return bootstrap(ratios, statistic=median, seed=seed)

    def _seconds(self, method: str, inner: bool) -> Tensor:
        table = self.inner if inner else self.total
        if method not in table:
            raise ShivelightError(
                f"{method!r} was not timed{' inside a clock' if inner else ''}: timed were {sorted(table)}"
            )
        return torch.tensor(table[method], dtype=torch.float64)


def interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    warmup: int = 2,
    sync: Callable[[], None] | None = None,
    clock: ModuleClock | None = None,
    progress: Callable[[str], None] | None = None,
    states: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> Timings:
    """Times every callable once a round, in order, for `rounds` rounds after `warmup` untimed ones.

    `sync` waits for the device (see `synchronize`); `clock` also sums the time in one module, such as the backbone in a
    pipeline; `progress` is told the method's name after each of the (warmup + rounds) * methods runs. Each run happens inside
    its method's state, whose beginning and end are not timed.
    """
    if not callables or rounds < 1 or warmup < 0:
        raise ShivelightError(
            "timing needs one method, one round and no negative warm-up, "
            f"got {len(callables)} methods, rounds={rounds}, warmup={warmup}"
        )
    if clock is not None:
        with clock:
            return _interleave(callables, rounds, warmup, sync, clock, progress, states or {})
    return _interleave(callables, rounds, warmup, sync, None, progress, states or {})


def _interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    sync: Callable[[], None] | None,
    clock: ModuleClock | None,
    progress: Callable[[str], None] | None,
    states: Mapping[str, Callable[[], AbstractContextManager[Any]]],
) -> Timings:
    timings = Timings({name: [] for name in callables}, {name: [] for name in callables} if clock else {})
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one run would be charged to one method
    try:
        for round_ in range(warmup + rounds):
            for name, run in callables.items():
                with states.get(name, nullcontext)():
                    if sync:
                        sync()
                    start = time.perf_counter()
                    run()
                    if sync:
                        sync()
                    seconds = time.perf_counter() - start
                inner = clock.take() if clock else 0.0
                if round_ >= warmup:
                    timings.total[name].append(seconds)
                    if clock:
                        timings.inner[name].append(inner)
                if progress:
                    progress(name)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return timings
