"""Deltas tuned along the generation, through every family's own pipeline."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from matrix_help import free

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.training.tuner import TuneConfig, Tuner


@pytest.mark.parametrize(("precision", "adversarial"), [("no", 0.0), ("no", 0.5), ("bf16", 0.5)])
def test_every_run_is_tuned_and_dense_stays(name: str, tmp_path: Path, precision: Any, adversarial: float) -> None:
    pipe, call = build(name), FAMILIES[name]
    dense = call(pipe, 0)

    def generate(draw: Callable[..., Any], chosen: Sequence[int]) -> None:
        own = {key: value[list(chosen)] for key, value in call.arguments.items()}
        if "class_labels" in own:
            own["class_labels"] = own["class_labels"].tolist()
        noise = [torch.Generator().manual_seed(place) for place in chosen]
        given = {"generator": noise, "num_inference_steps": 6, "output_type": "latent"}
        known = inspect.signature(type(pipe).__call__).parameters
        options = call.shared | given | call.guided
        draw(**own, **{key: value for key, value in options.items() if key in known})

    free(pipe, 1.0)
    config = TuneConfig(
        6, (0.5,), iterations=2, batch=2, trajectories=2, rank=2, warmup=0, lr=1e-2, mixed_precision=precision,
        adversarial=adversarial,
    )  # fmt: skip
    tuner = Tuner(pipe, (), config, tmp_path, generate=generate)
    made = tuner.run()
    # Nothing comes of what the last block makes of the text; all else has learned.
    learned = [bool(delta.up.any()) for delta in routed_of(pipe).deltas.values()]
    assert sum(learned) > 0.7 * len(learned)
    sl.set_budget(pipe, compute=0.5)
    drawn = call(pipe, 0)
    assert bool(drawn.isfinite().all()) and not torch.equal(drawn, dense)
    with sl.dense(pipe):
        assert torch.equal(call(pipe, 0), dense)
    sl.detach(pipe)
    assert torch.equal(call(pipe, 0), dense)
    sl.load_adapter(pipe, made)
    sl.set_budget(pipe, compute=0.5)
    assert torch.equal(call(pipe, 0), drawn)
