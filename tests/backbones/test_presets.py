"""Published shapes, counted on the meta device, against the figures their authors give."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import shivelight as sl
from shivelight.backbones import find_spec
from shivelight.backbones.presets import PRESETS, read_preset
from shivelight.cli import app
from shivelight.cost import backbone_costs, step_flops
from shivelight.evaluation.results import read_results

# Billions of parameters, as the models' own pages and papers round them.
PARAMETERS = {
    "sd35-medium": 2.24, "sd35-large": 8.06, "flux1-dev": 11.9, "flux2-dev": 32.0, "qwen-image": 20.4, "pixart-sigma-1024": 0.61,
    "wan21-1.3b": 1.42, "sana-1600m-1024": 1.6,
}  # fmt: skip


def multiply_adds(name: str) -> float:
    preset = read_preset(name)
    costs = backbone_costs(preset.build(), find_spec(preset.build()))
    return step_flops(costs, [preset.image_tokens] * len(costs), preset.text_tokens) / 2


@pytest.mark.parametrize("name", [name for name in PRESETS if not read_preset(name).missing])
def test_a_shape_is_built_without_memory_and_counted_by_its_spec(name: str) -> None:
    preset = read_preset(name)
    model = preset.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert preset.source and preset.title
    if name in PARAMETERS:
        billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        assert billions == pytest.approx(PARAMETERS[name], rel=0.01)
    assert multiply_adds(name) > 0


@pytest.mark.parametrize(("name", "tolerance"), [("dit-xl-2-256", 2e-4), ("dit-xl-2-512", 2e-4), ("sd35-medium", 0.06)])
def test_multiply_adds_are_the_published_ones(name: str, tolerance: float) -> None:
    published = read_preset(name).published
    assert multiply_adds(name) * published["passes"] == pytest.approx(published["multiply_adds"], rel=tolerance)


def test_a_small_shape_runs_with_random_weights() -> None:
    preset = read_preset("sd3-cpu")
    small = type(preset)(**{**preset.__dict__, "config": preset.config | {"num_layers": 2, "sample_size": 8}})
    model = small.build("cpu", torch.bfloat16)
    sl.attach(model, sl.RoutingConfig(sl.TokenRouting(granularity=1)))
    sl.set_budget(model, keep=0.5)
    with torch.no_grad():
        out = model(
            torch.randn(1, 16, 8, 8).bfloat16(), torch.randn(1, 3, 1024).bfloat16(), torch.randn(1, 1024).bfloat16(),
            torch.tensor([500.0]), return_dict=False,
        )[0]  # fmt: skip
    assert out.shape == (1, 16, 8, 8) and torch.isfinite(out.float()).all()


def test_the_command_prints_every_shape_and_names_those_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    done = CliRunner().invoke(app, ["bench", "--backbone", "dit-xl-2-256", "--keep", "0.5", "--json", str(path)])
    assert done.exit_code == 0 and "0.119" in done.output
    rows = read_results(path)["rows"]
    assert [row["method"] for row in rows] == ["dense", "tokens", "block routers", "token routers and policy"]
    assert rows[1]["planned_ratio"] == pytest.approx(0.513, abs=0.01)  # block 0 runs whole
    assert all(row["share_of_parameters"] < 0.005 for row in rows[2:])
    with pytest.raises(sl.UnsupportedBackboneError, match="no preset 'sdxl'; one of dit-xl"):
        read_preset("sdxl")
