"""A small image-text scorer of the embedded data set: how well a picture and a caption fit, as a cosine.

Two encoders whose unit vectors are near for a picture and its caption (CLIP, Radford et al., arXiv 2103.00020), of 0.5 million
parameters: a ConvNet on 64 px, and the caption's words. Trained by `recipes/train_scorer.py` on rendered pictures of the train
split. It is neither the feature network of KID and FD nor the text encoder of the pipeline that it judges.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shivelight.errors import DataError
from shivelight.files import replacing

SCORER = Path(__file__).parent.parent / "demo" / "scorer"
WEIGHTS, SIZES = "scorer.safetensors", "scorer.json"
REMEDY = "rebuild the folder with recipes/train_scorer.py"


class ConvUnit(nn.Module):
    """Convolution, batch norm and ReLU; added to its input where the shapes allow."""

    def __init__(self, width: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y = F.relu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class CaptionScorer(nn.Module):
    """Unit vectors of pictures and of captions "concept on background" in one space.

    Args:
        concepts: what a picture may show, as captions name it.
        backgrounds: what it may stand on, as captions name it.
        width: channels of the first convolution; the others have two and four times as many.
        dim: of the common space.
        image_size: side to which pictures are resized.
    """

    def __init__(
        self,
        concepts: Sequence[str],
        backgrounds: Sequence[str],
        width: int = 32,
        dim: int = 128,
        image_size: int = 64,
    ) -> None:
        super().__init__()
        self.concepts, self.backgrounds = tuple(concepts), tuple(backgrounds)
        self.width, self.dim, self.image_size = width, dim, image_size
        self.words = sorted({word for part in (*self.concepts, *self.backgrounds) for word in part.split()})
        self._index = {word: index for index, word in enumerate(self.words)}
        self.convs = nn.Sequential(
            ConvUnit(3, width, 5, 2),
            ConvUnit(width, 2 * width, stride=2),
            ConvUnit(2 * width, 2 * width),
            ConvUnit(2 * width, 4 * width, stride=2),
            ConvUnit(4 * width, 4 * width),
            ConvUnit(4 * width, 4 * width),
        )
        self.project = nn.Linear(8 * width, dim)
        # A word before "on" is of the concept, one behind it of the background: "red apple on blue".
        self.embed = nn.EmbeddingBag(2 * len(self.words), dim, mode="sum")
        self.read = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that build it again."""
        return {
            "concepts": list(self.concepts), "backgrounds": list(self.backgrounds),
            "width": self.width, "dim": self.dim, "image_size": self.image_size,
        }  # fmt: skip

    def parts(self, caption: str) -> tuple[str, str]:
        """(concept, background) of a caption; a DataError where it is none of the scorer's."""
        concept, _, background = caption.rpartition(" on ")
        if concept not in self.concepts or background not in self.backgrounds:
            raise DataError(
                f"the scorer does not know the caption {caption!r}: it reads 'CONCEPT on BACKGROUND' of "
                f"{len(self.concepts)} concepts ({', '.join(self.concepts[:3])}, ...) and {len(self.backgrounds)} "
                "backgrounds of the embedded data set"
            )
        return concept, background

    def knows(self, captions: Sequence[str]) -> bool:
        """Whether there are captions and all are the scorer's."""
        found = (caption.rpartition(" on ") for caption in captions)
        return len(captions) > 0 and all(c in self.concepts and b in self.backgrounds for c, _, b in found)

    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors [n, dim] of pictures [n, 3, H, W] in [0, 1]."""
        size = (self.image_size, self.image_size)
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
        x = self.convs(2 * pictures - 1)
        return F.normalize(self.project(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)).float(), dim=1)

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [n, dim] of captions, all of them the scorer's."""
        words: list[int] = []
        starts: list[int] = []
        for caption in captions:
            starts.append(len(words))
            for side, part in enumerate(self.parts(caption)):
                words += [self._index[word] + side * len(self.words) for word in part.split()]
        device = self.embed.weight.device
        summed = self.embed(torch.tensor(words, device=device), torch.tensor(starts, device=device))
        return F.normalize(self.read(summed).float(), dim=1)


def save_scorer(scorer: CaptionScorer, folder: Path) -> None:
    """Write sizes, vocabulary and fp16 weights into `folder`, each file whole or not at all."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in scorer.state_dict().items()
    }
    with replacing(folder / WEIGHTS) as unfinished:
        save_file(weights, unfinished)
    with replacing(folder / SIZES) as unfinished:
        unfinished.write_text(json.dumps(scorer.sizes, indent=1) + "\n")


def load_scorer(folder: Path = SCORER) -> CaptionScorer:
    """The scorer of a folder, in fp32, eval mode and without gradients; a DataError where a part is missing or does not fit."""
    for name in (SIZES, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"the scorer's {name} is missing from {folder}: {REMEDY}")
    try:
        sizes = json.loads((folder / SIZES).read_text())
        scorer = CaptionScorer(sizes.pop("concepts"), sizes.pop("backgrounds"), **sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / SIZES} does not describe a scorer ({error!r}): {REMEDY}") from error
    try:
        scorer.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    except Exception as error:  # safetensors has errors of its own, torch says RuntimeError
        said = " ".join(str(error).split())
        raise DataError(f"{folder / WEIGHTS} does not fit {SIZES} ({said}): {REMEDY}") from error
    return scorer.eval().requires_grad_(False)


@cache
def embedded_scorer() -> CaptionScorer:
    """The scorer that is shipped, read once; on the CPU, do not change it."""
    return load_scorer()
