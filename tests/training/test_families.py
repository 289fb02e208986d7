"""Every family trains through its own classes: tokens where its spec lets them, blocks everywhere; then the adapter is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import CAPTIONED, SIDES, captioned
from PIL import Image

import shivelight as sl
from shivelight.backbones import find_spec
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.errors import TrainingError
from shivelight.pipelines import draw
from shivelight.training.cache import LatentCache
from shivelight.training.data import build_cache, read_folder
from shivelight.training.estimate import estimate
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

TEXT = 16


def family_cache(pipe: Any, name: str, images: Path, folder: Path) -> LatentCache:
    if name == "dit":
        for label, caption in enumerate(sorted(images.glob("*.txt"))):
            caption.write_text(str(label))
    return build_cache(pipe, read_folder(images), folder, SIDES[name], None if name == "dit" else TEXT)


def short(**settings: Any) -> TrainingConfig:
    """Two steps of each stage."""
    return TrainingConfig(
        **{
            "router_steps": 2, "policy_steps": 2, "joint_steps": 2, "groups": 2, "group_size": 2, "warmup": 1,
            "checkpoint_every": 2, "calibration_batches": 2, "rank_batches": 1, "caption_drop": 0.3,
        } | settings
    )  # fmt: skip


def routing_of(axis: str, spec: Any) -> RoutingConfig:
    widths = BlockRouting.widths if all(kind.mlp is not None for kind in spec.blocks) else (1.0,)
    if axis == "tokens":
        return RoutingConfig(TokenRouting(), deltas=DeltaConfig(2, 2.0))
    return RoutingConfig(None, BlockRouting(widths=widths), DeltaConfig(2, 2.0))


def drawn(pipe: Any, name: str) -> torch.Tensor:
    """Two pictures [2, 3, S, S]."""
    captions = ["3", "500"] if name == "dit" else ["a b", "c d e f"]
    options = {"height": SIDES[name], "width": SIDES[name], "max_sequence_length": TEXT, "output_type": "pt"}
    return draw(pipe, captions, (0, 1), 3, **options)


def gradients_of(trainer: Trainer) -> dict[str, float]:
    """Largest gradients of each part that trains, noted in every step that follows."""
    largest: dict[str, float] = {}
    apply = trainer._apply_gradients

    def note() -> float:
        for name, parameter in trainer.named_parameters().items():
            if parameter.grad is not None:
                kind = name.split(".")[0]
                largest[kind] = max(largest.get(kind, 0.0), float(parameter.grad.abs().max()))
        return apply()

    trainer._apply_gradients = note  # type: ignore[method-assign]
    return largest


@pytest.mark.parametrize("axis", ["tokens", "blocks"])
@pytest.mark.parametrize("name", CAPTIONED)
def test_every_stage_trains_and_the_adapter_is_used(name: str, axis: str, images: Path, tmp_path: Path) -> None:
    pipe = captioned(name)
    spec = find_spec(pipe.transformer)
    if axis == "tokens" and spec.no_tokens:
        pytest.skip(spec.no_tokens)
    cache = family_cache(pipe, name, images, tmp_path / "cache")
    # With a dial that moves, fresh gates that all say the same may all close, and then no delta learns.
    config = short(policy_steps=2 if axis == "tokens" else 0, gate_low=None, gate_high=None)
    trainer = Trainer(pipe, routing_of(axis, spec), config, cache, tmp_path / "run")
    largest = gradients_of(trainer)
    folder = trainer.run()
    assert all(torch.isfinite(torch.tensor(list(record.values()))).all() for record in trainer.history)
    assert all(trainer.denoiser.loss in record and record[trainer.denoiser.loss] > 0 for record in trainer.history)
    learned = {"router", "policy"} if axis == "tokens" else {"gates"}
    assert set(largest) == learned | {"deltas"} and min(largest.values()) > 0
    sl.set_budget(pipe, compute=0.7)
    trained = drawn(pipe, name)
    trainer.close()
    dense = drawn(pipe, name)
    sl.load_adapter(pipe, folder)
    sl.set_budget(pipe, compute=0.7)
    assert torch.equal(drawn(pipe, name), trained) and not torch.equal(dense, trained)


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_a_run_that_was_killed_goes_on_exactly(name: str, images: Path, tmp_path: Path) -> None:
    pipe = captioned(name)
    cache = family_cache(pipe, name, images, tmp_path / "cache")
    axis = "tokens" if not find_spec(pipe.transformer).no_tokens else "blocks"
    runs = {}
    for run, stops in (("whole", (3,)), ("parts", (2, 3))):
        config = short(policy_steps=0, router_steps=1, preview_every=0 if run == "whole" else 3)
        for stop in stops:
            trainer = Trainer(pipe, routing_of(axis, find_spec(pipe.transformer)), config, cache, tmp_path / run)
            trainer.run(until=stop)
            trainer.close()
        logged = (tmp_path / run / "losses.jsonl").read_text().splitlines()
        runs[run] = [json.loads(line) | {"seconds": 0} for line in logged]
        runs[run].append((tmp_path / run / "adapter/adapter_model.safetensors").read_bytes())
    assert runs["whole"] == runs["parts"] and len(runs["whole"]) == 4
    # Dense above routed, at the size of training.
    assert Image.open(tmp_path / "parts/preview-000003.png").size == (4 * SIDES[name], 2 * SIDES[name])


@pytest.mark.parametrize("name", CAPTIONED)
def test_previews_and_estimates_change_nothing(name: str, images: Path, tmp_path: Path) -> None:
    pipe = captioned(name)
    cache = family_cache(pipe, name, images, tmp_path / "cache")
    routing, config = routing_of("blocks", find_spec(pipe.transformer)), short(policy_steps=0)
    losses = []
    for looks in (False, True):
        trainer = Trainer(pipe, routing, config, cache, tmp_path / "run")
        if looks:
            assert estimate(trainer)["steps"] == 4
            trainer.preview(tmp_path / "grid.png", count=2)
            assert Image.open(tmp_path / "grid.png").size == (2 * SIDES[name], 2 * SIDES[name])
        losses.append(trainer.train_step() | {"seconds": 0})
        trainer.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["flux", "pixart", "dit", "qwen-image"])
def test_measured_damage_trains_block_routers(name: str, images: Path, tmp_path: Path) -> None:
    pipe = captioned(name)
    cache = family_cache(pipe, name, images, tmp_path / "cache")
    routing = RoutingConfig(None, BlockRouting(widths=(1.0,), closed="reuse"), reuse=Reuse())
    config = short(policy_steps=0, gate_signal="damage")
    trainer = Trainer(pipe, routing, config, cache, tmp_path / "run")
    largest = gradients_of(trainer)
    trainer.run()
    assert largest["gates"] > 0 and all(record["damage"] > 0 for record in trainer.history)
    sl.set_budget(pipe, compute=0.7)
    assert torch.isfinite(drawn(pipe, name)).all()


def test_a_dropped_caption_is_the_empty_one(images: Path, tmp_path: Path) -> None:
    """Of classes the one after the last; of captions of any length that of nothing."""
    pipe = captioned("dit")
    cache = family_cache(pipe, "dit", images, tmp_path / "cache")
    assert cache.batch([2, 3], [False, True]).conditions["class_labels"].tolist() == [2, 1000]
    pipe = captioned("qwen-image")
    cache = family_cache(pipe, "qwen-image", images, tmp_path / "cache")
    (images / "0.txt").write_text("a b c d e f")
    cache = family_cache(pipe, "qwen-image", images, tmp_path / "cache")
    trainer = Trainer(pipe, routing_of("blocks", find_spec(pipe.transformer)), short(), cache, tmp_path / "run")
    draw_ = trainer.draws.at(0)[0]
    lengths = {}
    for key, indices, dropped in (("long", [0, 0], [False, False]), ("empty", [0, 0], [True, True]),
                                  ("mixed", [0, 1], [False, False])):  # fmt: skip
        draw_.indices, draw_.dropped = indices, dropped
        conditions = trainer.passes.batch(draw_).conditions
        lengths[key] = conditions["encoder_hidden_states"].shape[1]
        assert ("encoder_hidden_states_mask" in conditions) == (key == "mixed")
    assert lengths["long"] == lengths["mixed"] > lengths["empty"]


def test_guidance_is_what_a_distilled_model_is_told(images: Path, tmp_path: Path) -> None:
    from shivelight.training.denoisers import denoiser_for

    pipe = captioned("flux")
    cache = family_cache(pipe, "flux", images, tmp_path / "cache")
    assert denoiser_for(pipe).guidance == 3.5, "the default of its pipeline"
    spec = find_spec(pipe.transformer)
    outputs, run = [], tmp_path / "run"
    for guidance in (2.0, 5.0):
        trainer = Trainer(
            pipe, routing_of("blocks", spec), short(policy_steps=0), cache, run, denoiser=denoiser_for(pipe, guidance)
        )
        with trainer.routed.switched(False):
            outputs.append(trainer.passes.predict(trainer.passes.batch(trainer.draws.at(0)[0])))
        if guidance == 2.0:
            trainer.run(until=1)
        else:
            with pytest.raises(TrainingError, match="guidance was 2.0, is 5.0"):
                trainer.run()
        trainer.close()
    assert not torch.equal(*outputs)
