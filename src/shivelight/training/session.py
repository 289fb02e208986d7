"""One routed training pass: which tokens run, and the gradients around that choice."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shivelight.routing import count_unit, keep_count
from shivelight.training.estimators import (
    apply_input_estimator,
    apply_residual_estimator,
    inclusion,
    perturb,
    soft_rank,
)

EstimatorName = Literal["input", "residual"]


@dataclass
class TeacherRecord:
    """What the dense pass leaves behind, as an `Observer`.

    Attributes:
        features_at: blocks whose outputs are compared with the student's.
        residuals: per routed block [B, N, D], what the dense block added to each token.
        features: per chosen block [B, N, D].
    """

    features_at: tuple[int, ...]
    residuals: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, block: int, x: Tensor, out: Tensor, kept: Tensor | None) -> None:
        """Keep the block's residual, and its output where it is compared."""
        self.residuals[block] = out - x
        if block in self.features_at:
            self.features[block] = out


@dataclass
class TokenSession:
    """A `Session` (see execution/routed.py) for one pass of the student.

    Attributes:
        routed: indices of the routed blocks.
        ratios: [B or 1, L] keep ratios of the routed blocks, with the policy's gradient if it trains.
        teacher: the dense pass on the same input.
        estimator: "residual", or the paper's "input".
        rank_temperature: of the soft rank.
        selection_temperature: of the inclusion, as a share of N.
        noise: standard deviation of the noise on the scores; 0 ranks as inference does.
        generator: of the noise.
        granularity: of the kept counts, as at inference; k stays continuous in the backward pass.
        features: the student's outputs of the blocks that are compared.
    """

    routed: tuple[int, ...]
    ratios: Tensor
    teacher: TeacherRecord
    estimator: EstimatorName = "residual"
    rank_temperature: float = 0.2
    selection_temperature: float = 0.1
    noise: float = 0.0
    generator: torch.Generator | None = None
    granularity: int = 1
    features: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # One transfer for the whole pass, not one for each block.
        self._ratios_on_host: list[list[float]] = self.ratios.detach().float().cpu().tolist()
        self._drawn: dict[int, Tensor] = {}
        self._inclusion: dict[int, Tensor] = {}

    def decide(self, block: int, scores: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Rank the perturbed scores; k = floor(N r) in the forward pass, N r continuous in the backward pass."""
        batch, tokens = scores.shape
        place = self.routed.index(block)
        if self.noise:
            if block not in self._drawn:  # drawn once: gradient checkpointing runs the block a second time
                self._drawn[block] = perturb(torch.zeros_like(scores), self.noise, self.generator)
            scores = scores + self._drawn[block]
        unit = count_unit(tokens, self.granularity)
        counts = tuple(unit * keep_count(row[place], tokens // unit) for row in self._ratios_on_host)
        ranks = soft_rank(scores, self.rank_temperature)
        k = (tokens * self.ratios[:, place]).expand(batch)
        self._inclusion[block] = inclusion(ranks, k, self.selection_temperature, tokens)
        return scores.detach(), counts if len(counts) == batch else counts * batch

    def enter(self, block: int, x: Tensor, kept: Tensor) -> Tensor:
        """The paper's estimator scales the inputs."""
        return apply_input_estimator(x, self._inclusion[block], kept) if self.estimator == "input" else x

    def leave(self, block: int, x: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        """The residual estimator adds (pi - sg(pi)) r."""
        if self.estimator == "residual":
            out = apply_residual_estimator(x, out, self._inclusion[block], kept, self.teacher.residuals[block])
        if block in self.teacher.features_at:
            self.features[block] = out
        return out
