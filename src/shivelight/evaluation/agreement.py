"""Caption agreement: whether pictures show what their captions say, as a small image-text scorer judges it.

Of captions of the embedded data set only, whose scorer (`scorer.py`) reads no others. Figures compare with each other only; they
are never called CLIPScore, whose form they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from shivelight.errors import DataError
from shivelight.evaluation.images import as_tensor
from shivelight.evaluation.scorer import CaptionScorer, embedded_scorer
from shivelight.measurement.statistics import Estimate, bootstrap

BATCH = 64


@dataclass(frozen=True)
class Agreement:
    """What the scorer says of n pictures, and what a results row says of them.

    Attributes:
        cosine: float [n], 100 times the cosine of picture and caption: CLIPScore (Hessel et al., arXiv 2104.08718) with w = 100
            and not cut off at 0, so that differences count there too.
        named: bool [n], whether the caption's concept has the greatest cosine among all concepts on the caption's background.
        seed: of the bootstrap.
    """

    cosine: Tensor
    named: Tensor
    seed: int = 0

    def estimates(self) -> dict[str, Estimate]:
        """The mean cosine and the share that is named, with bootstrap intervals, by the names of results.json."""
        return {
            "caption_agreement": bootstrap(self.cosine, seed=self.seed),
            "named": bootstrap(self.named.double(), seed=self.seed),
        }

    def to_dense(self, dense: "Agreement") -> dict[str, Estimate]:
        """Means of this less those of `dense`, paired: both are of the same captions and seeds, in one order, and the interval
        resamples the pairs. Below 0 agrees less than dense.
        """
        if len(self.cosine) != len(dense.cosine):
            raise DataError(
                f"a paired difference needs as many pictures of either, got {len(self.cosine)} and {len(dense.cosine)}"
            )
        return {
            "agreement_to_dense": bootstrap(self.cosine.double() - dense.cosine.double(), seed=self.seed),
            "named_to_dense": bootstrap(self.named.double() - dense.named.double(), seed=self.seed),
        }


@torch.no_grad()
def caption_agreement(
    images: Tensor | Sequence[Image.Image],
    captions: Sequence[str],
    scorer: CaptionScorer | None = None,
    seed: int = 0,
) -> Agreement:
    """How well pictures agree with their captions, one by one.

    Args:
        images: [n, 3, H, W] in [0, 1], or pictures.
        captions: n of the embedded data set, "red apple on blue stripes".
        scorer: another than the embedded one; on the device of the images.
        seed: of the bootstrap.
    """
    scorer = scorer or embedded_scorer()
    pictures = as_tensor(images)
    if len(pictures) != len(captions):
        raise DataError(
            f"each picture needs its caption, got {len(pictures)} pictures and {len(captions)} captions: pass both in one order"
        )
    broken = (~torch.isfinite(pictures).flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        raise DataError(f"the pictures {broken[:5]} hold NaN or infinity: nothing can be said of their captions")
    parts = [scorer.parts(caption) for caption in captions]
    own = torch.tensor([scorer.concepts.index(concept) for concept, _ in parts])
    vectors = torch.cat([scorer.images(batch) for batch in pictures.split(BATCH)])
    # Every concept on each background that occurs: [backgrounds, concepts, dim].
    grounds = sorted({background for _, background in parts})
    every = torch.stack(
        [scorer.captions([f"{concept} on {ground}" for concept in scorer.concepts]) for ground in grounds]
    )
    rivals = every[[grounds.index(background) for _, background in parts]]
    cosines = (rivals * vectors[:, None]).sum(-1).cpu()
    return Agreement(100 * cosines[torch.arange(len(own)), own], cosines.argmax(1) == own, seed)
