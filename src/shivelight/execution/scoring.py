"""Scores of tokens: how much each needs to run in a block, by whatever ranks them. Shapes: B samples, N tokens, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shivelight.errors import ShivelightError

if TYPE_CHECKING:
    from shivelight.execution.routed import Routed

# Scores [b, N] of x [b, N, D], which are these samples of a batch.
Ranking = Callable[[Tensor, slice], Tensor]

_FIRST = 1e4  # far above any router's score


def run_router(pair: Any, member: int, x: Tensor, context: Tensor, drift: Tensor | None) -> Tensor:
    """Scores [B, N] of a block's tokens x [B, N, D] by a `PairRouter`."""
    return pair(member, x, context, drift)


class TokenScorer:
    """Ranks tokens as `TokenRouting.scores` says."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, routed: Routed, block: int, x: Tensor, samples: slice) -> Tensor:
        """Scores [B, N] in fp32.

        Args:
            routed: the state of the backbone, in the middle of a pass.
            block: its index.
            x: [B, N, D], the tokens of the chosen samples alone.
            samples: of the batch.
        """
        tokens = routed.config.tokens
        assert tokens is not None
        if tokens.scores == "norm":
            return torch.linalg.vector_norm(x.float(), dim=-1)
        if tokens.scores == "random":
            return self._random(routed, block, x)
        context = routed.context
        if tokens.scores == "drift":
            assert routed.config.reuse is not None
            drift = routed.residuals.scores(
                (context.call, block), x, samples, context.step, routed.config.reuse.max_age
            )
            # Without a residual to go by (memory ran out), the features are all there is.
            return torch.linalg.vector_norm(x.float(), dim=-1) if drift is None else drift
        assert routed.router is not None
        time, condition = routed.embeddings(x.shape[0], samples)
        # Gradients need the whole graph in every block.
        shared = {} if torch.is_grad_enabled() else context.memo.setdefault(("contexts", len(x), samples.start), {})
        pair, member, embedded = routed.router.pair_of(block, time, condition, shared)

        def scored(drift: Tensor | None = None) -> Tensor:
            return routed.regions.run(
                ("scores", member, drift is not None), run_router, pair, member, x, embedded, drift
            )

        if not tokens.sees_drift:
            return scored()
        if routed.session is not None:
            return scored(routed.session.drift(block))
        known = None
        if routed.config.reuse is not None and routed.reuses:
            place, reuse = (context.call, block), routed.config.reuse
            known = routed.residuals.log_drift(place, x, samples, context.step, reuse.max_age)
        if known is None:
            return scored()
        drift, expired = known
        scores = scored(drift)
        # What may not be reused any more is computed anew first, in the router's own order.
        return torch.where(expired, scores + _FIRST, scores)

    def _random(self, routed: Routed, block: int, x: Tensor) -> Tensor:
        """The same random ranking for every sample, drawn from (seed, step, block), so that batching changes nothing."""
        key = (block, routed.context.step, x.shape[1])
        if key not in self._drawn:
            seed = routed.config.tokens.seed if routed.config.tokens else 0
            generator = torch.Generator().manual_seed(hash((seed, *key)) % 2**31)
            self._drawn[key] = torch.rand(x.shape[1], generator=generator)
        return self._drawn[key].to(x.device).expand(x.shape[0], -1)


def paired_scores(routed: Routed, block: int, x: Tensor, rank: Ranking) -> Tensor:
    """Scores [B, N] of x [B, N, D], where guidance pairs passes or halves of a batch with one ranking for both.

    Args:
        routed: the state of the backbone, in the middle of a pass.
        block: its index.
        x: [B, N, D].
        rank: scores the chosen samples of the batch.
    """
    context, tokens = routed.context, routed.config.tokens
    highest = tokens is not None and tokens.cfg_scores == "max"
    if context.branch == "single":
        return rank(x, slice(None))
    if context.branch == "both":
        half = x.shape[0] // 2
        if highest:
            scores = rank(x, slice(None))
            scores = torch.maximum(scores[:half], scores[half:])
        else:
            scores = rank(x[half:], slice(half, None))
        return torch.cat([scores, scores])
    if highest:
        raise ShivelightError(
            "cfg_scores='max' needs both guidance branches in one batch, but here they are separate calls. Use "
            "cfg_scores='cond'."
        )
    if context.branch == "cond":
        context.choices[block] = rank(x, slice(None))
    elif block not in context.choices:
        raise ShivelightError(
            "The unconditional pass came before the conditional one of its step; with cfg_scores='cond' the "
            "conditional branch chooses for both. Run it first, under shivelight.branch(model, 'cond')."
        )
    return context.choices[block]
