"""The router that scores tokens: which ones a block should run, given what they hold, when and under which prompt.

Shapes: B samples, N image tokens, D backbone width, T width of the timestep embedding, C width of the pooled
condition, H bottleneck width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shivelight.errors import AdapterError

# Of a fresh router: several times the spread of its own scores, so that it ranks by the drift first.
DRIFT_WEIGHT = 3.0


class PairRouter(nn.Module):
    """One router, shared by adjacent blocks that differ in their layer embedding only (Shiva-DiT, router).

        h = P_t(t) + P_c(c) + P_l(l),    s_i = w . LayerNorm(SiLU(P_x(x_i) + h))

    P_l of a learned embedding is itself a learned vector, so `layer` holds P_l(l) directly. Only differences between
    the scores of one sample matter, so w has no bias, and the LayerNorm no affine part that w would not absorb.

    Where rejected tokens reuse their last residual, the router may see how much that has aged: d_i, the log of (how far
    the residual moved when last computed, times its age), centred over the tokens. It enters h through a linear map that
    starts at zero, and the score directly, s_i + v d_i, so that a fresh router ranks as training-free routing does.
    """

    def __init__(
        self,
        width: int,
        time_width: int,
        condition_width: int | None,
        blocks: int,
        bottleneck: int,
        sees_drift: bool = False,
    ) -> None:
        super().__init__()
        self.from_drift = nn.Linear(1, bottleneck, bias=False) if sees_drift else None
        self.drift_weight = nn.Parameter(torch.full((blocks,), DRIFT_WEIGHT)) if sees_drift else None
        if self.from_drift is not None:
            nn.init.zeros_(self.from_drift.weight)
        self.from_tokens = nn.Linear(width, bottleneck)
        self.from_time = nn.Linear(time_width, bottleneck, bias=False)
        self.from_condition = None if condition_width is None else nn.Linear(condition_width, bottleneck, bias=False)
        self.layer = nn.Parameter(torch.randn(blocks, bottleneck) * 0.02)
        # LayerNorm makes vectors of length sqrt(H): this gives scores of about unit size, on which the
        # temperatures of the soft rank (0.2 at the start) are defined.
        self.score = nn.Parameter(torch.randn(bottleneck) / math.sqrt(bottleneck))

    def context(self, time_embedding: Tensor, condition: Tensor | None) -> Tensor:
        """P_t(t) + P_c(c), [B, H]: the same for all blocks of the pair."""
        dtype = self.from_tokens.weight.dtype
        context = self.from_time(time_embedding.to(dtype))
        if self.from_condition is None:
            return context
        if condition is None:
            raise AdapterError("This router was built with a condition; pass the pooled condition [B, C].")
        return context + self.from_condition(condition.to(dtype))

    def forward(self, member: int, x: Tensor, context: Tensor, drift: Tensor | None = None) -> Tensor:
        """Scores [B, N] in fp32 for the pair's block number `member`, given `context`; see `TokenRouter.forward`."""
        dtype = self.from_tokens.weight.dtype
        hidden = self.from_tokens(x.to(dtype)) + (context + self.layer[member])[:, None]
        if self.from_drift is not None and drift is not None:
            hidden = hidden + drift[..., None].to(dtype) * self.from_drift.weight[:, 0]
        hidden = F.silu(hidden).float()
        # A product and a sum, not a matmul: autocast would round a matmul's scores to bf16 and make ties of them.
        scores = (F.layer_norm(hidden, hidden.shape[-1:]) * self.score.float()).sum(-1)
        if self.drift_weight is not None and drift is not None:
            scores = scores + self.drift_weight[member].float() * drift
        return scores


class TokenRouter(nn.Module):
    """Token scores for every routed block; one `PairRouter` for blocks (1, 2), one for (3, 4), and so on.

    Args:
        width: D.
        time_width: T.
        condition_width: C, or None for a backbone without a pooled condition.
        blocks: indices in the backbone of the routed blocks; block 0 is normally not among them.
        bottleneck: H; 64 in the paper.
        share: how many adjacent blocks share one router; 2 in the paper, 1 for a router of each block's own.
        sees_drift: whether `forward` is given the drift of the tokens' last residuals.
    """

    def __init__(
        self,
        width: int,
        time_width: int,
        condition_width: int | None,
        blocks: Sequence[int],
        bottleneck: int = 64,
        share: int = 2,
        sees_drift: bool = False,
    ) -> None:
        super().__init__()
        if not blocks or len(set(blocks)) != len(blocks):
            raise AdapterError(f"The routed blocks are {list(blocks)}; give at least one block, each once.")
        if share < 1 or bottleneck < 1:
            raise AdapterError(f"share is {share} and bottleneck {bottleneck}; both must be at least 1.")
        groups: dict[int, list[int]] = {}
        for block in sorted(blocks):
            # Counted from block 1, whatever is routed: the pairs of an adapter do not shift with its list of blocks.
            groups.setdefault((block - 1) // share, []).append(block)
        self.pairs = nn.ModuleDict()
        self._place: dict[int, tuple[str, int]] = {}
        for members in groups.values():
            name = "_".join(str(block) for block in members)
            self.pairs[name] = PairRouter(width, time_width, condition_width, len(members), bottleneck, sees_drift)
            for member, block in enumerate(members):
                self._place[block] = (name, member)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the routed blocks, ascending."""
        return tuple(self._place)

    def forward(
        self,
        block: int,
        x: Tensor,
        time_embedding: Tensor,
        condition: Tensor | None = None,
        drift: Tensor | None = None,
        contexts: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Score the tokens at the input of one block.

        Args:
            block: index of the block in the backbone.
            x: [B, N, D], the image tokens that enter the block.
            time_embedding: [B, T], the backbone's own.
            condition: [B, C], the backbone's pooled condition, or None.
            drift: [B, N] fp32, see `PairRouter`; None where no residual is known.
            contexts: what the pairs made of the embeddings in this pass; filled in, and read by a pair's other blocks.

        Returns:
            [B, N] fp32, higher is kept first. The projections run in the parameters' dtype (or autocast's).
        """
        pair, member, context = self.pair_of(block, time_embedding, condition, {} if contexts is None else contexts)
        return pair(member, x, context, drift)

    def pair_of(
        self, block: int, time_embedding: Tensor, condition: Tensor | None, contexts: dict[str, Tensor]
    ) -> tuple[Any, int, Tensor]:
        """(the block's `PairRouter`, its number in it, what that made of the embeddings); arguments as for `forward`."""
        if block not in self._place:
            raise AdapterError(f"Block {block} has no router; the routed blocks are {list(self.blocks)}.")
        name, member = self._place[block]
        pair: Any = self.pairs[name]
        if name not in contexts:
            contexts[name] = pair.context(time_embedding, condition)
        return pair, member, contexts[name]
