"""Text from the bytes of tokens, piece by piece, and the tokens that each piece is of."""

import codecs
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from phiquant.engine import TokenLogprob
from phiquant.text import StopStrings

__all__ = ["Mark", "Piece", "Pieces"]


@dataclass(frozen=True)
class Mark:
    """A token of a text: its id, where its text begins, in characters, and how likely it was, if that was asked."""

    token: int
    offset: int
    found: TokenLogprob | None


@dataclass(frozen=True)
class Piece:
    """Whole characters, and the tokens that they come from; of several tokens where a character has several."""

    text: str
    marks: tuple[Mark, ...]


class Pieces:
    """Gives pieces as soon as no stop text can begin in them. Bytes that are not UTF-8 are left out.

    Attributes:
        marks: of all tokens.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.marks: list[Mark] = []
        self._stops = StopStrings(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._held = list[Mark]()  # of tokens that have not become text yet
        self._queue = deque[Piece]()  # pieces that must wait for what comes
        self._end = self._given = self._clear = 0  # characters: decoded, given out, and free of stop texts

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; nothing comes out then."""
        return self._stops.stopped is not None

    def push(self, token: int, data: bytes, found: TokenLogprob | None) -> list[Piece]:
        """Another token and its bytes; gives the pieces that are clear now."""
        mark = Mark(token, self._end, found)
        self.marks.append(mark)
        self._held.append(mark)
        return self._add(self._decoder.decode(data))

    def finish(self) -> list[Piece]:
        """What waits, when no more tokens come."""
        found = self._add(self._decoder.decode(b"", final=True))
        self._clear += len(self._stops.finish())
        found += self._released()
        if self._held and not self.stopped:
            found.append(Piece("", tuple(self._held)))
            self._held = []
        return found

    def _add(self, text: str) -> list[Piece]:
        if text:
            self._queue.append(Piece(text, tuple(self._held)))
            self._held = []
            self._end += len(text)
        clear, _ = self._stops.push(text)
        self._clear += len(clear)
        return self._released()

    def _released(self) -> list[Piece]:
        found = []
        while self._queue and self._given + len(self._queue[0].text) <= self._clear:
            found.append(self._queue.popleft())
            self._given += len(found[-1].text)
        if self.stopped and self._queue and self._clear > self._given:  # the stop text begins within a token
            piece = self._queue.popleft()
            found.append(Piece(piece.text[: self._clear - self._given], piece.marks))
            self._given = self._clear
        return found
