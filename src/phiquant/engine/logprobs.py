"""How likely the model found a token, before any step of sampling had its say."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.truncation import largest

__all__ = ["TokenLogprob", "token_logprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token that came, its log-probability in nats, and those of the likeliest tokens of its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Of a row of logits, float32 [vocabulary], with the `top` likeliest tokens."""
    peak = float(logits.max())
    # The sum in float64; the row itself is widened in it, which costs less than a copy of 200 k logarithms.
    total = peak + float(np.log(np.exp(logits - np.float32(peak), dtype=np.float64).sum()))
    best = largest(logits, top) if top else np.empty(0, np.int64)
    best = best[np.lexsort((best, -logits[best]))]
    return TokenLogprob(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in best))
