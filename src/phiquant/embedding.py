"""Embeddings: the hidden states of a text's tokens, pooled to a vector of length 1."""

from collections.abc import Sequence
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from phiquant.completion import Embeddings, Usage
from phiquant.engine import Sequence as Job
from phiquant.errors import KernelError, RequestError

__all__ = ["POOLINGS", "Pooled", "Pooling", "embeddings", "pooled"]

Pooling = Literal["mean", "last", "none"]
POOLINGS: Final = get_args(Pooling)


class Pooled:
    """Gathers the hidden states of one text as they are computed.

    Attributes:
        job: the engine's sequence.
    """

    def __init__(self, ids: Sequence[int], pooling: Pooling) -> None:
        self._mean = pooling == "mean"
        self._sum: NDArray[np.float64] | None = None
        self._rows: list[NDArray[np.float32]] = []
        first = len(ids) - 1 if pooling == "last" else 0
        self.job = Job(ids, None, hidden=True, first=first, sink=self._take)

    def _take(self, position: int, rows: NDArray[np.float32]) -> None:
        if not self._mean:
            self._rows.append(rows.copy())
            return
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1])
        for row in rows:  # one after the other, so that the sum is the same however the text was divided into steps
            self._sum += row

    def vectors(self) -> NDArray[np.float32]:
        """What was gathered, each row of length 1: float32 [rows, width]."""
        rows = np.concatenate(self._rows).astype(np.float64) if self._sum is None else self._sum[None]
        lengths = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        if not np.isfinite(lengths).all():
            raise KernelError("the hidden states are not finite; the model's weights or a kernel are broken")
        vectors: NDArray[np.float32] = (rows / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)
        return vectors


def pooled(ids: Sequence[int], pooling: str) -> Pooled:
    """A text to be embedded. RequestError if there is no such pooling."""
    if pooling not in POOLINGS:
        raise RequestError(f"pooling is {pooling!r:.80} and must be one of {', '.join(POOLINGS)}")
    return Pooled(ids, pooling)  # type: ignore[arg-type]


def embeddings(found: Sequence[Pooled]) -> Embeddings:
    """The result, once all are computed."""
    tokens = tuple(one.job.prompt_length for one in found)
    return Embeddings(np.concatenate([one.vectors() for one in found]), tokens, Usage(sum(tokens), 0, 0))
