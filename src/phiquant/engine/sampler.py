"""Choosing the next token from logits, by a chain of steps.

The order and meaning of the steps are llama.cpp's. Chance is a function of the seed and the position alone, so that a
sequence comes out the same however it was batched, preempted or resumed. Only mirostat remembers anything: how
surprising the text has been.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import truncation
from phiquant.engine.repetition import LARGEST, dry, penalize
from phiquant.engine.sampling import Sampling
from phiquant.engine.truncation import Candidates, largest
from phiquant.errors import KernelError, RequestError

__all__ = ["LogitsProcessor", "Sampler", "TokenMask", "sample"]

_Step = Callable[[Candidates, Sampling, float], Candidates]
_STEPS: Final[Mapping[str, _Step]] = MappingProxyType(
    {
        "top_n_sigma": truncation.top_n_sigma,
        "top_k": truncation.top_k,
        "typ_p": truncation.typical,
        "top_p": truncation.top_p,
        "min_p": truncation.min_p,
        "xtc": truncation.xtc,
        "temperature": truncation.temperature,
    }
)
# Tokens from which mirostat 1 estimates how fast probabilities fall.
_MIROSTAT_TOKENS: Final = 100


class TokenMask(Protocol):
    """Constrains a sequence, token by token: constrained decoding enters here."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which ids may come next, bool [vocabulary]; None for all."""

    def accept(self, token: int) -> None:
        """This one came."""


class LogitsProcessor(Protocol):
    """Changes the scores of what may come next in a sequence, before anything else does."""

    def __call__(self, ids: Sequence[int], logits: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Scores of the token after `ids`, float32 [vocabulary]. Neither argument may be changed or kept."""


class Sampler:
    """Chooses the tokens of one sequence, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._mu = 2 * sampling.mirostat_tau
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._biases = np.array([_clipped(bias) for _, bias in sampling.logit_bias], np.float32)

    def choose(
        self,
        logits: NDArray[np.float32],
        ids: Sequence[int],
        *,
        unused: NDArray[np.int64] | None = None,
        allowed: NDArray[np.bool_] | None = None,
        banned: NDArray[np.int64] | None = None,
    ) -> int:
        """The token that follows `ids`.

        Args:
            logits: float32 [vocabulary]; not changed.
            ids: the sequence so far; its length is the position that chance depends on.
            unused: ids that must never come, int64 [count].
            allowed: which ids may come, bool [vocabulary].
            banned: ids that must not come now, int64 [count].

        Raises:
            KernelError: the logits hold NaN or infinity.
            RequestError: no token is allowed; a bias names a token that there is not.
        """
        s = self.sampling
        if not math.isfinite(float(logits.max())):
            raise KernelError("the model gave logits that are not finite; its weights or a kernel are broken")
        scores = logits.copy()
        if len(self._biased):
            if self._biased.max() >= len(scores):
                raise RequestError(f"logit_bias names the token {self._biased.max()}; there are {len(scores)}")
            np.add.at(scores, self._biased, self._biases)
        steps = list(s.samplers)
        while steps and steps[0] in ("penalties", "dry"):  # these need all scores in their places
            (penalize if steps.pop(0) == "penalties" else dry)(scores, ids, s)
        for some in (unused, banned):
            if some is not None:
                scores[some] = -np.inf
        if allowed is not None:
            scores[~allowed] = -np.inf
        likeliest = int(scores.argmax())
        if scores[likeliest] == -np.inf:
            raise RequestError("no token may follow here; the constraint on the output cannot be met")
        if s.temperature == 0 and s.dynatemp_range == 0 and not self._unsettling(steps):
            return likeliest
        first, second = _chance(s.seed, len(ids))
        if s.mirostat:
            return self._mirostat(_candidates(scores, 0), first)
        limit = (
            s.top_k if steps[:1] == ["top_k"] or (steps[:2] == ["top_n_sigma", "top_k"] and s.top_n_sigma <= 0) else 0
        )
        c = _candidates(scores, limit)
        for name in steps:
            if name in ("penalties", "dry"):
                c = _repeated(c, ids, s, penalize if name == "penalties" else dry, len(scores))
            else:
                c = _STEPS[name](c, s, second)
        if s.temperature == 0 or len(c.ids) == 1:
            return int(c.likeliest_first().ids[0])
        return int(c.ids[_draw(np.exp(c.scores - c.scores.max()), first)])

    def _unsettling(self, steps: Sequence[str]) -> bool:
        """Whether a step may still make another token the likeliest."""
        out = self.sampling.xtc_probability > 0 and self.sampling.xtc_threshold <= 0.5
        return "penalties" in steps or "dry" in steps or (out and "xtc" in steps)

    def _mirostat(self, c: Candidates, chance: float) -> int:
        """The choice that keeps the surprise near tau; https://arxiv.org/abs/2007.14966."""
        s = self.sampling
        c = truncation.temperature(c, s, chance).likeliest_first()
        p = c.probabilities()
        if s.mirostat == 1:
            c = c.keep(np.arange(max(1, min(_tokens_for(p, self._mu, len(p)), len(p)))))
        else:
            c = c.keep(np.arange(max(1, int((-np.log2(p) <= self._mu).sum()))))
        p = c.probabilities()
        at = _draw(p, chance)
        self._mu -= s.mirostat_eta * (-math.log2(p[at]) - s.mirostat_tau)
        return int(c.ids[at])


def sample(
    logits: NDArray[np.float32],
    ids: Sequence[int],
    sampling: Sampling,
    *,
    unused: NDArray[np.int64] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """One choice of a Sampler that remembers nothing; see `Sampler.choose`."""
    return Sampler(sampling).choose(logits, ids, unused=unused, allowed=allowed)


def _clipped(bias: float) -> float:
    return bias if bias == -math.inf else max(-float(LARGEST), min(bias, float(LARGEST)))


def _candidates(scores: NDArray[np.float32], most: int) -> Candidates:
    ids = largest(scores, most)
    return Candidates(ids, scores[ids].astype(np.float64))


def _repeated(
    c: Candidates,
    ids: Sequence[int],
    s: Sampling,
    step: Callable[[NDArray[np.float32], Sequence[int], Sampling], None],
    size: int,
) -> Candidates:
    """Penalties where a chain has them after tokens were left out."""
    scores = np.full(size, -np.inf, np.float32)
    scores[c.ids] = c.scores
    step(scores, ids, s)
    return Candidates(c.ids, scores[c.ids].astype(np.float64))


def _chance(seed: int, position: int) -> tuple[float, float]:
    """Two numbers from 0 to 1, for the choice and for XTC."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    return random.random(), random.random()


def _draw(weights: NDArray[np.float64], chance: float) -> int:
    """An index, as likely as its weight."""
    reach = np.cumsum(weights)
    return min(int(np.searchsorted(reach, chance * reach[-1], side="right")), len(reach) - 1)


def _tokens_for(p: NDArray[np.float64], mu: float, vocabulary: int) -> int:
    """How many tokens mirostat 1 keeps: Zipf's exponent estimated from the likeliest, k from exponent and mu."""
    count = min(_MIROSTAT_TOKENS - 1, len(p) - 1)
    if count < 1:
        return 1
    i = np.arange(count)
    t = np.log((i + 2) / (i + 1))
    falls = np.log(p[:count] / np.maximum(p[1 : count + 1], np.finfo(np.float64).tiny))
    exponent = float((t * falls).sum() / (t * t).sum())
    epsilon = exponent - 1
    if exponent <= 0:
        return len(p)
    try:
        k = (
            (epsilon * 2**mu / (1 - vocabulary**-epsilon)) ** (1 / exponent)
            if epsilon
            else 2**mu / math.log(vocabulary)
        )
    except (OverflowError, ZeroDivisionError):
        return len(p)
    return max(1, int(min(k, len(p))))
