from dataclasses import replace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

import shivelight as sl
from shivelight.backbones import BackboneSpec, find_spec, flux2, sd3, spec
from shivelight.execution.routed import NAME


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, BackboneSpec]:
    """What a test registers is gone after it."""
    mine = dict(spec._REGISTRY)
    monkeypatch.setattr(spec, "_REGISTRY", mine)
    return mine


def tiny_model(layers: int = 2) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip


class Finetuned(SD3Transformer2DModel):
    """A user's subclass."""


class UserBlock(nn.Module):
    """Residual: x + linear(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, emb: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return tokens + self.mix(tokens) * emb[:, None] + places


class UserDiT(nn.Module):
    """A backbone that is not diffusers': bare tensors, a per-token argument, timesteps from 0 to 1, no condition."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed_time = nn.Linear(1, width)
        self.layers = nn.ModuleList(UserBlock(width) for _ in range(3))

    def forward(self, x: torch.Tensor, time: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        emb = self.embed_time(time[:, None])
        for layer in self.layers:
            x = layer(x, emb, places)
        return x


USER_SPEC = BackboneSpec(
    name="user",
    classes=("UserDiT",),
    blocks=(
        spec.BlockSpec(
            path="layers",
            arguments=("tokens", "emb", "places"),
            image_argument="tokens",
            token_arguments=("places",),
            returns=("image",),
            streams=spec.Streams(image=("mix",)),
        ),
    ),
    timestep_embedding="embed_time",
    timestep_argument="time",
    timestep_scale=1000.0,
    model_arguments=("x", "time", "places"),
    delta_targets=r"layers\.\d+\.mix",
    widths=lambda model: (8, 8, None),
    default_shape=lambda model: (10, 0),
)


def test_a_subclass_is_known_by_its_base() -> None:
    assert find_spec(Finetuned.from_config(tiny_model().config)) is sd3.SPEC


def test_a_later_spec_of_the_same_class_replaces_the_earlier_one() -> None:
    mine = replace(sd3.SPEC, name="mine")
    sl.register_backbone(mine)
    assert find_spec(tiny_model()) is mine


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_an_unknown_class_is_named_with_what_to_do(model: nn.Module) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match=f"{type(model).__qualname__}.*register_backbone"):
        sl.attach(model)
    assert not hasattr(model, NAME)


def test_a_spec_without_classes_is_refused() -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match="names no class"):
        sl.register_backbone(replace(sd3.SPEC, classes=()))


@pytest.mark.parametrize("layers", [0, 1])
def test_a_model_without_a_block_to_route_is_refused(layers: int) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match=f"{layers} blocks.*none to route"):
        sl.attach(tiny_model(layers))


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": (replace(sd3.SPEC.blocks[0], path="layers"),)},
        {"blocks": (replace(sd3.SPEC.blocks[0], path="proj_out"),)},
        {"timestep_embedding": "time_embed"},
        {"condition_embedding": "time_text_embed.pooled"},
        {"blocks": (replace(sd3.SPEC.blocks[0], streams=spec.Streams(image=("attn.*",))),)},
    ],
)
def test_a_wrong_spec_is_refused_and_leaves_the_model_as_it_was(changes: dict[str, object]) -> None:
    model = tiny_model()
    sl.register_backbone(replace(sd3.SPEC, **changes))
    with pytest.raises(sl.UnsupportedBackboneError):
        sl.attach(model)
    assert not hasattr(model, NAME)
    assert not [name for name, module in model.named_modules() if "_diffusers_hook" in module.__dict__]
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_what_is_not_a_transformer_is_refused(pipe: StableDiffusion3Pipeline) -> None:
    with pytest.raises(sl.UnsupportedBackboneError, match="builtins.str"):
        sl.attach("a model id")
    pipe.register_modules(transformer=None)
    with pytest.raises(sl.UnsupportedBackboneError, match="StableDiffusion3Pipeline has no `transformer`"):
        sl.attach(pipe)


def test_a_pipeline_of_an_unknown_transformer_names_the_transformer(pipe: StableDiffusion3Pipeline) -> None:
    class Other(ModelMixin, ConfigMixin):
        """A class that no spec names."""

    pipe.register_modules(transformer=Other())
    with pytest.raises(sl.UnsupportedBackboneError, match="Other.*register_backbone"):
        sl.attach(pipe)


def test_a_users_own_backbone_is_routed_by_its_spec() -> None:
    torch.manual_seed(0)
    sl.register_backbone(USER_SPEC)
    model = UserDiT()
    x, time, places = torch.randn(2, 10, 8), torch.tensor([0.3, 0.3]), torch.randn(2, 10, 8)
    expected = model(x, time, places)
    sl.attach(model, sl.RoutingConfig(tokens=sl.TokenRouting(bottleneck=4, policy_width=8)))
    assert torch.equal(model(x, time, places), expected)
    sl.set_budget(model, keep=0.5)

    seen: dict[int, torch.Tensor] = {}
    model.shivelight.observer = lambda block, x, out, kept, text: seen.__setitem__(block, kept)
    routed = model(x, time, places)
    # By hand: the kept rows of every block, with their own rows of `places`.
    by_hand, emb = x, model.embed_time(time[:, None])
    by_hand = UserBlock.forward(model.layers[0], by_hand, emb, places)
    for block in (1, 2):
        mask = torch.zeros(2, 10, dtype=torch.bool).scatter_(1, seen[block], True)
        run = UserBlock.forward(model.layers[block], by_hand, emb, places)
        by_hand = torch.where(mask[..., None], run, by_hand)
        assert mask.sum(1).tolist() == [5, 5]
    torch.testing.assert_close(routed, by_hand)


def test_timesteps_from_0_to_1_are_read_on_the_same_grid() -> None:
    sl.register_backbone(USER_SPEC)
    model = sl.attach(UserDiT(), sl.RoutingConfig(tokens=sl.TokenRouting(bottleneck=4, policy_width=8)))
    with torch.no_grad():
        model.shivelight.policy.time_out.normal_()
    sl.set_budget(model, keep=0.5)
    counts = []
    model.shivelight.observer = lambda block, x, out, kept, text: counts.append(
        out.shape[1] if kept is None else kept.shape[1]
    )
    for time in (0.05, 0.95):
        model(torch.randn(1, 10, 8), torch.tensor([time]), torch.randn(1, 10, 8))
    table = sl.current_schedule(model)
    assert counts == [*table.row(49), *table.row(949)] and table.row(49) != table.row(949)


def test_joined_streams_without_a_length_of_the_text_are_refused() -> None:
    spec = replace(flux2.SPEC, text_length=None)
    with pytest.raises(sl.UnsupportedBackboneError, match="fill in `text_length`"):
        spec.block_list(nn.Module())
