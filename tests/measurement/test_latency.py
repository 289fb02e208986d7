import gc
import time

import pytest
import torch
from torch import nn

from shivelight.errors import ShivelightError
from shivelight.measurement.latency import ModuleClock, Timings, interleave, synchronize
from shivelight.measurement.memory import peak_memory_mb


def test_methods_take_turns_and_warmup_is_not_counted():
    calls = []
    ticks = []
    timings = interleave(
        {"dense": lambda: calls.append("dense"), "tokens": lambda: calls.append("tokens")},
        rounds=3,
        warmup=2,
        progress=ticks.append,
    )
    assert calls == ["dense", "tokens"] * 5 == ticks
    assert timings.latency_ms("dense")["runs"] == 3
    assert timings.inner == {}


def test_the_device_is_waited_for_before_and_after_each_run():
    events = []
    interleave({"a": lambda: events.append("run")}, rounds=2, warmup=0, sync=lambda: events.append("sync"))
    assert events == ["sync", "run", "sync"] * 2


def test_speedup_is_the_median_of_paired_ratios():
    # The machine slows down tenfold half way: medians of each method would say 1.0 / 5.5; every pair says 2.
    timings = Timings({"dense": [2.0, 2.0, 20.0, 20.0, 20.0], "tokens": [1.0, 1.0, 10.0, 10.0, 10.0]})
    estimate = timings.speedup("tokens")
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)
    assert estimate.samples == 5
    noisy = Timings({"dense": [2.0, 3.0, 4.0, 11.0], "tokens": [1.0, 1.0, 1.0, 1.0]}).speedup("tokens")
    assert noisy.value == 3.5
    assert noisy.low < 3.5 < noisy.high


def test_latency_is_in_milliseconds_with_its_spread():
    latency = Timings({"a": [0.001 * value for value in range(1, 12)]}).latency_ms("a")
    assert latency == {"median": pytest.approx(6.0), "p10": pytest.approx(2.0), "p90": pytest.approx(10.0), "runs": 11}


def test_real_time_is_measured():
    timings = interleave({"fast": lambda: time.sleep(0.005), "slow": lambda: time.sleep(0.02)}, rounds=3, warmup=0)
    assert timings.latency_ms("slow")["median"] >= 20
    assert timings.latency_ms("fast")["median"] >= 5
    assert timings.speedup("fast", baseline="slow").value > 1.5


class Sleeper(nn.Module):
    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        time.sleep(0.01 * times)
        return x


def test_the_clock_counts_the_backbone_and_nothing_else():
    backbone = Sleeper()

    def pipeline() -> None:
        time.sleep(0.03)
        for _ in range(2):
            backbone(torch.zeros(1), times=1)

    timings = interleave({"dense": pipeline}, rounds=3, warmup=1, clock=ModuleClock(backbone))
    inner, total = timings.latency_ms("dense", inner=True)["median"], timings.latency_ms("dense")["median"]
    assert inner >= 20
    assert total >= inner + 30
    assert not backbone._forward_hooks and not backbone._forward_pre_hooks


def test_a_failing_run_leaves_no_hooks_and_garbage_collection_on():
    backbone = Sleeper()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"dense": fail}, clock=ModuleClock(backbone))
    assert not backbone._forward_hooks and not backbone._forward_pre_hooks
    assert gc.isenabled()


def test_collection_is_off_while_timing():
    states = []
    interleave({"a": lambda: states.append(gc.isenabled())}, rounds=1, warmup=1)
    assert states == [False, False]


def test_bad_requests_are_named():
    with pytest.raises(ShivelightError, match="0 methods"):
        interleave({})
    with pytest.raises(ShivelightError, match="rounds=0"):
        interleave({"a": lambda: None}, rounds=0)
    with pytest.raises(ShivelightError, match="'tokens' was not timed.*dense"):
        Timings({"dense": [1.0]}).speedup("tokens")
    with pytest.raises(ShivelightError, match="inside a clock"):
        Timings({"dense": [1.0]}).latency_ms("dense", inner=True)


def test_a_cpu_has_no_memory_count_and_needs_no_waiting():
    assert peak_memory_mb(lambda: None, "cpu") is None
    assert synchronize("cpu") is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_clock_agrees_with_the_wall_and_memory_is_counted():
    layer = nn.Linear(4096, 4096, device="cuda")
    x = torch.randn(8192, 4096, device="cuda")

    def run() -> None:
        for _ in range(10):
            layer(x)

    timings = interleave({"dense": run}, rounds=5, sync=synchronize("cuda"), clock=ModuleClock(layer))
    inner, total = timings.latency_ms("dense", inner=True)["median"], timings.latency_ms("dense")["median"]
    assert 0.5 * total < inner <= 1.01 * total
    memory = peak_memory_mb(run, "cuda")
    assert memory is not None and memory > (8192 + 4096) * 4096 * 4 / 1e6
