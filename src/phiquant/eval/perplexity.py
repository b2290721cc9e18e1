"""Perplexity of a text, by the rules of llama.cpp's tool, so that figures can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError
from .kl import LogitsSource, log_softmax

__all__ = ["Perplexity", "perplexity"]

ROWS = 32  # distributions widened to float64 at a time


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood.

    Attributes:
        value: the perplexity.
        error: its standard error.
        tokens: how many predictions were scored.
    """

    value: float
    error: float
    tokens: int


def perplexity(
    model: LogitsSource, text: str, *, window: int = 512, windows: int = 0, bos: int | None = None
) -> Perplexity:
    """Perplexity over windows that do not overlap, the second half of each scored.

    Args:
        model: what predicts.
        text: tokenized once as a whole.
        window: tokens a window holds; the cache is empty at its start. What is left over at the end is ignored.
        windows: how many at most; 0 for all.
        bos: a token to put in place of the first of each window, for models whose prompts begin with one.

    Errors: RequestError if the text is shorter than two windows.
    """
    ids = model.tokenize(text)
    if len(ids) < 2 * window:
        raise RequestError(f"the text has {len(ids)} tokens; two windows of {window} are the least to measure on")
    count = min(len(ids) // window, windows or len(ids))
    first = window // 2
    losses: list[float] = []
    for number in range(count):
        piece = list(ids[number * window : (number + 1) * window])
        if bos is not None:
            piece[0] = bos
        logits = model.logits(piece)[first:-1]
        targets = np.asarray(piece[first + 1 :])
        for start in range(0, len(targets), ROWS):
            part = targets[start : start + ROWS]
            losses += (-log_softmax(logits[start : start + ROWS])[np.arange(len(part)), part]).tolist()
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((x - mean) ** 2 for x in losses) / len(losses)
    value = math.exp(mean)
    return Perplexity(value, value * math.sqrt(variance / (len(losses) - 1)), len(losses))
