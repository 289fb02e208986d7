"""Captioned images on disk, and their latents and prompt embeddings, computed once and cached."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shivelight.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARD = 256


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


@dataclass(frozen=True)
class Sample:
    """A batch as the trainer needs it.

    Attributes:
        latents: [B, C, H, W], scaled as the backbone sees them.
        embeddings: [B, M, J] prompt embeddings.
        pooled: [B, P] pooled prompt embeddings.
    """

    latents: Tensor
    embeddings: Tensor
    pooled: Tensor


class LatentCache:
    """Latents and prompt embeddings in shards of safetensors; complete or absent, never half.

    Args:
        folder: made by `build_cache`.
    """

    def __init__(self, folder: Path) -> None:
        try:
            record = json.loads((folder / "cache.json").read_text())
            self.count, self.captions = int(record["count"]), list(record["captions"])
            self._shards = [safe_open(folder / name, framework="pt") for name in record["shards"]]
            empty = safe_open(folder / "empty.safetensors", framework="pt")
            self.empty_embeddings, self.empty_pooled = empty.get_tensor("embeddings"), empty.get_tensor("pooled")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise DataError(
                f"The latent cache {folder} cannot be read: {error}. Delete it to have it made anew."
            ) from error

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], dropped: Sequence[bool]) -> Sample:
        """The chosen samples in fp32; where `dropped`, with the empty caption."""
        rows = [self._row(int(index)) for index in indices]
        latents = torch.stack([row["latents"] for row in rows]).float()
        texts = [
            (self.empty_embeddings[0], self.empty_pooled[0]) if drop else (row["embeddings"], row["pooled"])
            for row, drop in zip(rows, dropped, strict=True)
        ]
        return Sample(latents, torch.stack([t[0] for t in texts]).float(), torch.stack([t[1] for t in texts]).float())

    def _row(self, index: int) -> dict[str, Tensor]:
        shard = self._shards[index // SHARD]
        return {name: shard.get_slice(name)[index % SHARD] for name in ("latents", "embeddings", "pooled")}


def build_cache(
    pipe: Any,
    images: Sequence[CaptionedImage],
    folder: Path,
    size: int,
    max_sequence_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode every image and caption once; a cache of the same data and models is reused.

    Args:
        pipe: a pipeline with `vae` and SD3's `encode_prompt`.
        images: from `read_folder`.
        folder: where caches live; this one goes into a subfolder named by its contents.
        size: side of the pictures in pixels.
        max_sequence_length: T5 tokens, as the pipeline call takes it.
        progress: called with (done, total).
    """
    target = folder / _fingerprint(pipe, images, size, max_sequence_length)
    if (target / "cache.json").exists():
        return LatentCache(target)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        shards = []
        for first in range(0, len(images), SHARD):
            part = images[first : first + SHARD]
            latents, embeddings, pooled = [], [], []
            for start in range(0, len(part), 16):
                chunk = part[start : start + 16]
                latents.append(encode_images(pipe, torch.stack([load_image(i.path, size) for i in chunk])))
                text = encode_captions(pipe, [i.caption for i in chunk], max_sequence_length)
                embeddings.append(text[0])
                pooled.append(text[1])
                if progress is not None:
                    progress(first + start + len(chunk), len(images))
            name = f"{first // SHARD:05d}.safetensors"
            save_file(
                {"latents": torch.cat(latents), "embeddings": torch.cat(embeddings), "pooled": torch.cat(pooled)},
                unfinished / name,
            )
            shards.append(name)
        empty = encode_captions(pipe, [""], max_sequence_length)
        save_file({"embeddings": empty[0], "pooled": empty[1]}, unfinished / "empty.safetensors")
        record = {"count": len(images), "shards": shards, "captions": [image.caption for image in images]}
        (unfinished / "cache.json").write_text(json.dumps(record))
        unfinished.rename(target)
    except OSError as error:
        raise DataError(
            f"The latent cache could not be written to {folder}: {error}. Free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return LatentCache(target)


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Latents as the backbone sees them, fp16 on the CPU: [B, 3, S, S] in [-1, 1] to [B, C, H, W]."""
    vae = pipe.vae
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * vae.config.scaling_factor).half().cpu()


@torch.no_grad()
def encode_captions(pipe: Any, captions: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """(prompt embeddings [B, M, J], pooled [B, P]) in fp16 on the CPU, by the pipeline's own text encoders."""
    embeddings, _, pooled, _ = pipe.encode_prompt(
        captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return embeddings.half().cpu(), pooled.half().cpu()


def _fingerprint(pipe: Any, images: Sequence[CaptionedImage], size: int, max_sequence_length: int) -> str:
    """A name for the data and models that went into a cache: paths, sizes, times, captions and the encoders' weights."""
    digest = hashlib.sha256(f"{size}|{max_sequence_length}".encode())
    for image in images:
        stat = image.path.stat()
        digest.update(f"{image.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{image.caption}".encode())
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        model = getattr(pipe, name, None)
        if model is not None:
            first = next(model.parameters()).detach().float().flatten()[:64].cpu()
            digest.update(f"{name}|{sum(p.numel() for p in model.parameters())}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]
