"""What the training recipes share: resumable state on disk, the device, and images as tensors."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shivelight.files import replacing


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
    """Attention as two matmuls and a softmax, [B, H, N, D] each: for a few hundred tokens on a CPU the fused kernel's
    backward is slower than all of this."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask, scale = options.get("attn_mask"), options.get("scale")
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
        if options.get("is_causal"):
            scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
        return scores.softmax(-1) @ value


def use_plain_attention(where: torch.device) -> None:
    """On a CPU, train with `plain_attention`."""
    if where.type == "cpu":
        torch.nn.functional.scaled_dot_product_attention = plain_attention


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` whole or not at all: an interruption never leaves half a checkpoint."""
    with replacing(path) as unfinished:
        torch.save(state, unfinished)


def load(path: Path) -> dict[str, Any] | None:
    """The saved state, or None where training has not begun."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def capture(**parts: Any) -> dict[str, Any]:
    """The states of modules, optimizers and the like by name, for `save`; of a list, those of its members."""
    return {
        name: [member.state_dict() for member in part] if isinstance(part, list) else part.state_dict()
        for name, part in parts.items()
    }


def resume(path: Path, **parts: Any) -> dict[str, Any]:
    """Give the parts what `capture` took of them; returns all that was saved, nothing where training has not begun."""
    state = load(path) or {}
    for name, part in parts.items() if state else ():
        members, saved = (part, state[name]) if isinstance(part, list) else ([part], [state[name]])
        for member, own in zip(members, saved, strict=True):
            member.load_state_dict(own)
    return state


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB pictures to a float tensor [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(images: torch.Tensor, columns: int) -> Image.Image:
    """[B, 3, H, W] in [-1, 1] to one picture."""
    array = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    height, width = array.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(array) // columns) * height))
    for index, picture in enumerate(array):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    return sheet


def save_folder(write: Callable[[Path], Any], folder: Path) -> None:
    """Let `write` fill a temporary folder, then put it in the place of `folder`."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
