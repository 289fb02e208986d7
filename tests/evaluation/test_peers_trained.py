"""Peers that are trained: what they leave out is what they were trained without, and runs of theirs are runs of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from peering import STEPS, attributes, bare, block_flops, compared
from safetensors.torch import load_file
from torch import Tensor

import shivelight as sl
from shivelight.adapter_files import read_deltas
from shivelight.config import DeltaConfig
from shivelight.evaluation.bare import BareLoop
from shivelight.evaluation.peers import TRAINED, trained_point
from shivelight.evaluation.peers.diffcr import BINS, REGIONS, DiffcrGates, region
from shivelight.evaluation.peers.dydit import DyditGates, _units_open
from shivelight.evaluation.peers.ground import Ground, generator
from shivelight.evaluation.peers.slicing import members
from shivelight.evaluation.peers.trained import SETTINGS, WEIGHTS, TrainedGates, save_gates, scores_of
from shivelight.evaluation.peers.training import PeerTrainer
from shivelight.training.cache import LatentCache
from shivelight.training.session import TeacherRecord
from shivelight.training.stages import TrainingConfig

NAMES = ["sd3", "pixart", "dit"]


def decided(gates: TrainedGates, seed: int = 0) -> TrainedGates:
    """Routers whose decisions are far from their thresholds, beyond all noise, about half of them open."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            if parameter.ndim == 2 and parameter.shape[-1] != REGIONS:
                parameter.copy_(1e5 * torch.randn(parameter.shape))
            elif parameter.ndim == 1:
                parameter.zero_()
    return gates


def generated(loop: BareLoop, gates: TrainedGates, trains: bool) -> Tensor:
    with torch.no_grad(), gates.train(trains).state(Ground(loop)):
        return loop()


def ran_share(loop: BareLoop, gates: TrainedGates) -> float:
    """Of the blocks' FLOPs, counted by torch; without those of the routers of tokens, one product for each token and block."""
    with torch.no_grad(), gates.eval().state(Ground(loop)):
        ran = block_flops(loop)
    routers = STEPS * len(Ground(loop).blocks) * 2 * 2 * 16 * 32
    return (ran - routers) / block_flops(loop)


@pytest.mark.parametrize("name", NAMES)
def test_what_dydit_slices_and_gathers_is_what_it_masked(name: str) -> None:
    loop = bare(name)
    before, dense = attributes(loop.transformer), loop()
    gates = decided(DyditGates(Ground(loop), 0.5))
    masked, sliced = generated(loop, gates, True), generated(loop, gates, False)
    torch.testing.assert_close(sliced, masked, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(masked, dense, atol=1e-3)
    assert torch.equal(generated(loop, gates, False), sliced)
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before
    opened = {chosen for (block, _), chosen in gates._chosen.items() if block == 0}
    assert len(opened) > 1, "widths do not follow the timestep"
    assert {len(heads) for heads, _ in opened} - {4}


@pytest.mark.parametrize("name", NAMES)
def test_dydit_counts_what_torch_counts(name: str) -> None:
    loop = bare(name)
    ground, shares = Ground(loop), []
    gates = decided(DyditGates(ground, 0.5))
    with torch.no_grad(), gates.train().state(ground):
        handle = loop.transformer.register_forward_hook(lambda *_: shares.append(float(gates.bound()[1])))
        loop()
        handle.remove()
    generated(loop, gates, False)  # widths are worked out once
    ran = ran_share(loop, gates)
    assert gates.plan(ground, lambda: generated(loop, gates, False))((16, 8)) == pytest.approx(ran, rel=1e-3)
    assert sum(shares) / len(shares) == pytest.approx(ran, rel=1e-3) and 0.3 < ran < 0.9


def test_dydit_starts_nearly_whole_and_its_bound_closes_every_kind_of_gate() -> None:
    loop = bare("sd3")
    ground = Ground(loop)
    gates = DyditGates(ground, 0.5).train()
    with gates.state(ground):
        one_pass(loop)
        loss, share = gates.bound()
    assert 0.7 < float(share) < 1.0
    loss.backward()
    for routers in (gates.heads, gates.groups, gates.tokens):
        assert all(router.bias.grad.sum() > 0 for router in routers)  # descending closes them
    assert float(loss) == pytest.approx(2 * float(share) * (float(share) - 0.5), rel=1e-5)


def one_pass(loop: BareLoop) -> None:
    """With gradients, which the loop itself has none of."""
    spec, model = Ground(loop).spec, loop.transformer
    assert spec.example is not None
    arguments = spec.example(model, 2, 16, 8)
    model(**arguments, **{spec.timestep_argument: torch.full((2,), 500.0)})


def test_groups_of_units() -> None:
    assert members(8, 4, (0, 3)) == (0, 1, 6, 7) and members(4, 4, (1, 2)) == (1, 2)
    assert members(6, 4, (0, 1, 2, 3)) == tuple(range(6)) and members(2, 4, (3,)) == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_diffcr_at_a_bin_is_what_it_runs_afterwards(name: str) -> None:
    loop = bare(name)
    ground = Ground(loop)
    before, dense = attributes(loop.transformer), loop()
    gates = DiffcrGates(ground, 1.0)
    with torch.no_grad():
        for router in gates.routers:
            router.weight.zero_()
    unchanged = generated(loop, gates, False)  # by a new router
    torch.testing.assert_close(unchanged, dense, atol=1e-5, rtol=1e-4)
    decided(gates)
    with torch.no_grad():
        gates.ratios.copy_(torch.randint(3, 8, gates.ratios.shape) / BINS)
    afterwards = generated(loop, gates, False)
    torch.testing.assert_close(generated(loop, gates, True), afterwards, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(afterwards, dense, atol=1e-3)
    assert torch.equal(loop(), dense) and attributes(loop.transformer) == before
    plan = gates.plan(ground, lambda: generated(loop, gates, False))
    assert ran_share(loop, gates) == pytest.approx(plan((16, 0 if name == "dit" else 8)), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_diffcr_runs_the_first_and_weighs_what_they_add(ratio: float) -> None:
    loop = bare("sd3")
    block, gates = loop.transformer.transformer_blocks[1], DiffcrGates(Ground(loop), ratio)
    for router in gates.routers:  # all the same: the first tokens are taken
        router.weight.zero_()
        router.bias.fill_(0.7)
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    generated(loop, gates, False)
    handle.remove()
    (_, given, (text, image)), kept = seen[0], int(16 * ratio)
    x = given["hidden_states"]
    wanted_text, ran = block(**given | {"hidden_states": x[:, :kept]})
    weight = 2 / (1 + math.exp(-0.7))
    torch.testing.assert_close(image[:, :kept], x[:, :kept] + weight * (ran - x[:, :kept]), atol=1e-5, rtol=1e-4)
    assert torch.equal(image[:, kept:], x[:, kept:])
    torch.testing.assert_close(text, wanted_text, atol=1e-5, rtol=1e-4)


def test_diffcr_between_bins_is_between_their_outputs_and_learns_its_ratio() -> None:
    loop = bare("sd3")
    ground, block, outputs = Ground(loop), loop.transformer.transformer_blocks[1], {}
    gates = decided(DiffcrGates(ground, 0.5))
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    for ratio in (0.5, 0.53, 0.6):
        with torch.no_grad():
            gates.ratios.fill_(1.0)
            gates.ratios[1] = ratio
        generated(loop, gates, True)
        outputs[ratio], seen = seen[0], seen[:0]
    handle.remove()
    for low, middle, high in zip(outputs[0.5], outputs[0.53], outputs[0.6], strict=True):
        torch.testing.assert_close(middle, 0.7 * low + 0.3 * high, atol=1e-5, rtol=1e-4)
        assert not torch.equal(low, high)
    with gates.train().state(ground):
        one_pass(loop)
    loss, mean = gates.bound()
    loss.backward()
    assert float(mean) > 0.5 and gates.ratios.grad is not None and (gates.ratios.grad > 0).all()
    assert [region(time) for time in (0.0, 99.9, 100.0, 999.0, 1000.0)] == [0, 0, 1, 9, 9]


@pytest.fixture
def cache(pipe, tmp_path: Path) -> LatentCache:  # noqa: ANN001
    from PIL import Image

    from shivelight.training.data import build_cache, read_folder

    folder = tmp_path / "images"
    folder.mkdir()
    for place in range(4):
        Image.new("RGB", (40, 36), (60 * place, 20, 90)).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(f"a {'abcd'[place]}\n")
    return build_cache(pipe, read_folder(folder), tmp_path / "cache", 32, 16)


@pytest.mark.parametrize("method", sorted(TRAINED))
def test_a_run_goes_on_where_it_stopped_and_is_read_back(
    method: str, pipe: Any, sample: Callable[..., Tensor], cache: LatentCache, tmp_path: Path
) -> None:
    config = TrainingConfig(
        router_steps=0,
        policy_steps=0,
        joint_steps=4,
        groups=1,
        group_size=2,
        warmup=1,
        checkpoint_every=2,
        lr_router=0.5,
        lr_gates=0.5,
    )

    def trainer(folder: str) -> PeerTrainer:
        torch.manual_seed(0)
        return PeerTrainer(pipe, TRAINED[method], 0.6, DeltaConfig(2, 2.0), config, cache, tmp_path / folder)

    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    whole = trainer("whole")
    started = {name: value.detach().clone() for name, value in whole.named_parameters().items()}
    folder = whole.run()
    ended = {name: value.detach().clone() for name, value in whole.gates.named_parameters()}
    assert any(not torch.equal(value, started[f"gates.{name}"]) for name, value in ended.items())
    assert all(0 < record["share"] <= 1 and record["features"] > 0 for record in whole.history)
    whole.close()
    halved = trainer("halved")
    halved.run(until=2)
    halved.close()
    again = trainer("halved")
    again.run()
    assert all(torch.equal(value, ended[name]) for name, value in again.gates.named_parameters())
    again.close()
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())

    sl.attach(pipe, sl.RoutingConfig.training_free(compute=0.5, axis="blocks"))
    comparison = compared("sd3")
    comparison.pipe.transformer.load_state_dict(pipe.transformer.state_dict())
    point = trained_point(comparison, folder, TRAINED)
    assert point.name == f"{method} target 0.6 8 steps" and point.peer
    with comparison.routed.switched(False):
        dense = sample(comparison.pipe, ["a b"])
    with point.state():
        tuned = sample(comparison.pipe, ["a b"])
    with comparison.finetuned(read_deltas(comparison.pipe, folder)).state():
        ungated = sample(comparison.pipe, ["a b"])
    gates = TRAINED[method](Ground(comparison), 0.6).eval()
    gates.load_state_dict(load_file(folder / WEIGHTS))
    with comparison.routed.switched(False), gates.state(Ground(comparison)):
        untuned = sample(comparison.pipe, ["a b"])
    assert not any(torch.equal(tuned, other) for other in (dense, ungated, untuned))
    with comparison.routed.switched(False):
        assert torch.equal(sample(comparison.pipe, ["a b"]), dense)


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(TRAINED))
def test_the_teacher_has_no_gates(method: str, pipe: Any, cache: LatentCache, tmp_path: Path) -> None:
    config = TrainingConfig(router_steps=0, policy_steps=0, joint_steps=2, groups=1, group_size=2)
    trainer = PeerTrainer(pipe, TRAINED[method], 0.5, DeltaConfig(2, 2.0), config, cache, tmp_path / "run")
    batch = trainer.passes.batch(trainer.draws.at(0)[0])
    taught, learned, compared = [], [], []
    last = trainer.gates.features_at[-1]
    for seed in (0, 1):
        decided(trainer.gates, seed)
        record = TeacherRecord(())
        taught.append(trainer.passes.teacher(batch, record))
        learned.append(trainer.passes.predict(batch))
        compared.append((record.features[last], trainer.gates.features[last]))
    assert torch.equal(*taught) and not torch.allclose(*learned, atol=1e-3)
    (theirs, ours), (again, others) = compared
    assert torch.equal(theirs, again) and not any(torch.allclose(theirs, mine, atol=1e-3) for mine in (ours, others))
    trainer.backbone.enable_gradient_checkpointing()
    trainer.backbone.train()
    with pytest.raises(sl.ShivelightError, match="Gradient checkpointing would run the blocks again"):
        trainer.passes.predict(batch)
    trainer.close()


def test_routers_rank_in_full_precision_under_autocast_and_one_unit_alone_is_kept() -> None:
    x, router = torch.randn(1, 256, 32, generator=generator(0)), torch.nn.Linear(32, 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scores_of(router, x)
    assert scores.dtype == torch.float32 and len(scores.unique()) == 256
    assert _units_open(torch.full((4,), -1.0)) == (0,) and _units_open(torch.tensor([-1.0, 2.0, 3.0])) == (1, 2)


def test_a_ratio_that_left_the_range_comes_back() -> None:
    gates = DiffcrGates(Ground(bare("sd3")), 0.5)
    with torch.no_grad():
        gates.ratios.fill_(1.3)
    loss, mean = gates.bound()
    loss.backward()
    assert float(mean) == pytest.approx(1.0) and (gates.ratios.grad > 0).all()


def test_a_run_with_previews_is_refused(pipe: Any, cache: LatentCache, tmp_path: Path) -> None:
    config = TrainingConfig(router_steps=0, policy_steps=0, joint_steps=2, preview_every=1)
    with pytest.raises(sl.ShivelightError, match="without its gates"):
        PeerTrainer(pipe, DiffcrGates, 0.5, DeltaConfig(2, 2.0), config, cache, tmp_path / "run")


def test_the_bound_is_in_the_loss(pipe: Any, cache: LatentCache, tmp_path: Path) -> None:
    config = TrainingConfig(router_steps=0, policy_steps=0, joint_steps=2, groups=1, group_size=2)
    trainer = PeerTrainer(pipe, DiffcrGates, 0.5, DeltaConfig(2, 2.0), config, cache, tmp_path / "run")
    with torch.no_grad():
        trainer.gates.ratios.fill_(0.8)
    trainer.train_step()
    assert (trainer.gates.ratios < 0.8).float().mean() > 0.8  # in the regions too that the step did not come to
    trainer.close()


def test_what_is_no_trained_peer_is_refused(tmp_path: Path) -> None:
    comparison = compared("sd3")
    with pytest.raises(sl.ShivelightError, match=r"holds no trained peer .*train_peers"):
        trained_point(comparison, tmp_path, TRAINED)
    save_gates(DyditGates(Ground(comparison), 0.5), tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"method": "diffcr"}))
    with pytest.raises(sl.ShivelightError, match="holds no trained peer"):
        trained_point(comparison, tmp_path, TRAINED)
    with pytest.raises(sl.ShivelightError, match="target of dydit is 1.5"):
        DyditGates(Ground(comparison), 1.5)
    with pytest.raises(sl.ShivelightError, match="MLP of FluxSingle.* does not stand alone"):
        DyditGates(Ground(bare("flux")), 0.5)
    with pytest.raises(sl.ShivelightError, match="diffcr cannot run on .*tokens cannot be routed"):
        DiffcrGates(Ground(BareLoop(build("sana").transformer, 1, 16, 8, 4)), 0.5)
