"""Captioned images on disk, and the cache of their latents and conditions."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from shivelight.errors import DataError
from shivelight.training.cache import FORMAT, LatentCache, writing
from shivelight.training.checkpoints import weights_fingerprint
from shivelight.training.denoisers import Conditions, Denoiser, denoiser_for

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHUNK = 16


@dataclass(frozen=True)
class CaptionedImage:
    """A picture's path and its caption."""

    path: Path
    caption: str


def read_folder(folder: str | Path) -> list[CaptionedImage]:
    """Captioned images of a folder, in the order of their names.

    Captions come from `metadata.jsonl` (one object a line with `file_name` and `text`, as Hugging Face's imagefolder), else
    from a text file beside each image with the same name.

    Raises:
        DataError: no such folder, no images, or images without captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no image folder {folder}; check the path.")
    listed = folder / "metadata.jsonl"
    if listed.exists():
        return _from_metadata(folder, listed)
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    bare = [p for p in images if not p.with_suffix(".txt").exists()]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(images)} images in {folder} have no caption, {bare[0].name} first. Put one in "
            f"{bare[0].with_suffix('.txt').name}, or list all in metadata.jsonl with file_name and text."
        )
    return [CaptionedImage(p, p.with_suffix(".txt").read_text(encoding="utf-8").strip()) for p in images]


def _from_metadata(folder: Path, listed: Path) -> list[CaptionedImage]:
    found = []
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image = CaptionedImage(folder / record["file_name"], str(record["text"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{listed} line {number} is not {{"file_name": ..., "text": ...}}: {type(error).__name__} {error}.'
            ) from error
        if not image.path.is_file():
            raise DataError(f"{listed} line {number} names {record['file_name']!r}, which is not in {folder}.")
        found.append(image)
    if not found:
        raise DataError(f"{listed} lists no images.")
    return found


def load_image(path: Path, size: int) -> Tensor:
    """One picture, scaled and centre-cropped to size x size: [3, size, size] in [-1, 1]."""
    try:
        with Image.open(path) as handle:
            image = handle.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"The image {path} cannot be read: {error}. Replace or remove it.") from error
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    array = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


def build_cache(
    pipe: Any,
    images: Sequence[CaptionedImage],
    folder: Path,
    size: int,
    max_sequence_length: int | None,
    progress: Callable[[int, int], None] | None = None,
    denoiser: Denoiser | None = None,
) -> LatentCache:
    """Encode every image and caption once; a cache of the same data and models is reused.

    Args:
        pipe: a pipeline with its `vae` and text encoders.
        images: from `read_folder`.
        folder: where caches live; this one goes into a subfolder named by its contents.
        size: side of the pictures in pixels.
        max_sequence_length: text tokens, as the pipeline call takes it; None for its default.
        progress: called with (done, total).
        denoiser: what encodes; that of the pipeline's family for None.

    Raises:
        TrainingError: nothing is known of how the family encodes its data.
        DataError: the size does not fit the backbone, a picture cannot be read, or the cache cannot be written.
    """
    denoiser = denoiser or denoiser_for(pipe)
    denoiser.check_side(size)
    target = folder / _fingerprint(denoiser, images, size, max_sequence_length)
    if (target / "cache.json").exists():
        return LatentCache(target)
    with writing(target) as writer, torch.no_grad():
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            pictures = torch.stack([load_image(i.path, size) for i in chunk])
            latents = _halved({"latents": denoiser.encode_images(pictures)})["latents"]
            texts = denoiser.encode_captions([i.caption for i in chunk], max_sequence_length)
            writer.add(latents, _halved(texts))
            if progress is not None:
                progress(start + len(chunk), len(images))
        empty = _halved(denoiser.encode_empty(max_sequence_length))
        options = denoiser.call_options(size, max_sequence_length)
        writer.finish(empty, [image.caption for image in images], options)
    return LatentCache(target)


def _halved(tensors: Conditions) -> Conditions:
    """In fp16, or bf16 where numbers are too large for it; whole numbers stay."""
    halved = {}
    for name, tensor in tensors.items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        halved[name] = half if bool(torch.isfinite(half).all()) else tensor.bfloat16()
    return halved


def _fingerprint(
    denoiser: Denoiser, images: Sequence[CaptionedImage], size: int, max_sequence_length: int | None
) -> str:
    """A name for the data and models that went into a cache: paths, sizes, times, captions and the encoders' weights."""
    digest = hashlib.sha256(f"{FORMAT}|{type(denoiser).__qualname__}|{size}|{max_sequence_length}".encode())
    for image in images:
        stat = image.path.stat()
        digest.update(f"{image.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{image.caption}".encode())
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        model = getattr(denoiser.pipe, name, None)
        if model is not None:
            digest.update(f"{name}|{weights_fingerprint(model)}".encode())
    return digest.hexdigest()[:16]
