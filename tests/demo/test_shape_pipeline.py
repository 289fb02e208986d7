"""hy3dgen's own classes, loaded without its __init__ files, as a small pipeline, and routed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.backbones import hy3dgen
from shivelight.budgets import planned_ratio
from shivelight.demo.shape_pipeline import (
    ViewConditioner,
    ViewProcessor,
    build_denoiser,
    build_pipeline,
    generate,
    occupancy,
    open_pipeline,
    save_pipeline,
)
from shivelight.demo.shapes import ShapeData, centres, view
from shivelight.errors import DataError, ShivelightError
from shivelight.training.denoisers import denoiser_for

needs_hy3dgen = pytest.mark.skipif(bool(hy3dgen.available()), reason=hy3dgen.available() or "present")
SETTINGS = {
    "vae": {
        "num_latents": 24, "embed_dim": 4, "width": 32, "heads": 2, "num_decoder_layers": 1, "num_freqs": 3,
        "scale_factor": 2.0,
    },
    "denoiser": {"channels": 4, "context": 16, "width": 64, "double": 2, "single": 3},
    "conditioner": {"width": 16, "layers": 1},
}  # fmt: skip


def tiny() -> Any:
    torch.manual_seed(0)
    vae = hy3dgen.load().ShapeVAE(**SETTINGS["vae"])
    denoiser = build_denoiser(**SETTINGS["denoiser"])
    for parameter in denoiser.parameters():
        # What starts at zero must do something here.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    parts = vae, denoiser, ViewConditioner(**SETTINGS["conditioner"])
    return build_pipeline(*(part.eval().requires_grad_(False) for part in parts))


def views(count: int = 2) -> list[Image.Image]:
    return [view(grid) for grid in ShapeData().grids("validation")[:count]]


def noise(seed: int) -> Tensor:
    return torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(seed))


class Known(nn.Module):
    """A denoiser that knows where it goes: the velocity from the noise of seed 0 to one known set of latents."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.data, self.times = data, []

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor], **_: Any) -> Tensor:
        self.times.append(t[0].item())
        return (self.data - noise(0)).expand(len(x), -1, -1)


@needs_hy3dgen
def test_the_loader_gives_the_packages_own_classes_and_leaves_its_packages_to_others() -> None:
    classes = hy3dgen.load()
    assert classes.DiT.__module__ == "hy3dgen.shapegen.models.denoisers.hunyuan3ddit"
    assert classes.Pipeline.__mro__[1].__module__ == "hy3dgen.shapegen.pipelines"
    assert hy3dgen.load() == classes
    assert not {"hy3dgen.shapegen", "hy3dgen.shapegen.models", "torchvision", "pymeshlab"} & sys.modules.keys()


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hy3dgen.importlib.util.find_spec
    monkeypatch.setattr(hy3dgen.importlib.util, "find_spec", lambda name: None if name == "hy3dgen" else real(name))
    with pytest.raises(ShivelightError, match=r"hy3dgen.* is not installed: .*--no-deps hy3dgen.*licence"):
        hy3dgen.load()


@needs_hy3dgen
@pytest.mark.parametrize("steps", [2, 5])
def test_the_pipeline_goes_from_noise_at_0_to_data_at_1_in_one_step_less_than_it_says(steps: int) -> None:
    pipe, data = tiny(), torch.randn(1, 24, 4)
    pipe.model = Known(data)
    assert torch.allclose(generate(pipe, views(1), steps, guidance=2.0), data, atol=1e-5)
    # The last call is at the data already, and its velocity is taken times 0.
    assert pipe.model.times == pytest.approx(torch.linspace(0, 1, steps).tolist())


@needs_hy3dgen
def test_a_denoiser_that_has_learnt_nothing_leaves_each_views_own_noise() -> None:
    pipe = tiny()
    pipe.model = build_denoiser(**SETTINGS["denoiser"]).requires_grad_(False)
    made = generate(pipe, views(2), 3, seed=5)
    assert torch.equal(made, torch.cat([noise(5), noise(6)]))


@needs_hy3dgen
def test_occupancy_is_what_the_decoder_says_at_the_middle_of_each_cell() -> None:
    pipe, latents = tiny(), torch.randn(2, 24, 4)
    nn.init.normal_(pipe.vae.geo_decoder.output_proj.weight)
    grids = occupancy(pipe, latents, resolution=8)
    decoded = pipe.vae(latents / 2.0)
    queries = centres(8).reshape(1, -1, 3).expand(2, -1, -1)
    expected = pipe.vae.geo_decoder(queries=queries, latents=decoded) > 0
    assert 0 < grids.float().mean() < 1
    assert torch.equal(grids, expected.reshape(2, 8, 8, 8))


@needs_hy3dgen
def test_the_mesh_of_the_pipeline_is_where_the_occupancy_is() -> None:
    # Its own export, marching cubes: the surface ends where the full cells do, give or take one and a half.
    pipe = tiny()
    nn.init.normal_(pipe.vae.geo_decoder.output_proj.weight)
    mesh = pipe(
        image=views(1), num_inference_steps=2, guidance_scale=2.0, generator=[torch.Generator().manual_seed(0)],
        box_v=31 / 32, octree_resolution=31, num_chunks=40000, enable_pbar=False,
    )[0]  # fmt: skip
    full = centres()[occupancy(pipe, generate(pipe, views(1), 2, 2.0))[0]]
    surface = torch.from_numpy(np.asarray(mesh.vertices)).float()
    assert len(mesh.faces) > 0
    assert torch.allclose(surface.amin(0), full.amin(0), atol=0.1) and torch.allclose(
        surface.amax(0), full.amax(0), atol=0.1
    )


@needs_hy3dgen
def test_a_saved_pipeline_draws_the_same(tmp_path: Path) -> None:
    pipe = tiny()
    save_pipeline(pipe, SETTINGS, tmp_path / "pipeline.pt")
    assert torch.equal(generate(open_pipeline(tmp_path / "pipeline.pt"), views(1), 2), generate(pipe, views(1), 2))
    with pytest.raises(DataError, match="train_teacher"):
        open_pipeline(tmp_path / "other.pt")


@needs_hy3dgen
@pytest.mark.parametrize("axis", ["tokens", "blocks", "both"])
def test_the_pipeline_is_routed_like_any_other(axis: Any) -> None:
    pipe = tiny()
    dense = generate(pipe, views(2), 8)
    sl.attach(pipe, sl.RoutingConfig.training_free(compute=1.0, axis=axis))
    assert torch.equal(generate(pipe, views(2), 8), dense)
    sl.set_budget(pipe, compute=0.6)
    routed = generate(pipe, views(2), 8)
    assert 0.45 < planned_ratio(pipe, 8) <= 0.6
    assert not torch.equal(routed, dense)
    # Noise and condition are each view's own, whatever else is in the batch.
    assert torch.allclose(generate(pipe, views(1), 8), routed[:1], atol=1e-4)
    with routed_of(pipe).switched(False):
        assert torch.equal(generate(pipe, views(2), 8), dense)
    sl.detach(pipe)
    assert torch.equal(generate(pipe, views(2), 8), dense)


def test_a_condition_depends_on_the_view_and_its_absence_is_zeros() -> None:
    torch.manual_seed(0)
    conditioner, process = ViewConditioner(16, 1).eval(), ViewProcessor()
    pictures = torch.cat([process(picture)["image"] for picture in views(2)])
    assert 0 < pictures.max() <= 1
    tokens = conditioner(image=pictures)["main"]
    assert tokens.shape == (2, 16, 16) and not torch.allclose(tokens[0], tokens[1])
    absent = conditioner.unconditional_embedding(3)["main"]
    assert absent.shape == (3, 16, 16) and not absent.any()


def test_a_picture_that_is_no_view_is_refused() -> None:
    for picture in (Image.new("RGB", (32, 32)), Image.new("L", (64, 32))):
        with pytest.raises(DataError, match="mode L, 32 x 32"):
            ViewProcessor()(picture)


@needs_hy3dgen
def test_the_denoiser_of_training_speaks_hunyuan3ds_convention() -> None:
    pipe = tiny()
    denoiser = denoiser_for(pipe)
    clean, sigmas = torch.randn(2, 24, 4), torch.tensor([0.25, 1.0])
    noises = torch.randn(2, 24, 4)
    tokens = pipe.conditioner(image=torch.rand(2, 1, 32, 32))
    noisy = denoiser.noisy(clean, noises, sigmas)
    torch.testing.assert_close(noisy[1], noises[1])
    velocity = denoiser.target(clean, noises, sigmas)
    # Along it, what is left of the time leads to the data.
    torch.testing.assert_close(noisy + sigmas[:, None, None] * velocity, clean)
    wanted = pipe.model(noisy, 1 - sigmas, tokens)
    assert torch.equal(denoiser.predict(pipe.model, noisy, sigmas, tokens), wanted)
    assert denoiser.tokens(clean.shape[1:]) == 24 and denoiser.patch() == 1
