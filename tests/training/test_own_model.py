"""A model of one's own: no pipeline of diffusers, latents that are sets, conditions of any name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import shivelight as sl
from shivelight.backbones import BackboneSpec, BlockSpec, Mlp, Streams
from shivelight.backbones import spec as registry
from shivelight.config import BlockRouting, DeltaConfig, Reuse, RoutingConfig, TokenRouting
from shivelight.errors import TrainingError
from shivelight.training.cache import LatentCache, write_cache
from shivelight.training.denoisers import Denoiser, base, denoiser_for, register_denoiser
from shivelight.training.stages import TrainingConfig
from shivelight.training.trainer import Trainer

WIDTH, POINTS, CHANNELS = 16, 12, 3


class SetBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner_dim = WIDTH
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x) + self.modulation(time)[:, None]).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class SetDiT(nn.Module):
    """Points [B, N, 3] of a kind [B], and a mean place [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.embed_time, self.kinds = nn.Linear(1, WIDTH), nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList(SetBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, CHANNELS)

    def forward(self, points: Tensor, t: Tensor, kind: Tensor, place: Tensor) -> Tensor:
        time = self.embed_time(t[:, None].float()) + self.kinds(kind)
        x = self.embed(points) + self.place(place)[:, None]
        for block in self.blocks:
            x = block(x, time)
        return self.head(x)


SPEC = BackboneSpec(
    name="sets",
    classes=("SetDiT",),
    blocks=(
        BlockSpec(
            path="blocks", arguments=("x", "time"), image_argument="x", returns=("image",),
            streams=Streams(image=("qkv", "out", "up", "down"), sample=("modulation",), image_attention=("",)),
            mlp=Mlp(up=("up",), down="down"),
        ),
    ),
    timestep_embedding="embed_time",
    timestep_argument="t",
    timestep_scale=1000.0,
    model_arguments=("points", "t", "kind", "place"),
    delta_targets=r"blocks\.\d+\.(qkv|out|up|down)",
    widths=lambda model: (WIDTH, WIDTH, None),
    default_shape=lambda model: (POINTS, 0),
)  # fmt: skip


class Loop:
    """Somebody's own loop: what routing must see of it."""

    def __init__(self, scheduler: Any) -> None:
        torch.manual_seed(0)
        self.transformer, self.scheduler = SetDiT().eval(), scheduler

    @torch.no_grad()
    def sample(self, steps: int = 4) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(2, POINTS, CHANNELS, generator=torch.Generator().manual_seed(3))
        for time in self.scheduler.timesteps:
            prediction = self.transformer(x, time.expand(2) / 1000, torch.tensor([0, 3]), torch.ones(2, CHANNELS))
            x = self.scheduler.step(prediction, time, x, return_dict=False)[0]
        return x


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"SetDiT": SPEC})
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    yield


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    generator = torch.Generator().manual_seed(0)
    points, places = (torch.randn(10, *shape, generator=generator) for shape in ((POINTS, CHANNELS), (CHANNELS,)))
    conditions = {"kind": torch.arange(10) % 3, "place": places}
    empty = {"kind": torch.tensor([3]), "place": torch.zeros(1, CHANNELS)}
    return write_cache(tmp_path / "cache", points, conditions, empty)


def settings(**changes: Any) -> TrainingConfig:
    short = {"router_steps": 2, "policy_steps": 1, "joint_steps": 2, "groups": 2, "group_size": 3, "warmup": 1}
    return TrainingConfig(**(short | {"calibration_batches": 2, "rank_batches": 1} | changes))


ROUTINGS = {
    "tokens": RoutingConfig(TokenRouting(), deltas=DeltaConfig(2, 2.0)),
    "blocks": RoutingConfig(None, BlockRouting(), DeltaConfig(2, 2.0)),
    "both with reuse": RoutingConfig(
        TokenRouting(sees_drift=True, ratios="fixed"), BlockRouting(closed="reuse"), reuse=Reuse()
    ),
}


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=2.0), DDIMScheduler()])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_plain_denoiser_trains_it(cache: LatentCache, tmp_path: Path, name: str, scheduler: Any) -> None:
    loop = Loop(scheduler)
    trainer = Trainer(loop, ROUTINGS[name], settings(), cache, tmp_path / "run", denoiser=Denoiser(loop))
    folder = trainer.run()
    assert trainer.draws.shift == (2.0 if trainer.denoiser.loss == "flow" else 1.0)
    assert len(trainer.history) == 5 and all(record["grad_norm"] > 0 for record in trainer.history)
    sl.set_budget(loop, compute=0.7)
    trained = loop.sample()
    trainer.close()
    dense = loop.sample()
    sl.load_adapter(loop, folder)
    sl.set_budget(loop, compute=0.7)
    assert torch.equal(loop.sample(), trained) and not torch.equal(dense, trained)


class Reversed(Denoiser):
    """A loop whose time runs the other way, and whose model is asked for clean - noise."""

    def timesteps(self, sigmas: Tensor) -> Tensor:
        return 1.0 - sigmas

    def target(self, clean: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return clean - noise


def test_a_registered_denoiser_is_found_and_asked(cache: LatentCache, tmp_path: Path) -> None:
    loop = Loop(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TrainingError, match="'sets'"):
        Trainer(loop, ROUTINGS["blocks"], settings(), cache, tmp_path / "run")
    register_denoiser("sets", Reversed)
    assert type(denoiser_for(loop)) is Reversed
    seen: list[Tensor] = []
    loop.transformer.register_forward_pre_hook(lambda module, args, call: seen.append(call["t"]), with_kwargs=True)
    trainer = Trainer(loop, ROUTINGS["blocks"], settings(), cache, tmp_path / "run")
    batch = trainer.passes.batch(trainer.draws.at(0)[0])
    prediction = trainer.passes.predict(batch)
    torch.testing.assert_close(seen[-1], 1.0 - batch.sigmas)
    wanted = (prediction - (batch.clean - batch.noise)).square().mean()
    torch.testing.assert_close(trainer.passes.data_loss(prediction, batch), wanted)


def test_what_its_cache_lacks_is_said_before_training(tmp_path: Path) -> None:
    loop = Loop(FlowMatchEulerDiscreteScheduler())
    conditions = {"kind": torch.zeros(4, dtype=torch.int64), "place": torch.zeros(4, CHANNELS)}
    cache = write_cache(tmp_path / "bare", torch.zeros(4, POINTS, CHANNELS), conditions)
    for changes, said in (({}, "no empty caption.*caption_drop=0"), ({"preview_every": 1}, "Preview grids need")):
        with pytest.raises(TrainingError, match=said):
            changes = {"caption_drop": 0.0 if changes else 0.1} | changes
            Trainer(loop, ROUTINGS["blocks"], settings(**changes), cache, tmp_path / "run", denoiser=Denoiser(loop))
    trainer = Trainer(
        loop, ROUTINGS["blocks"], settings(caption_drop=0.0), cache, tmp_path / "run", denoiser=Denoiser(loop)
    )
    trainer.run(until=1)
    assert json.loads((tmp_path / "run/losses.jsonl").read_text())["step"] == 1


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/train.md, which goes on where docs/bring-your-own-dit.md ends."""
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parent.parent.parent / "docs"
    names: dict[str, Any] = {"__name__": "page"}
    own = (docs / "train.md").read_text().split("## A model of your own")[1].split("\n## ")[0]
    for page in ((docs / "bring-your-own-dit.md").read_text(), own):
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(code, "page", "exec"), names)
    assert (tmp_path / names["adapter"] / "adapter_config.json").exists()
    reversed_ = names["Backwards"](names["pipe"])
    assert reversed_.timesteps(torch.tensor(0.25)) == 0.75
