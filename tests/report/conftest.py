import pytest

from shivelight.evaluation.results import new_row
from shivelight.measurement.statistics import Estimate


def latency(median: float) -> dict:
    return {"median": median, "p10": 0.95 * median, "p90": 1.1 * median, "runs": 5}


@pytest.fixture
def results() -> dict:
    """A small run: dense, two step counts below it, our method at two budgets, an ablation and a peer."""
    rows = [
        new_row("random", {"keep": 0.6}, steps=25, latency_ms=latency(560.0), psnr_to_dense=17.0, kid=0.03),
        new_row("dense", {}, steps=25, latency_ms=latency(800.0), speedup=1.0, kid=0.010),
    ]
    for keep, milliseconds, decibel in ((0.8, 700.0, 25.0), (0.6, 560.0, 22.0)):
        rows.append(
            new_row(
                "tokens",
                {"keep": keep},
                steps=25,
                latency_ms=latency(milliseconds),
                planned_ratio=keep,
                flops_ratio=keep + 0.01,
                speedup=Estimate(800 / milliseconds, 1.0, 2.0, 5),
                speedup_end_to_end=760 / milliseconds,
                psnr_to_dense=Estimate(decibel, decibel - 0.5, decibel + 0.5, 48),
                kid=0.02,
                samples=48,
            )
        )
    rows += [
        new_row("fewer-steps", {"steps": 15}, steps=15, latency_ms=latency(480.0), psnr_to_dense=24.0, kid=0.014),
        new_row("fewer-steps", {"steps": 20}, steps=20, latency_ms=latency(640.0), psnr_to_dense=28.0, kid=0.012),
        new_row("cache-dit", {}, steps=25, latency_ms=latency(500.0), psnr_to_dense=23.0),
    ]
    return {
        "schema": 1,
        "command": "shivelight evaluate <pipeline>",
        "commit": "abc123",
        "machine": {"device": "A processor", "torch": "2.13.0", "diffusers": "0.42.1", "threads": 2},
        "seed": 0,
        "backbone": {"class": "SD3Transformer2DModel", "parameters": 12_345_678, "tokens": 256},
        "split": "test",
        "rows": rows,
    }
