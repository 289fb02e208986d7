"""Places of tokens under rotary embeddings that have no batch dimension, where every sample runs tokens of its own.

    (a + ib) -> (a + ib) (cos + i sin)        for neighbouring channels a, b of a head (Su et al. 2021, RoFormer, eq. 34)

A family's attention turns queries and keys by one table for the whole batch. A block that runs on gathered tokens is given no
table; instead, what its query and key norms put out is turned by rows gathered along. The attention itself, its processor and
backend stay as they are. Shapes: B samples, N image tokens, M text tokens, k kept tokens, S = M + k or any of them, 2 C head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shivelight.backbones.spec import Angles
from shivelight.errors import UnsupportedBackboneError
from shivelight.execution.call import BlockCall


def turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries or keys turned by their tokens' angles, computed in fp32.

    Args:
        x: [B, S, H, 2 C] or [B, S, H * 2 C].
        cosines: [S, C], or [B, S, C].
        sines: like `cosines`.

    Returns:
        Like x.
    """
    cosines, sines = (t.to(x.device, torch.float32).unsqueeze(-2) for t in (cosines, sines))  # the same for all heads
    real, imaginary = x.float().unflatten(-1, (-1, cosines.shape[-1], 2)).flatten(2, -3).unbind(-1)
    moved = torch.stack([real * cosines - imaginary * sines, real * sines + imaginary * cosines], dim=-1)
    return moved.reshape(x.shape).to(x.dtype)


def turning(
    block: nn.Module, call: BlockCall, indices: Tensor | None
) -> tuple[dict[str, nn.Module], dict[str, Turning], dict[str, Any]]:
    """What it takes for a block that runs on the tokens `indices` [B, k] to turn its queries and keys by their places.

    Returns:
        (its query and key norms, what they are lent, arguments to replace: the table taken away). Empty where all tokens run, or
        where nothing is turned.
    """
    rotary = call.kind.rotary
    table = None if rotary is None else call.arguments.get(rotary.argument)
    if rotary is None or table is None or indices is None:
        return {}, {}, {}
    if reason := rotary.obstacle(block):
        raise UnsupportedBackboneError(f"The tokens of this {type(block).__name__} cannot be routed. {reason}")
    places = _Places(*rotary.angles(table, call.text_tokens), indices)
    loans = {
        name: Turning(places, stream)
        for stream, names in (("image", rotary.image), ("text", rotary.text), ("both", rotary.both))
        for name in names
    }
    return {name: block.get_submodule(name) for name in loans}, loans, {rotary.argument: None}


class _Places:
    """The angles of each stream, for all tokens or for those that run."""

    def __init__(self, image: Angles, text: Angles | None, indices: Tensor) -> None:
        self._image, self._text, self._indices = image, text, indices
        self._kept: Angles | None = None

    def rows(self, stream: str, count: int) -> Angles:
        """(cosines, sines) of `count` tokens of a stream: [S, C] where they are the same for all samples, else [B, S, C]."""
        if stream == "text":
            assert self._text is not None
            return self._text
        leading = 0 if stream == "image" or self._text is None else len(self._text[0])
        # Keys may be of all tokens, where those of the others are reused, while queries are of those that run.
        every = count - leading == len(self._image[0])
        image = self._image if every else self._gathered()
        if not leading:
            return image
        assert self._text is not None
        text = self._text if every else tuple(t.expand(len(self._indices), -1, -1) for t in self._text)
        cosines, sines = (torch.cat([t.to(i), i], dim=-2) for t, i in zip(text, image, strict=True))
        return cosines, sines

    def _gathered(self) -> Angles:
        if self._kept is None:
            cosines, sines = (t.to(self._indices.device)[self._indices] for t in self._image)
            self._kept = cosines, sines
        return self._kept


class Turning:
    """Lent to a query or key norm: turns what it puts out by the angles of a stream's tokens."""

    def __init__(self, places: _Places, stream: str) -> None:
        self.used, self._places, self._stream = False, places, stream

    def __call__(self, output: Tensor) -> Tensor:
        """Like the output [B, S, ...]."""
        self.used = True
        return turn(output, *self._places.rows(self._stream, output.shape[1]))
