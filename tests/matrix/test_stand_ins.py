"""Maps for steps at rest, fitted to every family through its own pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import close, free
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shivelight as sl
from shivelight.adapter import routed_of


def fitted(pipe: Any, name: str, steps: int = 6, rank: int = 2) -> sl.FittedRests:
    free(pipe, 1.0)
    (found,) = sl.fit_stand_ins(
        pipe, generate=lambda: FAMILIES[name](pipe, 1, 2, steps=steps), computes=(0.5,), rank=rank
    )
    sl.set_budget(pipe, compute=found.compute)
    return found


def test_they_are_planned_counted_and_saved(name: str, tmp_path: Path) -> None:
    pipe, call = build(name), FAMILIES[name]
    dense = call(pipe, 0)
    found = fitted(pipe, name)
    assert found.plan.steps == 6 and len(found.plan.runs) == 3 and len(found.left) == 3
    drawn = call(pipe, 0)
    assert sl.planned_ratio(pipe, 6) == pytest.approx(routed_of(pipe).spending.ratio)
    assert 0.5 < sl.planned_ratio(pipe, 6) <= found.compute
    sl.set_budget(pipe, compute=0.5)  # pays for what runs, not for the maps
    plain = call(pipe, 0)
    assert sl.planned_ratio(pipe, 6) == pytest.approx(0.5) and not torch.equal(plain, drawn)
    sl.set_budget(pipe, compute=found.compute)
    assert torch.equal(call(pipe, 0), drawn)
    sl.save_adapter(pipe, tmp_path)
    with sl.dense(pipe):
        assert torch.equal(call(pipe, 0), dense)
    sl.detach(pipe)
    assert torch.equal(call(pipe, 0), dense)
    sl.load_adapter(pipe, tmp_path)
    sl.set_budget(pipe, compute=found.compute)
    assert torch.equal(call(pipe, 0), drawn)


def test_they_cost_what_torch_counts(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]

    def counted() -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(pipe, 0, **call.unguided)
        return float(counter.get_total_flops())

    free(pipe, 1.0)
    sl.fit_stand_ins(pipe, generate=lambda: call(pipe, 1, 2, **call.unguided), computes=(0.5,), rank=3)
    routed, flops = routed_of(pipe), {}
    for compute in (0.5, 0.99):  # the second pays for the maps, and 3 of 6 steps
        sl.set_budget(pipe, compute=compute if compute == 0.5 else 0.66)
        flops[compute] = counted()
    spent = routed.planner.dense_flops(*routed.shape)[0] * 6 * (sl.planned_ratio(pipe, 6) - 0.5)
    assert spent > 0 and flops[0.99] - flops[0.5] == pytest.approx(spent, rel=1e-9)


def test_a_batch_is_its_samples(name: str) -> None:
    pipe, call = build(name), FAMILIES[name]
    fitted(pipe, name)
    together = call(pipe, 0, 1, 2)
    for sample in range(3):
        close(call(pipe, sample), together[sample : sample + 1])
