"""What the two kinds of vocabulary share: words are merged pair by pair, remembered, and long texts go to a library.

Two ways give the same ids. Short texts are merged here, in Python, with lookups of the few pairs that occur in them:
nothing has to be prepared, so that a first prompt costs milliseconds. Long ones go to the `tokenizers` library, which
needs every merge of the vocabulary (with its import 0.2 s for Phi-3, 0.7 s for Phi-4-mini). Prose is equally fast in
both, since words are remembered here; without spaces Python needs up to 5 microseconds a character, the library 0.5,
without the interpreter lock.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

SHORT_TEXT = 65536  # characters; longer texts are worth the library's construction

_CACHED_WORD = 32  # characters
_CACHE_ENTRIES = 1 << 16

# How good a merge is, and what it makes: the smallest is done first, the item at 1 is the id of the merged piece.
Merge = tuple[float, int, int, int]


class WordEncoder(ABC):
    """Encodes normalized text word by word, each by merging symbols: the best pair first, the leftmost among equals."""

    def __init__(self) -> None:
        self._words: dict[str, list[int]] = {}
        self._library: Library | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def normalize(self, text: str) -> str:
        """A fragment of a text, between added tokens, as the vocabulary spells it before it is cut into words."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a NORMAL or BYTE token adds to decoded text."""

    @abstractmethod
    def split(self, text: str) -> Iterable[str]:
        """The words of a normalized text, in order; no merge joins two of them."""

    @abstractmethod
    def symbols(self, word: str) -> list[int]:
        """The ids that a word begins as; TokenizerError where the vocabulary lacks what it needs."""

    @abstractmethod
    def find_merge(self, left: int, right: int) -> Merge | None:
        """What two neighbouring ids become, if anything."""

    @abstractmethod
    def make_library(self) -> Library | None:
        """The same encoder as an object of the library; None if only `symbols` can say what is missing."""

    def encode(self, text: str) -> list[int]:
        """Ids of a normalized text. Raises TokenizerError where the vocabulary cannot express it."""
        if len(text) > SHORT_TEXT:
            library = self.library()
            if library is not None:
                ids: list[int] = library.encode(text, add_special_tokens=False).ids
                return ids
        return self.encode_short(text)

    def encode_short(self, text: str) -> list[int]:
        """The same in Python alone."""
        ids: list[int] = []
        for word in self.split(text):
            known = self._words.get(word)
            if known is None:
                known = self.encode_word(word)
                if len(word) <= _CACHED_WORD:
                    if len(self._words) >= _CACHE_ENTRIES:
                        self._words.clear()
                    self._words[word] = known
            ids += known
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word."""
        return self._merged(self.symbols(word))

    def library(self) -> Library | None:
        """The object that `make_library` makes, made on first use."""
        with self._lock:
            if self._library is None:
                self._library = self.make_library()
            return self._library

    def _merged(self, ids: list[int]) -> list[int]:
        """`ids`, merged in place; -1 stands where a symbol was joined to its left."""
        count = len(ids)
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        heap = []
        for at in range(count - 1):
            merge = self.find_merge(ids[at], ids[at + 1])
            if merge is not None:
                heap.append((merge, at))
        heapify(heap)
        while heap:
            (_, merged, _, _), at = heappop(heap)
            right = after[at]
            if ids[at] < 0 or right == count:
                continue
            current = self.find_merge(ids[at], ids[right])
            if current is None or current[1] != merged:
                continue  # the symbols changed since this pair was pushed
            ids[at], ids[right] = merged, -1
            right = after[at] = after[right]
            if right < count:
                before[right] = at
                merge = self.find_merge(merged, ids[right])
                if merge is not None:
                    heappush(heap, (merge, at))
            left = before[at]
            if left >= 0:
                merge = self.find_merge(ids[left], merged)
                if merge is not None:
                    heappush(heap, (merge, left))
        return [token for token in ids if token >= 0]
