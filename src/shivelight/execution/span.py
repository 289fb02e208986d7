"""What all blocks together add to a stream of tokens, for routing that runs all of them or none.

Where blocks only ever rest together, one residual serves for all: memory does not grow with depth, and a step that runs pays for
one difference instead of one per block.
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
