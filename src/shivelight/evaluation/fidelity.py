"""Fidelity: how near images are to the dense ones of the same prompts and seeds. PSNR and SSIM, image by image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from shivelight.errors import DataError
from shivelight.evaluation.images import as_tensor
from shivelight.measurement.statistics import Estimate, bootstrap

# Identical images have no finite PSNR; one channel of one pixel of a 128 px image off by one step is 95 dB.
IDENTICAL_PSNR = 100.0
BATCH = 64


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """PSNR in dB of each image [n, 3, H, W] in [0, 1] to its reference -> [n]; identical images have 100 dB."""
    values = peak_signal_noise_ratio(images, references, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=IDENTICAL_PSNR)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, sigma 1.5) of each image [n, 3, H, W] in [0, 1] to its reference -> [n]."""
    values = structural_similarity_index_measure(images, references, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(len(images))


@dataclass(frozen=True)
class Fidelity:
    """PSNR [n] and SSIM [n] of n images to their references, and what a results row says of them."""

    psnr: Tensor
    ssim: Tensor
    seed: int = 0

    def estimates(self) -> dict[str, Estimate]:
        """Means over the images with bootstrap intervals, by the names of results.json."""
        return {
            "psnr_to_dense": bootstrap(self.psnr, seed=self.seed),
            "ssim_to_dense": bootstrap(self.ssim, seed=self.seed),
        }


def fidelity_to_dense(
    images: Tensor | Sequence[Image.Image], dense: Tensor | Sequence[Image.Image], seed: int = 0
) -> Fidelity:
    """Compares images with the dense images of the same prompts and seeds, pair by pair, in order."""
    ours, references = as_tensor(images), as_tensor(dense)
    if ours.shape != references.shape:
        raise DataError(
            f"fidelity compares images pair by pair: images {tuple(ours.shape)} cannot pair with dense images "
            f"{tuple(references.shape)}; generate both with the same prompts and size"
        )
    pairs = list(zip(ours.split(BATCH), references.split(BATCH), strict=True))
    return Fidelity(torch.cat([psnr(*pair) for pair in pairs]), torch.cat([ssim(*pair) for pair in pairs]), seed)
