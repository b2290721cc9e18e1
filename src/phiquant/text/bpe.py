"""SentencePiece BPE over a GGUF vocabulary: merges come from scores, characters without a piece become bytes.

The rule (checked against the published tokenizer.json of Phi-3): every split of a NORMAL piece into two NORMAL pieces
is a merge; merges are ordered by the score of the merged piece, highest first, then by its id, then by the ids of its
parts. The pair with the best merge is joined first, the leftmost among equals.

Two ways give the same ids. Short texts are merged here, in Python, with lookups of the few pairs that occur in them:
nothing has to be prepared, so that a first prompt costs milliseconds. Long ones go to the `tokenizers` library, which
needs all 61,249 merges of Phi-3 (about 0.2 s with its import). Prose is equally fast in both, since words are
remembered here; without spaces Python needs up to 5 microseconds a character, the library 0.5, without the interpreter
lock.
"""

from __future__ import annotations

import re
import threading
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from phiquant.errors import TokenizerError
from phiquant.text.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

SPACE = "\u2581"
SHORT_TEXT = 65536  # characters; longer texts are worth the library's construction

_CACHED_WORD = 32  # characters
_CACHE_ENTRIES = 1 << 16

# A merge is its own sort key: minus score, merged id, left id, right id.
_Merge = tuple[float, int, int, int]


class PieceEncoder:
    """Encodes normalized text (spaces already U+2581) into ids of NORMAL and BYTE tokens, and of no others."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        tokens = vocabulary.tokens
        # Of pieces with equal text the last one counts, as in llama.cpp.
        self._pieces = {tokens[i]: i for i in vocabulary.of_type(TokenType.NORMAL) if tokens[i]}
        byte_tokens = {tokens[i]: i for i in vocabulary.of_type(TokenType.BYTE)}
        self._bytes = [byte_tokens.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._texts = {token: text for text, token in self._pieces.items()}
        self._ranks = vocabulary.scores.tolist()
        self._merges: dict[tuple[int, int], _Merge | None] = {}
        self._words: dict[str, list[int]] = {}
        # Where no piece has a space after another character, words can be encoded one by one: no merge crosses.
        joined = "\0".join(self._pieces)
        self._split_words = re.search(f"[^{SPACE}\0]{SPACE}", joined) is None
        self._find_words = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+").findall
        self._library: Library | None = None
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises TokenizerError where a character needs a byte token that the vocabulary lacks."""
        if len(text) > SHORT_TEXT and None not in self._bytes:
            ids: list[int] = self.library().encode(text, add_special_tokens=False).ids
            return ids
        return self.encode_short(text)

    def encode_short(self, text: str) -> list[int]:
        """The same in Python alone, word by word where the vocabulary allows it."""
        if not self._split_words:
            return self._merge(text)
        ids: list[int] = []
        for word in self._find_words(text):
            known = self._words.get(word)
            if known is None:
                known = self._merge(word)
                if len(word) <= _CACHED_WORD:
                    if len(self._words) >= _CACHE_ENTRIES:
                        self._words.clear()
                    self._words[word] = known
            ids += known
        return ids

    def _merge(self, word: str) -> list[int]:
        ids: list[int] = []  # of the symbol that begins at each place; -1 once it was joined to its left
        for character in word:
            piece = self._pieces.get(character)
            if piece is None:
                ids += self._byte_ids(character)
            else:
                ids.append(piece)
        count = len(ids)
        after = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        heap = []
        for at in range(count - 1):
            merge = self._find_merge(ids[at], ids[at + 1])
            if merge is not None:
                heap.append((merge, at))
        heapify(heap)
        while heap:
            (_, merged, _, _), at = heappop(heap)
            right = after[at]
            if ids[at] < 0 or right == count:
                continue
            current = self._find_merge(ids[at], ids[right])
            if current is None or current[1] != merged:
                continue  # the symbols changed since this pair was pushed
            ids[at], ids[right] = merged, -1
            right = after[at] = after[right]
            if right < count:
                before[right] = at
                merge = self._find_merge(merged, ids[right])
                if merge is not None:
                    heappush(heap, (merge, at))
            left = before[at]
            if left >= 0:
                merge = self._find_merge(ids[left], merged)
                if merge is not None:
                    heappush(heap, (merge, left))
        return [token for token in ids if token >= 0]

    def _find_merge(self, left: int, right: int) -> _Merge | None:
        pair = (left, right)
        try:
            return self._merges[pair]
        except KeyError:
            pass
        merge = None
        left_text, right_text = self._texts.get(left), self._texts.get(right)
        if left_text is not None and right_text is not None:  # bytes never merge
            merged = self._pieces.get(left_text + right_text)
            if merged is not None:
                merge = (-self._ranks[merged], merged, left, right)
        if len(self._merges) >= _CACHE_ENTRIES:
            self._merges.clear()
        self._merges[pair] = merge
        return merge

    def _byte_ids(self, character: str) -> list[int]:
        ids = []
        for byte in character.encode():
            token = self._bytes[byte]
            if token is None:
                raise TokenizerError(
                    f"the vocabulary has neither a piece for {character!r} nor the byte token <0x{byte:02X}>"
                )
            ids.append(token)
        return ids

    def ordered_merges(self) -> list[tuple[str, str]]:
        """All merges of the vocabulary, best first."""
        pieces = self._pieces
        found: list[tuple[_Merge, str, str]] = []
        for text, merged in pieces.items():
            rank = -self._ranks[merged]
            for cut in range(1, len(text)):
                left = pieces.get(text[:cut])
                if left is not None:
                    right = pieces.get(text[cut:])
                    if right is not None:
                        found.append(((rank, merged, left, right), text[:cut], text[cut:]))
        found.sort()
        return [(left, right) for _, left, right in found]

    def library(self) -> Library:
        """The same encoder as an object of the `tokenizers` library, made on first use."""
        with self._lock:
            if self._library is None:
                from tokenizers import Tokenizer
                from tokenizers.models import BPE

                vocabulary = dict(self._pieces)
                vocabulary |= {f"<0x{byte:02X}>": token for byte, token in enumerate(self._bytes) if token is not None}
                self._library = Tokenizer(BPE(vocabulary, self.ordered_merges(), fuse_unk=True, byte_fallback=True))
            return self._library
