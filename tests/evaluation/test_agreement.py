"""Caption agreement with the shipped scorer: right from wrong on real renders of captions that it was never trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shivelight.demo.data import EmojiData
from shivelight.errors import DataError
from shivelight.evaluation.agreement import Agreement, caption_agreement
from shivelight.evaluation.images import to_tensor
from shivelight.evaluation.judging import Judge
from shivelight.evaluation.scorer import SCORER, SIZES, WEIGHTS, CaptionScorer, load_scorer, save_scorer


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, list[str]]:
    """48 pictures of captions of the test split, and the captions."""
    data = EmojiData()
    chosen = data.captions("test")[:48]
    return to_tensor([data.render(caption, 7_000_000 + i) for i, caption in enumerate(chosen)]), [
        str(c) for c in chosen
    ]


def test_right_captions_of_held_out_combinations_are_told_from_wrong_ones(held_out: tuple[Tensor, list[str]]) -> None:
    images, captions = held_out
    right = caption_agreement(images, captions)
    assert right.named.float().mean() >= 0.95
    others = captions[1:] + captions[:1]
    shuffled = caption_agreement(images, others)
    assert right.cosine.mean() > shuffled.cosine.mean() + 30
    assert shuffled.named.float().mean() < 0.2
    concepts, grounds = zip(*(caption.split(" on ") for caption in captions), strict=True)
    swapped = caption_agreement(
        images, [f"{c} on {g}" for c, g in zip(concepts, [*grounds[1:], grounds[0]], strict=True)]
    )
    differ = torch.tensor([a != b for a, b in zip(grounds, [*grounds[1:], grounds[0]], strict=True)])
    assert (right.cosine > swapped.cosine)[differ].float().mean() > 0.9, "the background counts too"


def test_pictures_of_noise_are_not_named(held_out: tuple[Tensor, list[str]]) -> None:
    images, captions = held_out
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    found, right = caption_agreement(noise, captions), caption_agreement(images, captions)
    assert found.named.float().mean() < 0.2
    assert found.cosine.mean() < right.cosine.mean() - 30


def test_figures_are_the_scorer_s_cosines_and_their_winner_picture_by_picture(
    held_out: tuple[Tensor, list[str]],
) -> None:
    images, captions = held_out[0][:3], held_out[1][:3]
    torch.manual_seed(0)
    # Untrained, so that some concepts do not win.
    scorer = CaptionScorer(
        [c.label for c in EmojiData().concepts], sorted({c.split(" on ")[1] for c in captions})
    ).eval()
    found = caption_agreement(images, captions, scorer)
    for image, caption, cosine, named in zip(images, captions, found.cosine, found.named, strict=True):
        vector = scorer.images(image[None])[0]
        own = float(vector @ scorer.captions([caption])[0])
        ground = caption.split(" on ")[1]
        best = max(float(vector @ scorer.captions([f"{concept} on {ground}"])[0]) for concept in scorer.concepts)
        assert float(cosine) == pytest.approx(100 * own, abs=1e-3)
        assert bool(named) == (own >= best - 1e-6)


def test_words_are_of_the_concept_or_of_the_background() -> None:
    scorer = CaptionScorer(["red apple", "green apple"], ["red", "green"])
    vectors = scorer.captions(["red apple on green", "green apple on red"])
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_the_paired_difference_is_the_mean_of_the_differences() -> None:
    dense = Agreement(torch.tensor([70.0, 10.0, 40.0]), torch.tensor([True, False, True]))
    ours = Agreement(torch.tensor([67.0, 7.0, 37.0]), torch.tensor([True, False, False]))
    difference = ours.to_dense(dense)
    agreement, named = difference["agreement_to_dense"], difference["named_to_dense"]
    # The same 3 less in every pair: no spread, however far the pairs are apart.
    assert (agreement.value, agreement.low, agreement.high) == pytest.approx((-3.0, -3.0, -3.0))
    assert named.value == pytest.approx(-1 / 3) and named.low < named.value < named.high == 0.0
    estimates = ours.estimates()
    assert estimates["caption_agreement"].value == pytest.approx(37.0) and estimates["named"].value == pytest.approx(
        1 / 3
    )
    assert estimates["caption_agreement"].samples == 3
    with pytest.raises(DataError, match="as many pictures of either, got 3 and 2"):
        ours.to_dense(Agreement(torch.zeros(2), torch.zeros(2, dtype=torch.bool)))


def test_bad_input_is_refused_with_its_reason() -> None:
    images, captions = torch.rand(2, 3, 64, 64), ["tulip on white", "rose on blue dots"]
    with pytest.raises(DataError, match="got 2 pictures and 1 captions"):
        caption_agreement(images, captions[:1])
    for wrong in ("a tulip on white", "tulip on mauve", "tulip", ""):
        with pytest.raises(DataError, match=f"does not know the caption '{wrong}'"):
            caption_agreement(images, [captions[0], wrong])
    with pytest.raises(DataError, match="of shape"):
        caption_agreement(images[0], captions)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match=r"pictures \[1\] hold NaN"):
        caption_agreement(images, captions)


def test_a_scorer_is_written_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = CaptionScorer(["a b", "c"], ["white", "red dots"], width=4, dim=8, image_size=16).eval()
    save_scorer(scorer, tmp_path)
    again = load_scorer(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again.images(images), scorer.images(images), atol=1e-2, rtol=0)
    assert again.sizes == scorer.sizes and again.words == ["a", "b", "c", "dots", "red", "white"]


def test_the_shipped_scorer_is_small_and_knows_the_embedded_captions() -> None:
    assert sum(file.stat().st_size for file in SCORER.iterdir()) < 2e6
    scorer = load_scorer()
    assert scorer.knows([str(caption) for caption in EmojiData().captions()])
    assert not scorer.knows([]) and not scorer.knows(["tulip on white", "a dog"])


@pytest.mark.parametrize("name", [WEIGHTS, SIZES])
def test_a_scorer_without_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(SCORER, tmp_path / "scorer")
    (tmp_path / "scorer" / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing from .*recipes/train_scorer.py"):
        load_scorer(tmp_path / "scorer")


@pytest.mark.parametrize("broken", ["not json", "no concepts", "unknown size", "other size", "short weights"])
def test_a_scorer_with_a_missing_part_is_refused(tmp_path: Path, broken: str) -> None:
    folder = shutil.copytree(SCORER, tmp_path / "scorer")
    sizes = json.loads((folder / SIZES).read_text())
    if broken == "not json":
        (folder / SIZES).write_text("{")
    elif broken == "short weights":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    else:
        if broken == "no concepts":
            del sizes["concepts"]
        elif broken == "unknown size":
            sizes["heads"] = 4
        else:
            sizes["concepts"] = sizes["concepts"][:-1]
        (folder / SIZES).write_text(json.dumps(sizes))
    with pytest.raises(DataError, match=r"(does not describe a scorer|does not fit).*recipes/train_scorer.py"):
        load_scorer(folder)


def test_rows_have_agreement_where_the_captions_are_the_scorer_s(held_out: tuple[Tensor, list[str]]) -> None:
    images, captions = held_out[0][:8], held_out[1][:8]
    judge = Judge(images, captions=captions)
    dense, ours = judge.figures("dense", images), judge.figures("tokens", images.flip(0))
    assert dense.keys() == {"caption_agreement", "named"}
    assert ours.keys() == dense.keys() | {"psnr_to_dense", "ssim_to_dense", "agreement_to_dense", "named_to_dense"}
    assert ours["agreement_to_dense"].value == pytest.approx(
        ours["caption_agreement"].value - dense["caption_agreement"].value
    )
    assert ours["agreement_to_dense"].high < 0
    for others in ((), ["a dog"] * 8):
        assert Judge(images, captions=others).figures("dense", images) == {}
