"""Rows of logits, and what a measurement takes from them, all arithmetic over the vocabulary in float64.

Rows come as float32 [rows, vocabulary] and are worked on a few at a time, so that what is widened stays in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

__all__ = ["Compared", "Distributions", "LogitRows", "compare", "log_softmax", "log_sum_exp", "losses", "slices"]

ELEMENTS: Final = 1 << 18  # numbers widened at a time: 2 MB; 32 rows of 32,064 at once took three times as long

Floats = NDArray[np.float64]


class Distributions(Protocol):
    """Next-token distributions of some positions; `exact` if they add up to 1, as rounded ones do not."""

    exact: ClassVar[bool]

    def __len__(self) -> int:
        """Positions."""
        ...

    def part(self, rows: slice) -> tuple[Floats, Floats]:
        """Log-probabilities and probabilities of these rows; a probability of zero is a token that does not count."""
        ...


@dataclass(frozen=True)
class LogitRows:
    """Distributions as a model gives them: float32 [rows, vocabulary]."""

    logits: NDArray[np.float32]
    exact: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.logits)

    def part(self, rows: slice) -> tuple[Floats, Floats]:
        """Log-probabilities and probabilities of these rows."""
        log = self.logits[rows].astype(np.float64)
        log -= log.max(axis=-1, keepdims=True)
        p = np.exp(log)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
        log -= np.log(total)
        return log, p


@dataclass(frozen=True)
class Compared:
    """Of each row: KL(base ‖ other) in nats, and whether both find the same token likeliest.

    If tokens to be predicted were given, also their negative log-likelihood by both, which is otherwise empty.
    """

    divergence: Floats
    same: NDArray[np.bool_]
    losses: Floats
    base_losses: Floats


def slices(rows: int, vocabulary: int) -> Iterator[slice]:
    """Parts of so many rows that are worked on at a time."""
    step = max(1, ELEMENTS // max(vocabulary, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Log-probabilities of rows of scores."""
    return LogitRows(logits).part(slice(None))[0]


def log_sum_exp(logits: NDArray[np.float32]) -> Floats:
    """ln Σ exp of each row."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    wide -= top
    total: Floats = top[:, 0] + np.log(np.exp(wide, out=wide).sum(axis=-1))
    return total


def losses(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> Floats:
    """Negative log-likelihood, in nats, of the token that came after each row."""
    found = np.empty(len(targets))
    for rows in slices(*logits.shape):
        part, wanted = logits[rows], targets[rows]
        found[rows] = log_sum_exp(part) - part[np.arange(len(part)), wanted]
    if np.isnan(found).any():
        raise RequestError("the logits hold NaN: the model is broken")
    return found


def compare(base: Distributions, logits: NDArray[np.float32], targets: NDArray[np.int32] | None = None) -> Compared:
    """Distance of a model's rows from those of a base at the same positions. RequestError if one of them is NaN."""
    count = len(logits)
    divergence, same = np.empty(count), np.empty(count, np.bool_)
    found, base_found = (np.empty(0 if targets is None else count) for _ in range(2))
    for rows in slices(*logits.shape):
        log, p = base.part(rows)
        part = logits[rows]
        same[rows] = log.argmax(axis=-1) == part.argmax(axis=-1)
        other = log_softmax(part)
        if targets is not None:
            at = np.arange(len(part)), targets[rows]
            found[rows], base_found[rows] = -other[at], -log[at]
        # A token of probability zero adds nothing, even where the other model's logarithm is minus infinity.
        counts = p != 0
        np.subtract(log, other, out=log, where=counts)
        np.multiply(log, p, out=log, where=counts)
        divergence[rows] = log.sum(axis=-1, where=counts)
    if np.isnan(divergence).any():
        raise RequestError("the logits hold NaN: one of the two models is broken")
    if base.exact:  # rounding may leave a hair below zero, which no divergence is
        np.maximum(divergence, 0, out=divergence)
    return Compared(divergence, same, found, base_found)
