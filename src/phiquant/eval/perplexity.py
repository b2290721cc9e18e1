"""Perplexity of a text, by the rules of llama.cpp's tool, so that figures can be compared."""

import numpy as np

from .kl import LogitsSource
from .measure import Measurement
from .statistics import Perplexity
from .windows import Windows

__all__ = ["Perplexity", "perplexity"]


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
    ids = np.array(model.tokenize(text), np.int32)
    measured = Measurement(model, Windows.halves(ids, window, limit=windows or None, bos=bos))
    for _ in measured.run():
        pass
    return measured.perplexity
