import math

import numpy as np
import pytest
import torch
from PIL import Image

from shivelight.errors import DataError
from shivelight.evaluation.fidelity import IDENTICAL_PSNR, fidelity_to_dense, psnr, ssim
from shivelight.evaluation.images import as_tensor, to_tensor


def pictures(count: int, size: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def test_psnr_is_per_image_and_in_decibel():
    reference = torch.full((3, 3, 16, 16), 0.5)
    images = reference + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20.0, 40.0, IDENTICAL_PSNR], abs=1e-3)


def test_ssim_of_constant_images_is_its_luminance_term():
    a, b = 0.4, 0.6
    constant = (0.01) ** 2
    expected = (2 * a * b + constant) / (a * a + b * b + constant)
    values = ssim(torch.full((2, 3, 32, 32), a), torch.full((2, 3, 32, 32), b))
    assert values.tolist() == pytest.approx([expected] * 2, abs=1e-3)


def test_fidelity_falls_as_noise_grows():
    dense = pictures(4)
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    small = fidelity_to_dense((dense + 0.02 * noise).clamp(0, 1), dense)
    large = fidelity_to_dense((dense + 0.2 * noise).clamp(0, 1), dense)
    assert (small.psnr > large.psnr + 10).all()
    assert (small.ssim > large.ssim + 0.1).all()


def test_images_are_paired_in_order():
    dense = pictures(3)
    assert fidelity_to_dense(dense, dense).psnr.tolist() == [IDENTICAL_PSNR] * 3
    assert (fidelity_to_dense(dense.roll(1, 0), dense).psnr < 30).all()


def test_more_images_than_one_batch_give_one_value_each():
    dense = pictures(70, size=16)
    noise = torch.linspace(0.01, 0.2, 70).view(-1, 1, 1, 1)
    scores = fidelity_to_dense((dense * 0.5 + noise), dense * 0.5)
    expected = [-20 * math.log10(float(step)) for step in noise.flatten()]
    assert scores.psnr.tolist() == pytest.approx(expected, abs=0.02)
    estimates = scores.estimates()
    assert estimates["psnr_to_dense"].samples == 70
    assert estimates["psnr_to_dense"].low < estimates["psnr_to_dense"].value < estimates["psnr_to_dense"].high


def test_pil_images_and_bytes_read_the_same():
    values = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    from_pil = to_tensor([Image.fromarray(value) for value in values])
    from_bytes = as_tensor(torch.from_numpy(values).permute(0, 3, 1, 2))
    assert from_pil.shape == (2, 3, 20, 24)
    assert torch.equal(from_pil, from_bytes)
    assert float(from_pil.max()) <= 1.0


def test_bad_images_are_named():
    with pytest.raises(DataError, match="no images"):
        to_tensor([])
    with pytest.raises(DataError, match="one size"):
        to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
    with pytest.raises(DataError, match="pair by pair"):
        fidelity_to_dense(pictures(2), pictures(3))
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        as_tensor(torch.zeros(3, 8, 8))
