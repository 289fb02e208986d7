"""Pictures as tensors: the one form in which the metrics take them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shivelight.errors import DataError


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size, RGB or convertible to it -> float32 [n, 3, H, W] in [0, 1]."""
    if not images:
        raise DataError("there are no images to measure: pass at least one")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise DataError(f"images of one size are needed, these have {sorted(sizes)}: resize them first")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def as_tensor(images: Tensor | Sequence[Image.Image]) -> Tensor:
    """Pictures or a tensor [n, 3, H, W], float in [0, 1] or uint8 -> float32 [n, 3, H, W] in [0, 1]."""
    if not isinstance(images, Tensor):
        return to_tensor(images)
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise DataError(f"images must be a tensor [n, 3, H, W] with n of 1 or more, not of shape {tuple(images.shape)}")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
