"""A text as the windows that a model reads, and which of their positions are scored, by llama.cpp's rules.

    perplexity   | window 0                | window 1                | ...      what is left over is not read
                 |            |== scored ==|            |== scored ==|
    strided      | window 0                |
                     | window 1            |                                   begins `stride` tokens later
                                     |=====|  the last `stride` tokens are scored, so that each has a long context

Position p is scored on how likely it finds the token at p + 1.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

__all__ = ["Windows", "strided_size"]

_PADDING = 256  # llama.cpp's contexts are a multiple of this


@dataclass(frozen=True)
class Windows:
    """What is read and scored.

    Attributes:
        tokens: int32 [windows, size], as they are in the text.
        first: the first scored position of a window; all from it on are, but the last.
        bos: stands for the first token of every window when the model reads it; None: nothing does.
    """

    tokens: NDArray[np.int32]
    first: int
    bos: int | None = None

    @classmethod
    def halves(cls, ids: NDArray[np.int32], size: int, *, limit: int | None = None, bos: int | None = None) -> Self:
        """Windows that do not overlap, the second half of each scored; at most `limit` of them.

        RequestError if there are not tokens enough for two, or a window has nothing to score.
        """
        _check(ids, size, limit)
        count = min(len(ids) // size, limit or len(ids))
        return cls(ids[: count * size].reshape(count, size), size // 2, bos)

    @classmethod
    def strided(cls, ids: NDArray[np.int32], size: int, stride: int, *, limit: int | None = None) -> Self:
        """Windows that begin every `stride` tokens, the last `stride` tokens of each scored.

        RequestError as for `halves`, or if the stride is not within 1 and `size` - 1.
        """
        if not 0 < stride < size:
            raise RequestError(f"a stride of {stride} tokens does not fit windows of {size}; choose 1 to {size - 1}")
        _check(ids, size, limit)
        count = min(-(-(len(ids) - size) // stride), limit or len(ids))
        every: NDArray[np.int32] = np.lib.stride_tricks.sliding_window_view(ids, size)
        return cls(every[: count * stride : stride], size - stride - 1)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> int:
        """Positions of a window that are scored."""
        return self.size - 1 - self.first

    def read(self, window: int) -> NDArray[np.int32]:
        """What the model is given."""
        tokens: NDArray[np.int32] = self.tokens[window]
        if self.bos is not None:
            tokens = tokens.copy()
            tokens[0] = self.bos
        return tokens

    def targets(self, window: int, start: int, stop: int) -> NDArray[np.int32]:
        """The tokens that positions `start` to `stop` - 1 are to predict."""
        targets: NDArray[np.int32] = self.tokens[window, start + 1 : stop + 1]
        return targets


def strided_size(context: int, stride: int) -> int:
    """Tokens of a window in llama-perplexity's strided mode: the context and half a stride, rounded up to 256."""
    return -(-(context + stride // 2) // _PADDING) * _PADDING


def _check(ids: NDArray[np.int32], size: int, limit: int | None) -> None:
    if size < 3 or (limit is not None and limit < 1):
        raise RequestError(f"{limit} windows of {size} tokens cannot be scored; take at least one of three tokens")
    if len(ids) < 2 * size:
        raise RequestError(
            f"the text has {len(ids)} tokens and must have at least {2 * size}, two windows of {size}; "
            "give a longer text or a smaller context"
        )
