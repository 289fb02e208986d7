"""Captioned folders and their caches; every bad folder is one clear error."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from shivelight.errors import DataError
from shivelight.training.cache import LatentCache
from shivelight.training.data import build_cache, load_image, read_folder


def test_captions_come_from_text_files_or_from_metadata(images: Path) -> None:
    assert [i.caption for i in read_folder(images)] == ["a a", "a b", "a c", "a d", "a e", "a f"]
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "3.png", "text": "only this"}) + "\n\n")
    found = read_folder(images)
    assert [(i.path.name, i.caption) for i in found] == [("3.png", "only this")]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: [p.unlink() for p in folder.iterdir()], "holds no images"),
        (lambda folder: (folder / "2.txt").unlink(), "1 of 6 images.*2.png.*2.txt"),
        (lambda folder: (folder / "metadata.jsonl").write_text("{broken"), "line 1"),
        (lambda folder: (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a"}'), "names 'x.png'"),
        (lambda folder: (folder / "metadata.jsonl").write_text("\n"), "lists no images"),
    ],
)
def test_a_bad_folder_is_named(images: Path, break_it, said: str) -> None:  # noqa: ANN001
    break_it(images)
    with pytest.raises(DataError, match=said):
        read_folder(images)


def test_a_missing_folder_and_an_unreadable_image_are_named(images: Path, pipe, tmp_path: Path) -> None:  # noqa: ANN001
    with pytest.raises(DataError, match="no image folder"):
        read_folder(tmp_path / "nowhere")
    (images / "4.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="4.png"):
        build_cache(pipe, read_folder(images), tmp_path / "cache", 32, 16)
    assert list((tmp_path / "cache").iterdir()) == [], "an interrupted cache leaves nothing behind"


def test_pictures_are_scaled_and_cropped_around_their_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 60, 40))
    wide.save(tmp_path / "wide.png")
    picture = load_image(tmp_path / "wide.png", 20)
    assert picture.shape == (3, 20, 20)
    assert picture[2].min() > 0.8 and picture[0].max() < -0.8, "only the blue middle is left"


def test_the_cache_holds_what_the_pipeline_computes_and_drops_captions(pipe, cache: LatentCache, images: Path) -> None:  # noqa: ANN001
    batch = cache.batch([1, 3], [False, True])
    with torch.no_grad():
        latents = pipe.vae.encode(load_image(images / "1.png", 32)[None]).latents * pipe.vae.config.scaling_factor
        wanted, _, pooled, _ = pipe.encode_prompt(
            ["a b", ""], ["a b", ""], ["a b", ""], do_classifier_free_guidance=False, max_sequence_length=16
        )
    torch.testing.assert_close(batch.latents[:1], latents, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.conditions["encoder_hidden_states"], wanted, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.conditions["pooled_projections"], pooled, atol=2e-3, rtol=2e-3)


def other_encoder(pipe, name: str) -> None:  # noqa: ANN001
    """A model of the same shape with other weights; the session's own one is left alone."""
    model = copy.deepcopy(getattr(pipe, name))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    setattr(pipe, name, model)


def test_the_cache_is_reused_until_what_went_into_it_changes(pipe, images: Path, tmp_path: Path) -> None:  # noqa: ANN001
    made_from: list[str] = []
    settings = {"size": 32, "max_sequence_length": 16}
    changes: dict[str, Callable[[], object]] = {
        "nothing before it": lambda: None,
        "a caption": lambda: (images / "0.txt").write_text("another caption"),
        "a picture of the same length": lambda: os.utime(images / "1.png", ns=(1, 1)),
        "a picture written at the same time": lambda: (
            Image.new("RGB", (40, 36)).save(images / "1.png"), os.utime(images / "1.png", ns=(1, 1)),
        ),
        "one picture less": lambda: [(images / f"5.{kind}").unlink() for kind in ("png", "txt")],
        "the size": lambda: settings.update(size=16),
        "the length of the text": lambda: settings.update(max_sequence_length=8),
        "the VAE": lambda: other_encoder(pipe, "vae"),
        "a text encoder": lambda: other_encoder(pipe, "text_encoder_2"),
    }  # fmt: skip
    for name, change in changes.items():
        change()
        for _ in range(2):
            found = read_folder(images)
            cache = build_cache(
                pipe, found, tmp_path / "c", **settings, progress=lambda *_, name=name: made_from.append(name)
            )
            assert len(cache) == len(found)
        assert made_from[-1] == name
    assert made_from == list(changes), "the second time nothing is computed"


def test_a_broken_cache_is_refused(cache: LatentCache, tmp_path: Path) -> None:
    folder = next((tmp_path / "cache").iterdir())
    (folder / "00000.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="Delete it"):
        LatentCache(folder)
