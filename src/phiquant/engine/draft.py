"""Speculation without loss: guesses of the next tokens, which the model checks all at once.

A step reads every weight once, for one token or for several. So tokens that a drafter guesses are computed in the same
step as the last token of the sequence; the sampler then goes from row to row, as long as the token that it takes is the
one that was guessed. What comes out is what would have come without: the logits of a row do not depend on the rows
beside it, and chance depends on seed and position alone.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from phiquant.engine.speed import mean

__all__ = ["LONGEST", "Drafter", "Odds", "Pace", "PromptLookup"]

LONGEST: Final = 15
"""Most guesses in a step: with the last token a full tile of the kernels."""

# Tokens that must have come before in the same order for what followed them to be a guess.
NGRAM: Final = 3
_FORGET: Final = 0.9  # of what is known of the odds, what is left after another draft
_IDLE: Final = 0.97  # ... and after a step without one
_FIRST: Final = 3


class Drafter(Protocol):
    """Guesses what follows; one for each sequence.

    Attributes:
        seconds: what a guess takes.
    """

    seconds: float

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `ids`, which only grows from call to call; none if there is no clue."""


class PromptLookup:
    """Where the last three tokens have come before, guesses that what followed them follows again."""

    seconds = 0.0

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # three tokens -> where they were followed last
        self._learned = NGRAM

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """As `Drafter` says. A guess that runs into the end of `ids` goes on with itself."""
        for end in range(self._learned, len(ids)):
            self._after[tuple(ids[end - NGRAM : end])] = end
        self._learned = max(self._learned, len(ids))
        start = self._after.get(tuple(ids[-NGRAM:]))
        if start is None:
            return []
        period = len(ids) - start
        return [ids[start + i % period] for i in range(most)]


class Odds:
    """How likely a drafter's next guess is right if those before it were; from what became of the last ones."""

    def __init__(self) -> None:
        self._right = self._wrong = 0.0

    @property
    def chance(self) -> float:
        """Between 0 and 1; one half as long as nothing is known."""
        return (self._right + 1) / (self._right + self._wrong + 2)

    def drafted(self, guesses: int, right: int) -> None:
        """Of so many guesses the first so many were right."""
        self._right = self._right * _FORGET + right
        self._wrong = self._wrong * _FORGET + (right < guesses)

    def idled(self) -> None:
        """There was no draft, because it did not seem to pay: in time it is tried again."""
        self._right *= _IDLE
        self._wrong *= _IDLE


class Pace:
    """What steps of one sequence take, from those that were timed, and how many guesses pay."""

    def __init__(self) -> None:
        self._one = self._more = 0.0  # seconds of a token alone, and of each further one in the same step

    def timed(self, tokens: int, seconds: float) -> None:
        """A step of one sequence with so many tokens has taken so long."""
        if tokens == 1:
            self._one = mean(self._one, seconds)
        elif self._one:
            self._more = mean(self._more, max(0.0, seconds - self._one) / (tokens - 1))

    def guesses(self, chance: float, seconds: float, most: int) -> int:
        """How many guesses, each right with a chance and made in so many seconds, give most tokens per second."""
        if not self._one:
            return 0
        if not self._more:  # what guesses cost is not known yet: a few will tell
            most = min(most, _FIRST)
        best, speed, expected, likely = 0, 1 / self._one, 1.0, 1.0
        for count in range(1, most + 1):
            likely *= chance
            expected += likely
            tried = expected / (self._one + count * (self._more + seconds))
            if tried > speed:
                best, speed = count, tried
        return best
