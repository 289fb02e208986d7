"""What the pictures of a comparison say, whatever they cost: fidelity to dense, distance to the data, agreement with captions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shivelight.evaluation.agreement import caption_agreement
from shivelight.evaluation.distribution import fd, kid, kid_difference
from shivelight.evaluation.features import extract_features
from shivelight.evaluation.fidelity import fidelity_to_dense
from shivelight.evaluation.scorer import embedded_scorer


class Judge:
    """Judges sets of pictures of the same captions and seeds, one after the other.

    Args:
        dense: the reference's pictures [n, 3, H, W] in [0, 1].
        seed: of the intervals.
        references: real pictures [m, 3, H, W] for KID and FD, or None.
        network: feature network for them.
        captions: of the pictures. Agreement is left out where they are not of the embedded data set.
    """

    def __init__(
        self,
        dense: Tensor,
        seed: int = 0,
        references: Tensor | None = None,
        network: torch.nn.Module | None = None,
        captions: Sequence[str] = (),
    ) -> None:
        self.dense, self.seed, self.network, self.captions = dense, seed, network, captions
        self._real = None if references is None or network is None else extract_features(references, network)
        self._features: Tensor | None = None
        self._tuned: Tensor | None = None
        known = len(captions) > 0 and embedded_scorer().knows(captions)
        self._agreement = caption_agreement(dense, captions, seed=seed) if known else None

    def figures(self, method: str, pictures: Tensor) -> dict[str, Any]:
        """Figures of a results row; those of the reference have no difference to it. KID also as paired differences: to the
        reference's, and after "dense-finetuned" to that one's."""
        found: dict[str, Any] = {}
        reference = pictures is self.dense
        if not reference:
            found |= fidelity_to_dense(pictures, self.dense, self.seed).estimates()
        if self._real is not None and self.network is not None:
            features = extract_features(pictures, self.network)
            found |= {"kid": kid(self._real, features), "fd": fd(self._real, features)}
            if reference:
                self._features = features
            elif self._features is not None:
                found["kid_to_dense"] = kid_difference(self._real, features, self._features)
            if method == "dense-finetuned":
                self._tuned = features
            elif self._tuned is not None:
                found["kid_to_finetuned"] = kid_difference(self._real, features, self._tuned)
        if self._agreement is not None:
            ours = self._agreement if reference else caption_agreement(pictures, self.captions, seed=self.seed)
            found |= ours.estimates()
            if not reference:
                found |= ours.to_dense(self._agreement)
        return found
