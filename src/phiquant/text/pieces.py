"""SentencePiece BPE over a GGUF vocabulary: merges come from scores, characters without a piece become bytes.

The rule (checked against the published tokenizer.json of Phi-3): every split of a NORMAL piece into two NORMAL pieces
is a merge; merges are ordered by the score of the merged piece, highest first, then by its id, then by the ids of its
parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from phiquant.errors import TokenizerError
from phiquant.text.vocabulary import TokenType, Vocabulary
from phiquant.text.words import Merge, WordEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

SPACE = "\u2581"

_CACHED_PAIRS = 1 << 16


class PieceEncoder(WordEncoder):
    """Encodes into ids of NORMAL and BYTE tokens, and of no others. Normalized text has U+2581 for a space.

    In a merge, the items are minus the score, the merged id, the left and the right one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        tokens = vocabulary.tokens
        # Of pieces with equal text the last one counts, as in llama.cpp.
        self._pieces = {tokens[i]: i for i in vocabulary.of_type(TokenType.NORMAL) if tokens[i]}
        byte_tokens = {tokens[i]: i for i in vocabulary.of_type(TokenType.BYTE)}
        self._bytes = [byte_tokens.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._texts = {token: text for text, token in self._pieces.items()}
        self._ranks = vocabulary.scores.tolist()
        self._merges: dict[tuple[int, int], Merge | None] = {}
        # Where no piece has a space after another character, words can be encoded one by one: no merge crosses.
        joined = "\0".join(self._pieces)
        self._split_words = re.search(f"[^{SPACE}\0]{SPACE}", joined) is None
        self._find_words = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+").findall

    def normalize(self, text: str) -> str:
        """With U+2581 for spaces, and one in front if the file says so."""
        return (SPACE + text if self._vocabulary.add_space_prefix else text).replace(" ", SPACE)

    def token_bytes(self, token: int) -> bytes:
        """U+2581 is a space, a byte token its byte."""
        if self._vocabulary.types[token] == TokenType.BYTE:
            return self._byte_values.get(token, b"")
        return self._vocabulary.tokens[token].replace(SPACE, " ").encode()

    @cached_property
    def _byte_values(self) -> dict[int, bytes]:
        values = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        tokens = self._vocabulary.tokens
        return {i: values[tokens[i]] for i in self._vocabulary.of_type(TokenType.BYTE) if tokens[i] in values}

    def split(self, text: str) -> Iterable[str]:
        """Runs of U+2581 with what follows them, or all of `text` where merges may cross them."""
        words: list[str] = self._find_words(text) if self._split_words else [text]
        return words

    def symbols(self, word: str) -> list[int]:
        """A piece for each character, or the bytes of one that has none."""
        ids: list[int] = []
        for character in word:
            piece = self._pieces.get(character)
            if piece is None:
                ids += self._byte_ids(character)
            else:
                ids.append(piece)
        return ids

    def find_merge(self, left: int, right: int) -> Merge | None:
        """See `WordEncoder`; remembered, since a text repeats its pairs."""
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
        if len(self._merges) >= _CACHED_PAIRS:
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
        found: list[tuple[Merge, str, str]] = []
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

    def make_library(self) -> Library | None:
        """Needs all 256 byte tokens: without one the library would drop what this encoder refuses."""
        if None in self._bytes:
            return None
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        vocabulary = dict(self._pieces)
        vocabulary |= {f"<0x{byte:02X}>": token for byte, token in enumerate(self._bytes) if token is not None}
        return Tokenizer(BPE(vocabulary, self.ordered_merges(), fuse_unk=True, byte_fallback=True))
