"""Making repetitions less likely: by tokens that came before (penalties) and by sequences that did (DRY)."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.sampling import Breaker, Sampling

__all__ = ["LARGEST", "dry", "penalize"]

Floats = NDArray[np.float32]

LARGEST: Final = np.float32(1e30)
"""Any other score is nothing beside this, and sums of it are still finite: what is more is this."""

_LARGEST_FLOAT: Final = float(np.finfo(np.float32).max)


def penalize(scores: Floats, ids: Sequence[int], s: Sampling) -> None:
    """Change the scores of recent tokens, in place."""
    if (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) == (1, 0, 0) or s.repeat_last_n == 0:
        return
    recent = ids if s.repeat_last_n < 0 else ids[-s.repeat_last_n :]
    tokens, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    values = scores[tokens]
    forbidden = values == -np.inf
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # of absurd penalties
        values = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
        values = _bounded(values) - _bounded(counts * s.frequency_penalty) - _bounded(s.presence_penalty)
    scores[tokens] = np.where(forbidden, -np.inf, values)


def dry(scores: Floats, ids: Sequence[int], s: Sampling) -> None:
    """Penalise, in place, the tokens that would go on with what has come before in the same order.

    Where the last n tokens also stand earlier, the token that followed them there loses
    multiplier * base^(n - allowed length), n the longest of all such places, if it is at least the allowed length.
    Neither reaches beyond a breaker.
    """
    if s.dry_multiplier == 0 or s.dry_base < 1 or s.dry_penalty_last_n == 0:
        return
    text = np.asarray(ids if s.dry_penalty_last_n < 0 else ids[-s.dry_penalty_last_n :], np.int64)
    reach = _since_breaker(text, s.dry_breakers)
    if len(text) <= s.dry_allowed_length or reach < s.dry_allowed_length:
        return
    # Longer repetitions count no more than the longest whose penalty is a float32.
    most = max(1, int(math.log(_LARGEST_FLOAT) / math.log(s.dry_base))) if s.dry_base > 1.000001 else len(text)
    limit = min(reach, len(text) - 1, s.dry_allowed_length + most)
    singles = {head for head, tail in s.dry_breakers if not tail}
    for token, length in _continuations(text, limit).items():
        if length >= s.dry_allowed_length and token not in singles:
            penalty = s.dry_multiplier * s.dry_base ** min(length - s.dry_allowed_length, most)
            scores[token] -= min(penalty, _LARGEST_FLOAT)


def _bounded(values: NDArray[Any] | float) -> NDArray[Any]:
    bounded: NDArray[Any] = np.clip(values, -LARGEST, LARGEST)
    return bounded


def _since_breaker(text: NDArray[np.int64], breakers: tuple[Breaker, ...]) -> int:
    """Tokens at the end of a text that come after its last breaker; all if it has none."""
    if not breakers:
        return len(text)
    tails: dict[int, list[tuple[int, ...]]] = {}
    for head, tail in breakers:
        tails.setdefault(head, []).append(tail)
    heads = np.flatnonzero(np.isin(text, list(tails)))
    for at in heads[::-1].tolist():
        ends: list[int] = [
            at + 1 + len(tail)
            for tail in tails[int(text[at])]
            if tuple(text[at + 1 : at + 1 + len(tail)].tolist()) == tail
        ]
        if ends:
            return len(text) - max(ends)
    return len(text)


def _continuations(text: NDArray[np.int64], limit: int) -> dict[int, int]:
    """Tokens that followed an earlier copy of the text's end: how many tokens, up to `limit`, the longest copy has."""
    found: dict[int, int] = {}
    ends = np.flatnonzero(text[:-1] == text[-1])
    length = 1
    while len(ends) and length <= limit:
        found.update(dict.fromkeys(text[ends + 1].tolist(), length))  # a longer copy overwrites a shorter one
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[-1 - length]] if length < limit else ends[:0]
        length += 1
    return found
