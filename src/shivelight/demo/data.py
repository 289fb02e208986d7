"""The embedded data set: 3D emoji composited on backgrounds that their captions name.

One zip file holds the small pictures (RGBA WebP, 112 px) and `concepts.json`. A *caption* is a concept on a background,
"red apple on blue stripes"; a picture of it is drawn from the caption and a seed, so the set has as many pictures
as seeds. Captions are split into train / validation / test by a hash of (code point, background): every concept is seen in
training, about 15% of its combinations with a background are held out, and the split never depends on which subset
trains.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from shivelight.errors import DataError

ARCHIVE = Path(__file__).parent / "data" / "emoji.zip"
IMAGE_SIZE = 128
Split = Literal["train", "validation", "test"]
Subset = Literal["basic", "core", "full"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 64, 62),
    "orange": (240, 146, 54),
    "yellow": (246, 214, 74),
    "green": (84, 172, 92),
    "blue": (66, 122, 214),
    "purple": (142, 88, 190),
    "pink": (244, 158, 190),
    "grey": (136, 140, 146),
}
PATTERNS = ("plain", "gradient", "stripes", "checks", "dots", "texture")
# Subgroups (emojibase numbering) of the core set: flowers, fruit, vegetables, sweets, sea animals, birds, bugs.
CORE_SUBGROUPS = frozenset({35, 38, 39, 40, 42, 43, 46})
# The basic set, what the embedded pipeline was taught: 32 flowers, fruits, vegetables, sweets and animals that differ in
# outline and colour. 2 CPU cores draw them in hours; the 116 of the core set were still blobs after as long.
_BASIC = (
    "1f337 1f339 1f33b 1f33d 1f346 1f347 1f349 1f34a 1f34b 1f34c 1f34d 1f34e 1f34f 1f350 1f352 1f353 "
    "1f955 1f966 1f951 1f369 1f36a 1f36d 1f366 1f382 1f40c 1f419 1f41e 1f420 1f433 1f427 1f989 1f98b"
)
BASIC_HEXCODES = frozenset(_BASIC.split())
# Groups whose pictures may be mirrored without turning wrong: animals and nature, food and drink.
MIRRORED_GROUPS = frozenset({3, 4})


@dataclass(frozen=True)
class Background:
    """A pattern in a colour; white is the plain background without one."""

    pattern: str
    colour: str

    def __str__(self) -> str:
        return self.colour if self.pattern == "plain" else f"{self.colour} {self.pattern}"


BACKGROUNDS: tuple[Background, ...] = (
    Background("plain", "white"),
    *(Background(pattern, colour) for pattern in PATTERNS for colour in COLOURS),
)


@dataclass(frozen=True)
class Concept:
    """One emoji: its code point(s), what it is called, and where emojibase files it."""

    hexcode: str
    label: str
    group: int
    subgroup: int


@dataclass(frozen=True)
class Caption:
    """A concept on a background; `str(caption)` is the prompt."""

    concept: Concept
    background: Background

    def __str__(self) -> str:
        return f"{self.concept.label} on {self.background}"

    @property
    def split(self) -> Split:
        """The split this caption belongs to, from the first byte of a hash of (code point, background)."""
        digest = hashlib.sha256(f"{self.concept.hexcode}|{self.background}".encode()).digest()
        share = digest[0] / 256
        return "test" if share < 0.1 else "validation" if share < 0.15 else "train"


class EmojiData:
    """Read access to the archive.

    Args:
        subset: "basic" (32 concepts, those of the embedded pipeline), "core" (about 100 animals, plants and foods) or "full"
            (every labelled emoji: what a GPU can teach).
        archive: the zip file written by `recipes/build_data.py`.
    """

    def __init__(self, subset: Subset = "basic", archive: Path = ARCHIVE) -> None:
        try:
            self._zip = zipfile.ZipFile(archive)
            records = json.loads(self._zip.read("concepts.json"))
        except (OSError, KeyError, zipfile.BadZipFile, json.JSONDecodeError) as error:
            raise DataError(
                f"cannot read the emoji archive {archive}: {error}; rebuild it with recipes/build_data.py"
            ) from error
        concepts = [Concept(**record) for record in records]
        belongs: dict[Subset, Callable[[Concept], bool]] = {
            "basic": lambda concept: concept.hexcode in BASIC_HEXCODES,
            "core": lambda concept: concept.subgroup in CORE_SUBGROUPS,
            "full": lambda concept: True,
        }
        self.concepts = [concept for concept in concepts if belongs[subset](concept)]

    def captions(self, split: Split | None = None) -> list[Caption]:
        """All captions of a split, in a fixed order that mixes concepts and backgrounds."""
        every = (Caption(concept, background) for concept in self.concepts for background in BACKGROUNDS)
        chosen = [caption for caption in every if split is None or caption.split == split]
        return sorted(chosen, key=lambda caption: hashlib.sha256(str(caption).encode()).digest())

    @lru_cache(maxsize=4096)  # noqa: B019 - the data set lives as long as the process
    def picture(self, concept: Concept) -> Image.Image:
        """The concept's RGBA picture as stored."""
        try:
            return Image.open(io.BytesIO(self._zip.read(f"{concept.hexcode}.webp"))).convert("RGBA")
        except (KeyError, OSError) as error:
            raise DataError(
                f"the emoji archive has no readable picture of {concept.label!r} ({concept.hexcode})"
            ) from error

    def render(self, caption: Caption, seed: int, size: int = IMAGE_SIZE) -> Image.Image:
        """Draw the caption: RGB, `size` x `size` px; position, scale, mirroring and pattern phase come from the seed."""
        rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(str(caption).encode()).digest()[:4], "big")])
        canvas = Image.fromarray(draw_background(caption.background, size, rng))
        emoji = self.picture(caption.concept)
        side = round(size * rng.uniform(0.68, 0.86))
        emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
        if caption.concept.group in MIRRORED_GROUPS and rng.random() < 0.5:
            emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
        canvas.paste(emoji, (left, top), emoji)
        return canvas


def draw_background(background: Background, size: int, rng: np.random.Generator) -> np.ndarray:
    """An RGB uint8 array [size, size, 3] of the background, with random phase, period and direction."""
    if background.colour == "white":
        return np.full((size, size, 3), 250, np.uint8)
    colour = np.array(COLOURS[background.colour], np.float64)
    light = 0.35 * colour + 0.65 * 255
    y, x = np.mgrid[0:size, 0:size] / size
    period, phase_x, phase_y = rng.uniform(0.19, 0.27), *rng.uniform(0, 1, 2)
    match background.pattern:
        case "plain":
            mix = np.ones((size, size))
        case "gradient":
            mix = y if rng.random() < 0.5 else 1 - y
        case "stripes":
            along = x + y if rng.random() < 0.5 else x - y
            mix = _edge(np.sin(2 * np.pi * (along / (1.4 * period) + phase_x)))
        case "checks":
            mix = _edge(
                np.sin(2 * np.pi * (x / (2 * period) + phase_x)) * np.sin(2 * np.pi * (y / (2 * period) + phase_y))
            )
        case "dots":
            fx, fy = (x / period + phase_x) % 1 - 0.5, (y / period + phase_y) % 1 - 0.5
            mix = _edge(0.33 - np.hypot(fx, fy), sharpness=24)
        case "texture":
            coarse = Image.fromarray((rng.random((9, 9)) * 255).astype(np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            fine = Image.fromarray((rng.random((26, 26)) * 255).astype(np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            mix = 0.6 * np.asarray(coarse) / 255 + 0.4 * np.asarray(fine) / 255
            mix = np.clip((mix - 0.5) * 2.2 + 0.5, 0, 1)
        case other:
            raise DataError(f"unknown background pattern {other!r}; one of {', '.join(PATTERNS)}")
    return (mix[..., None] * colour + (1 - mix[..., None]) * light).round().astype(np.uint8)


def _edge(wave: np.ndarray, sharpness: float = 10.0) -> np.ndarray:
    """A soft step from 0 to 1 at wave = 0, so that pattern edges are antialiased."""
    return 1 / (1 + np.exp(-np.clip(wave * sharpness, -30, 30)))
