"""Kullback-Leibler divergence between the next-token distributions of two models over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

__all__ = ["Divergence", "LogitsSource", "compare_logits", "divergence", "log_softmax"]

ROWS = 32  # distributions widened to float64 at a time: 32 x 200,064 x 8 bytes is 51 MB


class LogitsSource(Protocol):
    """What a measurement needs of a model; `phiquant.LLM` has it."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as the model is given them."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Scores of the token after each given one, float32 [len(ids), vocabulary]."""
        ...


@dataclass(frozen=True)
class Divergence:
    """How far one model's predictions are from another's.

    Attributes:
        mean: nats per token, the mean of KL(base ‖ other).
        maximum: the largest of a single position.
        top1: share of positions, 0 to 1, at which both find the same token likeliest.
        tokens: positions compared.
    """

    mean: float
    maximum: float
    top1: float
    tokens: int


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of rows of scores, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def compare_logits(base: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[NDArray[np.float64], int]:
    """KL(base ‖ other) of each row, in nats, and the number of rows whose largest score is at the same place.

    Both are float32 [rows, vocabulary]. Errors: RequestError if the shapes differ or a score is NaN.
    """
    if base.shape != other.shape:
        raise RequestError(f"logits of shapes {base.shape} and {other.shape} are not of the same vocabulary and text")
    values = np.empty(len(base))
    for start in range(0, len(base), ROWS):
        rows = slice(start, start + ROWS)
        p, q = log_softmax(base[rows]), log_softmax(other[rows])
        weight = np.exp(p)
        # A token of probability zero adds nothing, even where the other model's logarithm is minus infinity.
        terms = np.zeros_like(weight)
        np.subtract(p, q, out=terms, where=weight > 0)
        terms *= weight
        values[rows] = terms.sum(axis=-1)
    if np.isnan(values).any():
        raise RequestError("the logits hold NaN: one of the two models is broken")
    # Rounding may leave a hair below zero, which no divergence is.
    return np.maximum(values, 0.0), int((base.argmax(-1) == other.argmax(-1)).sum())


def divergence(base: LogitsSource, other: LogitsSource, text: str, *, window: int = 512, limit: int = 0) -> Divergence:
    """Mean KL(base ‖ other) over a text.

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
    parts, same = [], 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        values, equal = compare_logits(base.logits(piece), other.logits(piece))
        parts.append(values)
        same += equal
    every = np.concatenate(parts)
    return Divergence(float(every.mean()), float(every.max()), same / len(every), len(every))
