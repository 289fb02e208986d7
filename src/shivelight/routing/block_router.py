"""The router of blocks: how likely a block should run for this sample, and how wide its MLP should be.

Shapes: B samples, N image tokens, M text tokens, D backbone width, T width of the timestep embedding, C width of the
pooled condition, H bottleneck width, r rank of the modulation, S widths. Equations: E-DiT (arXiv 2602.13993), router.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shivelight.errors import AdapterError

DEFAULT_WIDTHS = (0.25, 0.5, 0.75, 1.0)
# Full-capacity start: a fresh router runs every block at its full width, and is not so sure that no gradient is left.
START_GATE = 0.7  # the paper's
START_FULL_WIDTH = 0.9
_NORM_EPS = 1e-6

Start = Literal["full", "random"]


class GateLogits(NamedTuple):
    """What a router says of one block: `gate` [B], the logit of running it, and `width` [B, S], one logit per width.

    Both are fp32, whatever the model was cast to (float64 for a float64 router).
    """

    gate: Tensor
    width: Tensor


def gate_probability(logit: Tensor) -> Tensor:
    """Probability of running the block, p = sigmoid(logit), in fp32 (float64 stays); any shape."""
    return torch.sigmoid(_wide(logit))


def width_choice(width_logits: Tensor) -> Tensor:
    """Index of the likeliest width, [B, S] -> [B] int64; ties, and logits that are all NaN, go to the widest."""
    return width_logits.shape[-1] - 1 - width_logits.flip(-1).argmax(-1)  # argmax returns the first of equals


class _GatedBlock(nn.Module):
    """What both variants do for one block: h = act(((1 + gamma) LN(x) + delta) W), averaged, then two linear heads.

    The paper averages the heads' outputs over the tokens. The heads are linear, so h is averaged and they are applied
    once: the same number for 1 / N of the work.
    """

    def __init__(self, width: int, bottleneck: int, widths: int, start: Start) -> None:
        super().__init__()
        self.trunk = nn.Linear(width, bottleneck)
        self.gate_head = nn.Linear(bottleneck, 1)
        self.width_head = nn.Linear(bottleneck, widths) if widths > 1 else None
        self._start_heads(start)

    @torch.no_grad()
    def _start_heads(self, start: Start) -> None:
        for head in (self.gate_head, self.width_head):
            if head is None:
                continue
            if start == "random":
                nn.init.normal_(head.weight, std=1.0 / math.sqrt(head.in_features))
                nn.init.normal_(head.bias)
            else:
                # Zero weights: a fresh router's probabilities are those of its biases, exactly, for every input.
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        if start == "full":
            self.gate_head.bias.fill_(math.log(START_GATE / (1.0 - START_GATE)))
            if self.width_head is not None:
                narrower = self.width_head.out_features - 1
                self.width_head.bias[-1] = math.log(narrower * START_FULL_WIDTH / (1.0 - START_FULL_WIDTH))

    def logits(
        self, streams: Sequence[Tensor], gamma: Tensor, delta: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> GateLogits:
        """Logits from all tokens of the streams (each [B, *, D]), modulated by gamma and delta [B, D] in fp32."""
        dtype, weight = self.trunk.weight.dtype, _wide(self.trunk.weight)
        # The modulation goes into the weights of each sample: H x D numbers to scale instead of N x D, and one
        # product per sample instead of one over the rows of all, which would round each row by where it lies.
        weights = (weight * (1.0 + gamma)[:, None]).to(dtype)
        bias = _project(delta, weight) + _wide(self.trunk.bias)
        sums: list[Tensor] = []
        for stream in streams:
            # For bf16 tokens the statistics are fp32 inside layer_norm.
            normed = F.layer_norm(stream, stream.shape[-1:], eps=_NORM_EPS).to(dtype)
            hidden = activation(_wide(torch.bmm(normed, weights.mT)) + bias[:, None])
            sums.append(hidden.sum(1))
        pooled = torch.stack(sums).sum(0) / sum(stream.shape[1] for stream in streams)
        gate = self._head(self.gate_head, pooled).squeeze(-1)
        width = gate.new_zeros(len(gate), 1) if self.width_head is None else self._head(self.width_head, pooled)
        return GateLogits(gate, width)

    @staticmethod
    def _head(head: nn.Linear, pooled: Tensor) -> Tensor:
        return _project(pooled, _wide(head.weight)) + _wide(head.bias)


class _LeanBlock(_GatedBlock):
    """One block of `BlockRouter`: r -> 2D starts at zero, so that a fresh router is unmodulated."""

    def __init__(self, width: int, bottleneck: int, rank: int, widths: int, start: Start) -> None:
        super().__init__(width, bottleneck, widths, start)
        self.modulation = nn.Linear(rank, 2 * width, bias=False)  # W and its bias absorb a constant gamma and delta
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, context: Tensor) -> GateLogits:
        gamma, delta = _project(context, _wide(self.modulation.weight)).chunk(2, dim=-1)
        return self.logits([x], gamma, delta, F.silu)


class _ElasticDiTBlock(_GatedBlock):
    """One block of `ElasticDiTRouter`."""

    def __init__(self, width: int, time_width: int, bottleneck: int, widths: int, start: Start) -> None:
        super().__init__(width, bottleneck, widths, start)
        self.modulation = nn.Linear(time_width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self._read = 2 * width  # shift and scale; the rows of the third chunk, a gate, are stored and never used

    def forward(self, x: Tensor, time_embedding: Tensor, text: Tensor | None) -> GateLogits:
        weight, bias = self.modulation.weight[: self._read], self.modulation.bias[: self._read]
        shift, scale = _wide(F.linear(F.silu(time_embedding.to(weight.dtype)), weight, bias)).chunk(2, dim=-1)
        return self.logits([x] if text is None else [text, x], scale, shift, F.relu)


class _BlockRouters(nn.Module):
    """One small module per routed block, in `routers` under the block's index."""

    def __init__(self, blocks: Sequence[int], widths: Sequence[float], start: str, **sizes: int) -> None:
        super().__init__()
        if not blocks or len(set(blocks)) != len(blocks):
            raise AdapterError(f"The routed blocks are {list(blocks)}; give at least one block, each once.")
        widths = tuple(float(share) for share in widths)
        ascending = all(narrow < wide for narrow, wide in zip(widths, widths[1:], strict=False))
        if not widths or widths[-1] != 1.0 or not widths[0] > 0.0 or not ascending:
            raise AdapterError(
                f"The widths are {widths}; give shares of the MLP in (0, 1], ascending, the last 1.0: {DEFAULT_WIDTHS}."
            )
        if start not in ("full", "random"):
            raise AdapterError(f"The block router's start is {start!r}; one of 'full', 'random'.")
        for name, size in sizes.items():
            if size < 1:
                raise AdapterError(f"The block router's {name} is {size}; it must be at least 1.")
        self.widths = widths
        self.routers = nn.ModuleDict()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the routed blocks, ascending."""
        return tuple(int(block) for block in self.routers)

    def _of(self, block: int) -> nn.Module:
        if str(block) not in self.routers:
            raise AdapterError(f"Block {block} has no router; the routed blocks are {list(self.blocks)}.")
        return self.routers[str(block)]


class BlockRouter(_BlockRouters):
    """Gates and widths for every routed block, per sample, with a low-rank modulation (E-DiT, router; made small).

        m = SiLU(P_t(t) + P_c(c)),  (gamma, delta) = U m,  h = mean over tokens of SiLU(((1 + gamma) LN(x) + delta) W)
        gate logit = w_g . h + b_g,  width logits = W_w h + b_w

    P_t and P_c are shared by all blocks; U (2D x r), W (D x H) and the heads are each block's own. The paper's full
    D -> 3D modulation is 8.4% of a 20B backbone, this router 0.1% of a small one.

    A sample's logits do not depend on what the others of its batch hold, and on how many they are only by the
    rounding of one matrix product. Nothing is detached: for no gradient into the backbone, pass a detached `x`.

    Args:
        width: D.
        time_width: T.
        condition_width: C, or None for a backbone without a pooled condition.
        blocks: indices in the backbone of the routed blocks.
        bottleneck: H.
        modulation_rank: r.
        widths: shares of the MLP's hidden channels to choose from, ascending, the last 1.0. For (1.0,) there is no
            width head and the width logits are zeros [B, 1].
        token_stride: every so-manieth token is read: the logits are averages over tokens, which need no more, and the
            router's time is that of reading them. 1 reads all.
        start: "full" starts every block at p = 0.7 and at its full width with 0.9; "random" draws heads and biases
            from a normal distribution, the paper's ablation.
    """

    def __init__(
        self,
        width: int,
        time_width: int,
        condition_width: int | None,
        blocks: Sequence[int],
        *,
        bottleneck: int = 16,
        modulation_rank: int = 4,
        widths: Sequence[float] = DEFAULT_WIDTHS,
        token_stride: int = 4,
        start: Start = "full",
    ) -> None:
        sizes = {"bottleneck": bottleneck, "modulation_rank": modulation_rank, "token_stride": token_stride}
        super().__init__(blocks, widths, start, **sizes)
        self.token_stride = token_stride
        self.from_time = nn.Linear(time_width, modulation_rank, bias=False)
        self.from_condition = (
            None if condition_width is None else nn.Linear(condition_width, modulation_rank, bias=False)
        )
        for block in sorted(blocks):
            self.routers[str(block)] = _LeanBlock(width, bottleneck, modulation_rank, len(self.widths), start)

    def forward(
        self,
        block: int,
        x: Tensor,
        time_embedding: Tensor,
        condition: Tensor | None = None,
        text: Tensor | None = None,
    ) -> GateLogits:
        """Gate and width logits of one block, from what enters it.

        Args:
            block: index of the block in the backbone.
            x: [B, N, D], the image tokens that enter the block.
            time_embedding: [B, T], the backbone's own.
            condition: [B, C], the backbone's pooled condition, or None.
            text: not read; `ElasticDiTRouter` does.
        """
        router = self._of(block)
        context = _project(_wide(time_embedding), _wide(self.from_time.weight))
        if self.from_condition is not None:
            if condition is None:
                raise AdapterError("This block router was built with a condition; pass the pooled condition [B, C].")
            context = context + _project(_wide(condition), _wide(self.from_condition.weight))
        return router(x[:, :: self.token_stride], F.silu(context))


class ElasticDiTRouter(_BlockRouters):
    """The router that E-DiT's authors released, for their weights; the arguments and `forward` are `BlockRouter`'s.

    Per block, `gate_mlps.{i}.` of their checkpoint in brackets: `modulation` T -> 3D on SiLU(t), chunks shift, scale
    and an unused gate [img_mod.1]; LayerNorm without affine, x (1 + scale) + shift; `trunk` D -> 128 [out.0], ReLU;
    `gate_head` [out.2] and `width_head`, averaged over all tokens, text and image. Where the checkpoint has no bias,
    zeros are the same. Its gate runs at p > 0.5, ours at p >= 0.5.

    Padding rows of `text` count like any token, as they do in the released code: pass text without padding where a
    sample's gate must not depend on the longest prompt of its batch.

    Args:
        width: D.
        time_width: T.
        condition_width: not used: the released router reads the timestep embedding only.
        blocks: indices in the backbone of the routed blocks.
        bottleneck: H; 128 in the released code.
        widths: as for `BlockRouter`.
        start: as for `BlockRouter`; the modulation starts at zero.
    """

    def __init__(
        self,
        width: int,
        time_width: int,
        condition_width: int | None,
        blocks: Sequence[int],
        *,
        bottleneck: int = 128,
        widths: Sequence[float] = DEFAULT_WIDTHS,
        start: Start = "full",
    ) -> None:
        super().__init__(blocks, widths, start, bottleneck=bottleneck)
        for block in sorted(blocks):
            self.routers[str(block)] = _ElasticDiTBlock(width, time_width, bottleneck, len(self.widths), start)

    def forward(
        self,
        block: int,
        x: Tensor,
        time_embedding: Tensor,
        condition: Tensor | None = None,
        text: Tensor | None = None,
    ) -> GateLogits:
        """Gate and width logits of one block; `text` is [B, M, D], the text tokens that enter it, or None."""
        return self._of(block)(x, time_embedding, text)


BLOCK_ROUTERS: dict[str, type[BlockRouter] | type[ElasticDiTRouter]] = {
    "lean": BlockRouter,
    "elastic-dit": ElasticDiTRouter,
}


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _project(vectors: Tensor, weight: Tensor) -> Tensor:
    """weight @ vector for each sample, [B, I] x [O, I] -> [B, O], summed alike for every B.

    A product and a sum, not a matmul: autocast would round a matmul to bf16.
    """
    return (vectors[:, None] * weight).sum(-1)
