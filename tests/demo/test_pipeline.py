"""The embedded pipeline and adapters: they load, they draw, they are small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shivelight as sl
from shivelight.adapter import routed_of
from shivelight.adapter_files import read_deltas
from shivelight.demo import pipeline as embedded
from shivelight.demo.data import EmojiData
from shivelight.demo.export import export_images
from shivelight.evaluation.fidelity import psnr
from shivelight.training.data import read_folder


@pytest.fixture(scope="module")
def shipped():  # noqa: ANN201
    return embedded.load_pipeline()


def draw(pipe, steps: int = 2) -> torch.Tensor:  # noqa: ANN001
    caption = str(EmojiData().captions("test")[0])
    generator = torch.Generator().manual_seed(0)
    return pipe(
        [caption], num_inference_steps=steps, generator=generator, output_type="pt", max_sequence_length=16
    ).images  # fmt: skip


def test_it_is_stable_diffusion_3_with_everything_that_routing_must_face(shipped) -> None:  # noqa: ANN001
    config = shipped.transformer.config
    assert type(shipped).__name__ == "StableDiffusion3Pipeline"
    assert config.qk_norm == "rms_norm" and tuple(config.dual_attention_layers) == (0, 1)
    assert (config.sample_size // config.patch_size) ** 2 == 256 and config.num_layers == 8


def test_the_distilled_pipeline_draws_in_four_steps_what_its_teacher_draws_in_many(shipped) -> None:  # noqa: ANN001
    few = embedded.load_few_step()
    own, taught = (dict(pipe.transformer.config, _name_or_path=None) for pipe in (few, shipped))
    assert own == taught

    def pictures(pipe, steps: int, guidance: float) -> torch.Tensor:  # noqa: ANN001
        captions = [str(caption) for caption in EmojiData().captions("validation")[:3]]
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipe(
            captions, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="pt",
            max_sequence_length=embedded.TEXT_TOKENS,
        ).images  # fmt: skip

    wanted = pictures(shipped, 16, embedded.GUIDANCE)
    drawn = pictures(few, embedded.FEW_STEPS, 1.0)
    # Its last step starts well above the data, where the plain schedule of four steps ends in one that does nothing.
    assert few.scheduler.sigmas[-2] == pytest.approx(0.4, abs=1e-3)
    plain = pictures(shipped, embedded.FEW_STEPS, 1.0)
    assert psnr(drawn, wanted).mean() > psnr(plain, wanted).mean() + 3


def test_all_embedded_weights_together_stay_small() -> None:
    files = [p for p in Path(embedded.FOLDER).rglob("*.safetensors")]
    assert 0 < sum(p.stat().st_size for p in files) <= 64_000_000  # two transformers of 22 MB
    assert not [p for p in Path(embedded.FOLDER).rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_shipped_adapter_routes_and_the_baseline_only_tunes(shipped) -> None:  # noqa: ANN001
    dense = draw(shipped)
    assert dense.shape == (1, 3, 128, 128) and torch.isfinite(dense).all()
    sl.load_adapter(shipped, embedded.ADAPTER)
    sl.set_budget(shipped, keep=0.6)
    routed = draw(shipped)
    assert routed_of(shipped).routed == tuple(range(1, 8))
    assert not torch.equal(routed, dense)
    with sl.dense(shipped):
        assert torch.equal(draw(shipped), dense)
        weights = read_deltas(shipped, embedded.FINETUNED)
        weights.apply(True)
        assert not torch.equal(draw(shipped), dense)
        weights.apply(False)
    sl.detach(shipped)
    assert torch.equal(draw(shipped), dense)


@pytest.mark.parametrize("folder", embedded.OTHERS, ids=lambda folder: folder.name)
def test_the_other_shipped_adapters_meet_a_budget(shipped, folder: Path) -> None:  # noqa: ANN001
    sl.load_adapter(shipped, folder)
    try:
        sl.set_budget(shipped, compute=0.75)
        assert torch.isfinite(draw(shipped, steps=8)).all()
        assert 0.5 < routed_of(shipped).spending.ratio < 0.95  # gates are per sample: the budget is met on average
    finally:
        sl.detach(shipped)


def test_exported_images_are_what_training_reads(tmp_path: Path) -> None:
    folder = export_images(tmp_path / "images", 5)
    found = read_folder(folder)
    train = {str(caption) for caption in EmojiData().captions("train")}
    assert len(found) == 5 and all(image.caption in train for image in found)
    stamp = (folder / "00000.png").stat().st_mtime_ns
    assert (export_images(tmp_path / "images", 5) / "00000.png").stat().st_mtime_ns == stamp, (
        "a complete folder is kept"
    )
