"""What all blocks together add to a stream of tokens, for routing that runs all of them or none.

Where blocks only ever rest together, one residual serves for all: memory does not grow with depth, and a step that runs pays for
one difference instead of one per block. (With `Reuse.whole="output"` the last block's output is kept, and nothing is added up.)
"""

from torch import Tensor


class Segments:
    """Adds up what the blocks of one pass add, as they run.

    What flows straight from one block into the next belongs to one segment, of which only the two ends count. Where something is
    added in between (a ControlNet's residuals), a new segment begins: it is added at every step anyway.
    """

    def __init__(self) -> None:
        self._start: Tensor | None = None
        self._end: Tensor | None = None
        self._version: int | None = None
        self._total: Tensor | None = None

    def follow(self, x: Tensor, out: Tensor) -> None:
        """A block has made out [B, R, D] of x [B, R, D]."""
        if x is not self._end or _version(x) != self._version:
            self._close()
            self._start = x
        self._end, self._version = out, _version(out)

    def finish(self) -> Tensor | None:
        """The sum of all residuals [B, R, D]; None where no block has changed the stream."""
        self._close()
        return self._total

    def _close(self) -> None:
        if self._start is None or self._end is None:
            return
        residual = self._end - self._start
        self._total = residual if self._total is None else self._total + residual


def _version(tensor: Tensor) -> int | None:
    """Counts changes in place, which inference mode does not."""
    return None if tensor.is_inference() else tensor._version


class Passage:
    """What all blocks of one pass add to both streams of tokens [B, N, D] and [B, M, D], joined in some blocks or not."""

    def __init__(self) -> None:
        self._images, self._texts, self._joined = Segments(), Segments(), Segments()
        self._text_tokens = 0

    def follow(self, x: Tensor, out: Tensor, text: Tensor | None, text_out: Tensor | None) -> None:
        """A block has made `out` of x and `text_out` of `text`; None where it has no text, or gives none back."""
        self._images.follow(x, out)
        if text is not None and text_out is not None:
            self._texts.follow(text, text_out)

    def follow_joined(self, stream: Tensor, out: Tensor, text_tokens: int) -> None:
        """A block has made out [B, M + N, D] of a stream whose first M tokens are text."""
        self._joined.follow(stream, out)
        self._text_tokens = text_tokens

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums of the residuals of (image, text); None where no block has changed a stream."""
        image, text, joined = self._images.finish(), self._texts.finish(), self._joined.finish()
        if joined is None:
            return image, text
        own_text, own_image = joined[:, : self._text_tokens], joined[:, self._text_tokens :]
        return own_image if image is None else image + own_image, own_text if text is None else text + own_text
