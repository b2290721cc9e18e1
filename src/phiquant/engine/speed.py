"""What steps and sequences take, from those that were: how much of a prompt fits a step, and how long a queue lasts."""

import math
from typing import Final

__all__ = ["LEAST", "MOST_SECONDS", "STEP_SECONDS", "Speed", "mean"]

STEP_SECONDS: Final = 0.2
"""What a step may last while sequences are generating and a prompt waits: whoever reads along waits no longer for the
next token. Every further prompt adds half of it: the same for any number would let texts be generated so fast that most
places always had a prompt that waits, so that first tokens came late and few texts shared a step."""

MOST_SECONDS: Final = 1.0
"""What it may last, however many wait."""

LEAST: Final = 16
"""Prompt tokens that every step takes, a tile of the kernels; or prompts would wait for ever on a slow machine."""

_WEIGHT: Final = 0.2  # of a new time in the mean of the old ones


class Speed:
    """Means of what was measured; none of them changes what is computed."""

    def __init__(self) -> None:
        self._generating = self._token = self._sequence = 0.0  # seconds; 0 until there is one

    def stepped(self, generating: int, prompt: int, seconds: float) -> None:
        """A step for so many sequences that were generating, with so many tokens of prompts, has taken so long."""
        if prompt == 0:
            self._generating = mean(self._generating, seconds)
        elif prompt >= LEAST:
            base = min(self._generating, 0.8 * seconds) if generating else 0.0  # what it would have taken without
            self._token = mean(self._token, (seconds - base) / prompt)

    def ended(self, seconds: float) -> None:
        """A sequence had a place for so long."""
        self._sequence = mean(self._sequence, seconds)

    def room(self, prompts: int) -> int:
        """Tokens of prompts for a step while so many wait and others generate, in whole tiles."""
        if not self._token:
            return 4 * LEAST  # few enough to be safe, and they will tell
        seconds = min(STEP_SECONDS * (1 + prompts) / 2, MOST_SECONDS)
        tiles = min((seconds - self._generating) / self._token, 1 << 30) // LEAST
        return max(LEAST, int(tiles) * LEAST)

    def retry_after(self, places: int) -> float:
        """Seconds until one of so many places is likely to be free, at least 1."""
        return float(max(1, math.ceil(self._sequence / places)))


def mean(old: float, new: float) -> float:
    """The mean of what was measured so far, 0 if there is nothing, and of a new figure, which counts more each."""
    return new if not old else old + (new - old) * _WEIGHT
