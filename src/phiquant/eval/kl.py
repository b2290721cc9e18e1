"""Kullback-Leibler divergence between the next-token distributions of two models over the same tokens."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .rows import LogitRows, compare, log_softmax
from .statistics import Divergence

__all__ = ["Divergence", "LogitsSource", "compare_logits", "divergence", "log_softmax"]


class LogitsSource(Protocol):
    """What a measurement needs of a model; `phiquant.LLM` has it."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as the model is given them."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Scores of the token after each given one, float32 [len(ids), vocabulary]."""
        ...


def compare_logits(base: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[NDArray[np.float64], int]:
    """KL(base ‖ other) of each row, in nats, and the number of rows whose largest score is at the same place.

    Both are float32 [rows, vocabulary]. Errors: RequestError if the shapes differ or a score is NaN.
    """
    if base.shape != other.shape:
        raise RequestError(f"logits of shapes {base.shape} and {other.shape} are not of the same vocabulary and text")
    found = compare(LogitRows(base), other)
    return found.divergence, int(found.same.sum())


def divergence(base: LogitsSource, other: LogitsSource, text: str, *, window: int = 512, limit: int = 0) -> Divergence:
    """How far `other` is from `base` on a text, every position counted.

    The text's tokens (the first `limit` of them, if it is not 0) are cut into windows of `window` tokens, each of
    which both models read from its start. Errors: RequestError if the text has no tokens or the vocabularies differ.
    """
    ids = base.tokenize(text)
    if limit:
        ids = ids[:limit]
    if not ids:
        raise RequestError("there is no text to compare the models on")
    if other.tokenize(text)[: len(ids)] != ids:
        raise RequestError("the two models have different vocabularies; their predictions cannot be compared")
    values, same = [], []
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        left, right = base.logits(piece), other.logits(piece)
        if left.shape != right.shape:
            raise RequestError("the two models have different vocabularies; their predictions cannot be compared")
        found = compare(LogitRows(left), right)
        values.append(found.divergence)
        same.append(found.same)
    return Divergence.of(np.concatenate(values), np.concatenate(same))
