"""Choosing the next token from logits.

The order and meaning of the parameters are llama.cpp's: penalties, top-k, top-p, min-p, temperature. Chance is a
function of the seed and the position alone, so that a sequence comes out the same however it was batched, preempted or
resumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import KernelError, RequestError

__all__ = ["Sampling", "TokenMask", "sample"]

# Tokens at the end of a sequence that the repetition penalty looks at.
PENALTY_WINDOW: Final = 64
# Neighbouring scores that are looked at as one when the largest are sought.
BLOCK: Final = 64


class TokenMask(Protocol):
    """Constrains a sequence, token by token: constrained decoding enters here."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which ids may come next, bool [vocabulary]; None for all."""

    def accept(self, token: int) -> None:
        """This one came."""


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: keep the k likeliest; 0 for all.
        top_p: of these keep the fewest whose probabilities reach this sum; 1 for all.
        min_p: of these keep those at least this fraction as likely as the likeliest.
        repeat_penalty: logits of the last 64 tokens are divided by it (multiplied where negative); 1 for none.
        seed: of the random choice, from 0 to 2^64 - 1.

    Raises:
        RequestError: a value that makes no sense.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf)
        _require("top_k", self.top_k, "0 or more", isinstance(self.top_k, int) and self.top_k >= 0)
        _require("top_p", self.top_p, "from 0 to 1", 0 <= self.top_p <= 1)
        _require("min_p", self.min_p, "from 0 to 1", 0 <= self.min_p <= 1)
        _require("repeat_penalty", self.repeat_penalty, "above 0", 0 < self.repeat_penalty < math.inf)
        _require("seed", self.seed, "from 0 to 2^64 - 1", isinstance(self.seed, int) and 0 <= self.seed < 1 << 64)


def _require(name: str, value: object, expected: str, good: bool) -> None:
    if not good:
        raise RequestError(f"{name} is {value!r} and must be {expected}")


def sample(
    logits: NDArray[np.float32],
    ids: Sequence[int],
    sampling: Sampling,
    *,
    unused: NDArray[np.int64] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The token that follows `ids`.

    Args:
        logits: float32 [vocabulary]; not changed.
        ids: the sequence so far; its length is the position that chance depends on.
        sampling: how to choose.
        unused: ids that must never come, int64 [count].
        allowed: which ids may come, bool [vocabulary].

    Raises:
        KernelError: the logits hold NaN or infinity.
        RequestError: no token is allowed.
    """
    if not math.isfinite(float(logits.max())):
        raise KernelError("the model gave logits that are not finite; its weights or a kernel are broken")
    scores = logits.copy()
    if sampling.repeat_penalty != 1:
        recent = np.unique(np.asarray(ids[-PENALTY_WINDOW:], np.int64))
        values = scores[recent]
        scores[recent] = np.where(values > 0, values / sampling.repeat_penalty, values * sampling.repeat_penalty)
    if unused is not None:
        scores[unused] = -np.inf
    if allowed is not None:
        scores[~allowed] = -np.inf
    likeliest = int(scores.argmax())
    if scores[likeliest] == -np.inf:
        raise RequestError("no token may follow here; the constraint on the output cannot be met")
    if sampling.temperature == 0:
        return likeliest
    kept = _keep(scores, sampling, float(scores[likeliest]))
    weights = np.exp((scores[kept].astype(np.float64) - scores[likeliest]) / sampling.temperature)
    reach = np.cumsum(weights)
    key = np.array([sampling.seed, len(ids)], np.uint64)
    point = np.random.Generator(np.random.Philox(key=key)).random() * reach[-1]
    return int(kept[min(int(np.searchsorted(reach, point, side="right")), len(kept) - 1)])


def _keep(scores: NDArray[np.float32], sampling: Sampling, best: float) -> NDArray[np.int64]:
    """Ids that top-k, top-p and min-p leave, at least the likeliest."""
    kept = _largest(scores, sampling.top_k)
    if sampling.top_p < 1:
        probabilities = np.exp(scores[kept].astype(np.float64) - best)
        probabilities /= probabilities.sum()
        # Together these are less than what top-p leaves out, so sorting can do without them.
        large = probabilities >= (1 - sampling.top_p) / len(kept)
        kept, probabilities = kept[large], probabilities[large]
        order = np.lexsort((kept, -probabilities))
        count = int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p)) + 1
        kept = kept[order[:count]]
    if sampling.min_p > 0:
        kept = kept[scores[kept] >= best + math.log(sampling.min_p)]
    return kept


def _largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k largest scores (0: all) above -inf, the smaller id first of equals."""
    blocks = len(scores) // BLOCK
    bound = -np.inf
    if 0 < k < blocks:
        # k blocks have a maximum of at least this, so the k largest scores do too: far less is left to sort.
        bound = np.partition(scores[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1), -k)[-k]
    kept = np.flatnonzero(scores >= bound) if bound > -np.inf else np.flatnonzero(scores > -np.inf)
    if 0 < k < len(kept):
        kept = kept[np.lexsort((kept, -scores[kept]))[:k]]
    return kept
