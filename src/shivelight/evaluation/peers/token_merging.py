"""Token merging as ToMeSD does it (Bolya and Hoffman 2023, arXiv 2303.17604; Bolya et al. 2022, arXiv 2210.09461, section 3).

Before a block, one token of every 2 x 2 cell of the picture is a destination, the other three are sources. Every source has an edge
to the destination that is most like it (cosine of the tokens as they enter the block); the r sources with the strongest edges are
averaged into their destinations, and the block runs on what is left. What it adds to a destination is then copied to the sources
that were merged into it.

    d(s) = argmax_d  x_s . x_d / (|x_s| |x_d|),        y_d = (x_d + sum of the merged s with d(s) = d) / (1 + their number)
    out_i = x_i + f(y)_i,  and for a merged source      out_s = x_s + f(y)_{d(s)}

ToMeSD patches a U-Net, around self-attention alone by default. Here, in a DiT, merging is around the whole block (attention and
MLP, as with its merge_crossattn and merge_mlp), in every block, and the places of what is left are its own (rotary embeddings).
Destinations are drawn anew in each cell at every block and step, the same for all samples, as ToMeSD's are.
Shapes: B samples, N tokens of R x C places, r merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import near_square
from shivelight.errors import ShivelightError
from shivelight.evaluation.comparison import OperatingPoint
from shivelight.evaluation.peers.ground import Ground, Passes, Where, blocks_run, generator, run_gathered
from shivelight.execution.call import BlockCall
from shivelight.execution.tokens import gather_tokens, queued

METHOD = "token-merging"
SIDE = 2


class Matching(NamedTuple):
    """Which tokens are merged into which.

    Attributes:
        kept: [B, N - r] indices of those that run, in order.
        merged: [B, r] indices of the sources that do not.
        into: [B, r] indices of the destinations they are merged into.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor


def destinations(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Indices of one token of every whole 2 x 2 cell, drawn; int64 [(rows // 2) * (columns // 2)]."""
    above, left = torch.arange(rows // SIDE)[:, None] * SIDE, torch.arange(columns // SIDE) * SIDE
    drawn = torch.randint(SIDE * SIDE, (rows // SIDE, columns // SIDE), generator=draw)
    return ((above + drawn // SIDE) * columns + left + drawn % SIDE).flatten()


def match(x: Tensor, chosen: Tensor, count: int) -> Matching:
    """Bipartite soft matching of the tokens x [B, N, D] with these destinations, `count` sources merged."""
    batch, tokens = x.shape[:2]
    is_source = torch.ones(tokens, dtype=torch.bool)
    is_source[chosen] = False
    sources, chosen = queued(is_source.nonzero()[:, 0], x.device), queued(chosen, x.device)
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    strength, nearest = (unit[:, sources] @ unit[:, chosen].mT).max(dim=-1)
    strongest = strength.argsort(dim=-1, descending=True, stable=True)[:, :count]
    merged = sources[strongest]
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=x.device).scatter(1, merged, False)
    # The same number in every row, so this needs no loop, and indices come in order.
    kept = stays.float().argsort(dim=-1, descending=True, stable=True)[:, : tokens - count]
    return Matching(kept, merged, chosen[nearest.gather(1, strongest)])


def merge(x: Tensor, matching: Matching) -> Tensor:
    """x [B, N, D] with the mean of what is merged in the place of every destination; the merged stay as they are."""
    index = matching.into[..., None].expand(-1, -1, x.shape[-1])
    return x.scatter_reduce(1, index, gather_tokens(x, matching.merged), "mean", include_self=True)


def unmerge(added: Tensor, matching: Matching, tokens: int) -> Tensor:
    """[B, N - r, D] of the kept tokens -> [B, N, D], that of a destination copied to those merged into it."""
    width = added.shape[-1]
    full = added.new_empty(len(added), tokens, width)
    full.scatter_(1, matching.kept[..., None].expand(-1, -1, width), added)
    return full.scatter_(1, matching.merged[..., None].expand(-1, -1, width), gather_tokens(full, matching.into))


def merged_count(tokens: int, grid: tuple[int, int], ratio: float) -> int:
    """r: this share of all tokens, but no more than there are sources."""
    rows, columns = grid
    return min(int(tokens * ratio), tokens - (rows // SIDE) * (columns // SIDE))


def token_merging(where: Where, ratio: float) -> OperatingPoint:
    """This share of the tokens is merged before every block.

    Args:
        where: a comparison or a bare loop.
        ratio: at most 0.75 can be merged.

    Raises:
        ShivelightError: the tokens are no picture, or cannot run alone.
    """
    ground = Ground(where)
    if not 0.0 < ratio <= 0.75:
        raise ShivelightError(f"The ratio of token merging is {ratio}; 2 x 2 cells can merge shares in (0, 0.75].")
    if ground.spec.no_tokens:
        raise ground.refuse(
            METHOD, ground.spec.no_tokens.rstrip(".")[0].lower() + ground.spec.no_tokens.rstrip(".")[1:]
        )
    if ground.spec.name == "hunyuan3d":
        raise ground.refuse(METHOD, "its latents are a set, without the cells that are merged in")

    def block(index: int, passes: Passes) -> Any:
        def run(module: nn.Module, call: BlockCall, forward: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
            x = call.image
            memory = passes.memory
            if "grid" not in memory:  # once in a generation: counting places may wait for the device
                memory["grid"] = places(passes.arguments, ground, x.shape[1])
            rows, columns = memory["grid"]
            count = merged_count(x.shape[1], (rows, columns), ratio)
            if not count:
                return call.split(forward(**call.arguments))
            chosen = destinations(rows, columns, generator(index, passes.context.step))
            matching = match(x, chosen, count)
            mixed = merge(x, matching)
            image, text = run_gathered(module, call, forward, mixed, matching.kept)
            return x + unmerge(image - gather_tokens(mixed, matching.kept), matching, x.shape[1]), text

        return run

    def state() -> Any:
        passes = Passes(ground)
        return blocks_run(ground, {index: block(index, passes) for index in range(len(ground.blocks))}, passes)

    def plan(shape: tuple[int, int]) -> float:
        tokens, text = shape
        left = tokens - merged_count(tokens, near_square(tokens), ratio)
        return sum(cost.flops(left, text) for cost in ground.costs) / sum(cost.flops(*shape) for cost in ground.costs)

    return ground.point(METHOD, {"ratio": ratio}, state, plan)


def places(arguments: dict[str, Any], ground: Ground, tokens: int) -> tuple[int, int]:
    """(rows, columns) of the tokens: as the latents' sides are where they come as a picture, or as places are counted for the
    rotary embedding; else as near to a square as they divide. Frames of a video lie one under the other."""
    latents, ids = arguments.get(ground.spec.model_arguments[0]), arguments.get("img_ids")
    if isinstance(latents, Tensor) and latents.ndim >= 4:
        height, width = latents.shape[-2:]
        columns = round((width / height * tokens / _frames(latents, ground)) ** 0.5)
        if columns and tokens % columns == 0:
            return tokens // columns, columns
    if isinstance(ids, Tensor):
        columns = int(ids.reshape(-1, ids.shape[-1])[:, 2].unique().numel())
        if tokens % columns == 0:
            return tokens // columns, columns
    return near_square(tokens)


def _frames(latents: Tensor, ground: Ground) -> int:
    patch = getattr(ground.backbone.config, "patch_size", 1)
    return latents.shape[2] // (patch[0] if isinstance(patch, list | tuple) else 1) if latents.ndim == 5 else 1


def token_merging_points(ground: Ground) -> list[OperatingPoint]:
    """A quarter, half and as much as can be merged."""
    return [token_merging(ground.where, ratio) for ratio in (0.25, 0.5, 0.75)]
