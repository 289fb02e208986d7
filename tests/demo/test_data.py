import hashlib
import io
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shivelight import DataError
from shivelight.demo.data import (
    BACKGROUNDS,
    BASIC_HEXCODES,
    COLOURS,
    CORE_SUBGROUPS,
    PATTERNS,
    Background,
    Caption,
    Concept,
    EmojiData,
    draw_background,
)


@pytest.fixture(scope="module")
def core() -> EmojiData:
    return EmojiData("core")


def test_the_embedded_set_has_the_size_that_it_promises(core: EmojiData) -> None:
    full = EmojiData("full")
    assert 90 <= len(core.concepts) <= 130 and 1700 <= len(full.concepts) <= 2000
    assert {c.subgroup for c in core.concepts} == CORE_SUBGROUPS and set(core.concepts) <= set(full.concepts)
    for data in (core, full):
        assert len({c.hexcode for c in data.concepts}) == len({c.label for c in data.concepts}) == len(data.concepts)
    assert len(BACKGROUNDS) == 1 + len(PATTERNS) * len(COLOURS) == len({str(b) for b in BACKGROUNDS})


def test_the_basic_set_is_32_of_the_core_and_every_concept_is_judged(core: EmojiData) -> None:
    basic = EmojiData()
    assert {c.hexcode for c in basic.concepts} == BASIC_HEXCODES and len(basic.concepts) == 32
    assert set(basic.concepts) < set(core.concepts)
    for split in ("train", "validation", "test"):
        assert split == "validation" or {c.concept for c in basic.captions(split)} == set(basic.concepts), split
        assert set(basic.captions(split)) <= set(core.captions(split))


def test_every_picture_of_the_core_can_be_read_and_is_cut_out(core: EmojiData) -> None:
    for concept in core.concepts:
        picture = core.picture(concept)
        alpha = np.asarray(picture)[..., 3]
        assert picture.mode == "RGBA" and picture.size == (112, 112)
        assert 0.1 < (alpha > 128).mean() < 0.95, concept.label


def test_a_caption_names_the_concept_and_the_background() -> None:
    apple = Concept("1F34E", "red apple", 4, 35)
    assert str(Caption(apple, Background("stripes", "blue"))) == "red apple on blue stripes"
    assert str(Caption(apple, Background("plain", "white"))) == "red apple on white"


def test_the_split_is_a_hash_of_code_point_and_background_and_never_moves(core: EmojiData) -> None:
    apple = Concept("1F34E", "red apple", 4, 35)
    for background in BACKGROUNDS:
        first = hashlib.sha256(f"1F34E|{background}".encode()).digest()[0]
        expected = "test" if first < 25.6 else "validation" if first < 38.4 else "train"
        assert Caption(apple, background).split == expected
        # The label may be reworded without moving a picture between the splits.
        assert Caption(Concept("1F34E", "apple", 0, 0), background).split == expected
    # Golden: results of one version are judged on the captions of another.
    captions = core.captions("test")
    assert [str(c) for c in captions[:2]] == ["shark on green", "swan on blue stripes"] and len(captions) == 595


def test_the_splits_are_disjoint_complete_and_cover_every_concept(core: EmojiData) -> None:
    splits = {name: core.captions(name) for name in ("train", "validation", "test")}
    everything = [*splits["train"], *splits["validation"], *splits["test"]]
    assert len(everything) == len(set(everything)) == len(core.concepts) * len(BACKGROUNDS)
    assert set(everything) == set(core.captions())
    shares = {name: len(captions) / len(everything) for name, captions in splits.items()}
    assert abs(shares["test"] - 0.1) < 0.02 and abs(shares["validation"] - 0.05) < 0.02
    assert {c.concept for c in splits["train"]} == set(core.concepts)


def test_captions_come_mixed_and_in_the_same_order_every_time(core: EmojiData) -> None:
    captions = core.captions("test")
    assert captions == EmojiData("core").captions("test")
    assert len({c.concept for c in captions[:32]}) > 20 and len({c.background for c in captions[:32]}) > 15


def test_a_picture_is_drawn_from_caption_and_seed_alone(core: EmojiData) -> None:
    caption, other = core.captions("test")[:2]
    first = core.render(caption, seed=3)
    core.render(other, seed=4)
    again = EmojiData("core").render(caption, seed=3)
    assert first.mode == "RGB" and first.size == (128, 128) and first.tobytes() == again.tobytes()
    assert core.render(caption, seed=4).tobytes() != first.tobytes() != core.render(other, seed=3).tobytes()
    assert core.render(caption, seed=3, size=64).size == (64, 64)


def test_the_emoji_stays_inside_and_moves_and_scales_with_the_seed(core: EmojiData) -> None:
    concept = next(c for c in core.concepts if "apple" in c.label)
    boxes = set()
    for seed in range(6):
        pixels = np.asarray(core.render(Caption(concept, Background("plain", "white")), seed)).astype(int)
        drawn = np.argwhere((np.abs(pixels - 250) > 20).any(-1))
        boxes.add((*drawn.min(0), *drawn.max(0)))
        assert 0.5 * 128 < np.ptp(drawn, axis=0).max() + 1 <= 0.87 * 128
    assert len(boxes) == 6


@pytest.mark.parametrize("background", BACKGROUNDS, ids=str)
def test_a_background_is_what_the_caption_says(background: Background) -> None:
    drawn = draw_background(background, 64, np.random.default_rng(0))
    assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8
    if background.colour == "white":
        assert (drawn == 250).all()
        return
    colour = np.array(COLOURS[background.colour], float)
    light = 0.35 * colour + 0.65 * 255
    # Every pixel lies between the colour and its light shade.
    assert (drawn >= np.floor(np.minimum(colour, light)) - 1).all() and (
        drawn <= np.ceil(np.maximum(colour, light)) + 1
    ).all()
    tones = Counter(map(tuple, drawn.reshape(-1, 3)))
    if background.pattern == "plain":
        assert len(tones) == 1
    else:
        assert len(tones) > 10
        other = draw_background(background, 64, np.random.default_rng(1))
        assert background.pattern == "gradient" or (other != drawn).any()
    nearest = min(
        COLOURS, key=lambda name: np.abs(drawn.reshape(-1, 3).mean(0) - 0.675 * np.array(COLOURS[name]) - 82.9).sum()
    )
    assert background.pattern == "plain" or nearest == background.colour


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(DataError, match="'tartan'.*stripes"):
        draw_background(Background("tartan", "blue"), 8, np.random.default_rng(0))


def test_a_missing_broken_or_foreign_archive_is_one_clear_error(tmp_path: Path) -> None:
    broken, foreign, unlisted = tmp_path / "broken.zip", tmp_path / "foreign.zip", tmp_path / "unlisted.zip"
    broken.write_bytes(b"PK\x03\x04 not a zip")
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme.txt", "hello")
    for path in (tmp_path / "absent.zip", broken, foreign):
        with pytest.raises(DataError, match=f"cannot read the emoji archive {path}.*recipes/build_data.py"):
            EmojiData(archive=path)
    concept = {"hexcode": "1F34E", "label": "red apple", "group": 4, "subgroup": 35}
    with zipfile.ZipFile(unlisted, "w") as archive:
        archive.writestr("concepts.json", json.dumps([concept, concept | {"hexcode": "1F34F", "label": "green apple"}]))
        archive.writestr("1F34F.webp", b"RIFF")
    data = EmojiData(archive=unlisted)
    for entry in data.concepts:
        with pytest.raises(DataError, match=f"no readable picture of '{entry.label}' \\({entry.hexcode}\\)"):
            data.picture(entry)


def test_an_archive_of_ones_own_is_read(tmp_path: Path) -> None:
    path, buffer = tmp_path / "own.zip", io.BytesIO()
    Image.new("RGBA", (112, 112), (255, 0, 0, 255)).save(buffer, "webp", lossless=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "concepts.json", json.dumps([{"hexcode": "1", "label": "red square", "group": 9, "subgroup": 99}])
        )
        archive.writestr("1.webp", buffer.getvalue())
    assert EmojiData("core", path).concepts == []
    data = EmojiData("full", path)
    drawn = np.asarray(data.render(Caption(data.concepts[0], Background("plain", "white")), 0)).astype(int)
    red = (np.abs(drawn - [255, 0, 0]) < 12).all(-1)
    assert 0.66**2 < red.mean() < 0.88**2
