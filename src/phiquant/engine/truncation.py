"""The steps of sampling that leave tokens out, or that change how sharply the rest differ.

Each takes and gives Candidates. Probabilities are float64; equals keep the order of their ids.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.sampling import Sampling

__all__ = ["Candidates", "largest", "min_p", "temperature", "top_k", "top_n_sigma", "top_p", "typical", "xtc"]

# Neighbouring scores that are looked at as one when the largest are sought.
BLOCK: Final = 64


@dataclass(frozen=True)
class Candidates:
    """Tokens that may come: `ids` int64 [n] and their `scores` float64 [n], at least one, all above -inf."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float64]

    def keep(self, which: NDArray[np.generic]) -> "Candidates":
        """Some of them, by a mask or by indices."""
        return Candidates(self.ids[which], self.scores[which])

    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of the scores."""
        p: NDArray[np.float64] = np.exp(self.scores - self.scores.max())
        p /= p.sum()
        return p

    def likeliest_first(self) -> "Candidates":
        """Sorted; of equals the smaller id first."""
        return self.keep(np.lexsort((self.ids, -self.scores)))


def largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
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


def top_k(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """The k likeliest."""
    if s.top_k == 0 or s.top_k >= len(c.ids):
        return c
    return c.keep(np.lexsort((c.ids, -c.scores))[: s.top_k])


def top_p(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """The fewest that together are at least that likely."""
    if s.top_p >= 1:
        return c
    p = c.probabilities()
    # Together these are less than what top-p leaves out, so sorting can do without them.
    enough = p >= (1 - s.top_p) / len(p)
    c, p = c.keep(enough), p[enough]
    order = np.lexsort((c.ids, -p))
    count = int(np.searchsorted(np.cumsum(p[order]), s.top_p)) + 1
    return c.keep(order[:count])


def min_p(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """Those at least so many times as likely as the likeliest."""
    return c.keep(c.scores >= c.scores.max() + math.log(s.min_p)) if s.min_p > 0 else c


def typical(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """Those whose surprise -log p is nearest to its mean, until their probabilities exceed p."""
    if s.typical_p >= 1:
        return c
    c = c.likeliest_first()
    p = c.probabilities()
    surprise = -np.log(np.maximum(p, np.finfo(np.float64).tiny))
    order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), s.typical_p, side="right")) + 1
    return c.keep(order[:count])


def top_n_sigma(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """Those whose score is within n standard deviations, of all scores, of the largest."""
    if s.top_n_sigma <= 0 or len(c.ids) < 2:
        return c
    return c.keep(c.scores >= c.scores.max() - s.top_n_sigma * c.scores.std())


def xtc(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """Now and then (where `chance`, from 0 to 1, is small enough) all but the least likely of the likely ones go."""
    if s.xtc_probability <= 0 or s.xtc_threshold > 0.5 or len(c.ids) < 2 or chance > s.xtc_probability:
        return c
    c = c.likeliest_first()
    likely = int((c.probabilities() >= s.xtc_threshold).sum())
    return c.keep(np.arange(max(likely - 1, 0), len(c.ids)))


def temperature(c: Candidates, s: Sampling, chance: float) -> Candidates:
    """Scores divided by the temperature; at 0 the likeliest alone is left."""
    divisor = s.temperature
    if s.dynatemp_range > 0 and len(c.ids) > 1:
        p = c.probabilities()
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum() / math.log(len(p))
        low, high = max(0.0, s.temperature - s.dynatemp_range), s.temperature + s.dynatemp_range
        divisor = low + (high - low) * max(entropy, 0.0) ** s.dynatemp_exponent
    if divisor <= 0:
        return c.likeliest_first().keep(np.arange(1))
    with np.errstate(over="ignore"):  # of a tiny temperature; what falls to -inf is impossible
        scores = (c.scores - c.scores.max()) / divisor
    return Candidates(c.ids, scores).keep(scores > -np.inf)
