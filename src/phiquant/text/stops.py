"""Stop strings: end a text where one of several strings begins, while it is streamed."""

from __future__ import annotations

from collections.abc import Iterable

from phiquant.errors import RequestError


class StopStrings:
    """Passes text on as soon as it can no longer be part of a stop string.

    The text ends where the stop string that ends first begins; of several that end at one place, the longest counts.
    How the text was cut into pieces makes no difference.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises RequestError for an empty stop string, which every text contains."""
        self._stops = list(dict.fromkeys(stops))
        if "" in self._stops:
            raise RequestError("a stop string must not be empty")
        self._held = ""
        self.stopped: str | None = None  # the stop string that was found

    @property
    def has_any(self) -> bool:
        """Whether there is a stop string at all."""
        return bool(self._stops)

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown once `text` has come, and whether a stop string was found; after one, nothing comes out."""
        if self.stopped is not None:
            return "", True
        seen = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return seen[:at], True
        held = max((overlap(seen, stop) for stop in self._stops), default=0)
        cut = len(seen) - held
        self._held = seen[cut:]
        return seen[:cut], False

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with: what has to be held back."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
