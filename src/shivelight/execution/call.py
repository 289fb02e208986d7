"""One call of a block's forward: its arguments by name, and the streams of tokens in what goes in and what comes out.

Shapes: B samples, N image tokens, M text tokens, k kept tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor

from shivelight.backbones.spec import BlockSpec
from shivelight.errors import UnsupportedBackboneError
from shivelight.execution.tokens import gather_tokens, take_samples


class BlockCall:
    """One call of a block's forward, with its arguments by name.

    Args:
        kind: of the block.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        text_tokens: M, where the kind's streams are joined.

    Attributes:
        image: the image tokens [B, N, D].
        text: the text tokens [B, M, D] that the block changes; None where it has none.
        text_tokens: M, of the text tokens that the block changes or attends to.
        returned: what the block's forward last gave back, as `split` was shown it.
    """

    def __init__(self, kind: BlockSpec, args: tuple, kwargs: dict[str, Any], text_tokens: int = 0) -> None:
        self.kind = kind
        if len(args) > len(kind.arguments):
            raise UnsupportedBackboneError(
                f"A block in {kind.path!r} was called with {len(args)} arguments, but its spec names {len(kind.arguments)}: "
                f"{', '.join(kind.arguments)}. Correct `arguments` in the spec."
            )
        self.arguments = dict(zip(kind.arguments, args, strict=False)) | kwargs
        self.returned: Any = None
        self._parts: tuple[Tensor, Tensor | None] | None = None
        tokens = self.arguments[kind.image_argument]
        self.text: Tensor | None
        if kind.joined:
            self.image, self.text = tokens[:, text_tokens:], tokens[:, :text_tokens]
        else:
            self.image, self.text = tokens, self.arguments.get(kind.text_argument) if kind.text_argument else None
        context = self.text
        if context is None and kind.context_argument:
            context = self.arguments.get(kind.context_argument)
        self.text_tokens = 0 if context is None else context.shape[1]

    @property
    def stream(self) -> Tensor:
        """The argument that holds the image tokens, and the text tokens where the streams are joined."""
        return self.arguments[self.kind.image_argument]

    def with_image(self, x: Tensor) -> "BlockCall":
        """The same call with other image tokens [B, *, D]."""
        if x is self.image:
            return self
        moved = {self.kind.image_argument: self._joined(x, self.text)}
        return BlockCall(self.kind, (), self.arguments | moved, self.text_tokens)

    def on_tokens(self, x: Tensor, indices: Tensor | None, attends_all: bool = False) -> dict[str, Any]:
        """The arguments with the image tokens replaced by x, and by those at `indices` alone where given.

        Args:
            x: [B, N, D].
            indices: [B, k], or None for all.
            attends_all: whether the tokens that run attend to all N (keys and values reused).
        """
        if indices is None:
            return self.with_image(x).arguments
        kind, moved = self.kind, {self.kind.image_argument: self._joined(gather_tokens(x, indices), self.text)}
        for name in kind.token_arguments:
            value = self.arguments.get(name)
            if value is not None and value.ndim == kind.token_dimensions.get(name, value.ndim):
                moved[name] = gather_tokens(value, indices)
        if kind.text_mask_argument is not None and attends_all:
            mask = self.arguments.get(kind.text_mask_argument)
            if mask is not None:
                more = mask.new_ones(len(mask), x.shape[1] - indices.shape[1])
                moved[kind.text_mask_argument] = torch.cat([mask, more], dim=1)
        return self.arguments | moved

    def of_samples(self, samples: Tensor, runs: bool) -> "BlockCall":
        """The same call for some samples of the batch [b]: all arguments where the block runs, else the streams alone."""
        kind, batch = self.kind, len(self.image)
        streams = (kind.image_argument, kind.text_argument)
        taken = {}
        for name, value in self.arguments.items():
            if not runs and name not in streams:
                continue
            if name in kind.stacked_arguments and isinstance(value, Tensor):
                taken[name] = value.unflatten(0, (-1, batch)).index_select(1, samples).flatten(0, 1)
            else:
                taken[name] = value if name in kind.shared_arguments else take_samples(value, samples, batch)
        return BlockCall(kind, (), taken, self.text_tokens)

    def split(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """(image, text) of what the block returned."""
        self.returned = output
        if self.kind.joined:
            self._parts = output[:, self.text_tokens :], output[:, : self.text_tokens]
            return self._parts
        if self.kind.returns == ("image",):
            return output, None
        named = dict(zip(self.kind.returns, output, strict=True))
        return named["image"], named.get("text")

    def join(self, image: Tensor, text: Tensor | None) -> Any:
        """What the block would have returned."""
        if self.kind.joined:
            # What nothing has changed since is whole already.
            if self._parts is not None and image is self._parts[0] and text is self._parts[1]:
                return self.returned
            return self._joined(image, text)
        if self.kind.returns == ("image",):
            return image
        named = {"image": image, "text": text}
        return tuple(named[name] for name in self.kind.returns)

    def _joined(self, image: Tensor, text: Tensor | None) -> Tensor:
        """What the image argument holds for these tokens."""
        if not self.kind.joined:
            return image
        if image is self.image and text is self.text:
            return self.stream
        assert text is not None
        return torch.cat([text, image], dim=1)
