"""Byte-level BPE over a GGUF vocabulary, as of GPT-2: a text's bytes are the symbols, and merges come from a list.

Text is cut into words by the regular expression of the vocabulary's pre-tokenizer, a word's UTF-8 bytes are spelled in
the byte alphabet, and the neighbours whose merge comes first in the file's list are joined. Both steps are those of the
`tokenizers` library; the first is always done by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from phiquant.errors import RequestError, TokenizerError
from phiquant.text import alphabet
from phiquant.text.pretokenizers import BY_ID
from phiquant.text.vocabulary import TokenType, Vocabulary
from phiquant.text.words import Merge, WordEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers.pre_tokenizers import PreTokenizer as Splitter

# Characters of one word. The library's engine gives up (as a panic, which is no exception) after 10 million steps back
# within a word, and the patterns step back at most three times over it.
LONGEST_WORD = 1 << 21


class ByteLevelEncoder(WordEncoder):
    """Encodes into ids of NORMAL tokens, and of others only where the file's merges make their very text.

    In a merge, the first item is its place in the list; the last two are 0.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        # A loop in Python over 200,000 tokens or merges would be felt before the first word.
        tokens = vocabulary.tokens
        others = np.flatnonzero(vocabulary.types != TokenType.NORMAL).tolist()
        self._pieces = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(self._pieces) == len(tokens):
            for i in others:
                del self._pieces[tokens[i]]
        else:  # of tokens with equal text the last one counts
            self._pieces = {tokens[i]: i for i in vocabulary.of_type(TokenType.NORMAL)}
        self._ranks = dict(zip(vocabulary.merges, range(len(vocabulary.merges)), strict=True))
        self._spelled: dict[int, str] = {}  # texts of tokens that are not spelled in the alphabet

    @cached_property
    def _marked(self) -> dict[str, int]:
        """Tokens of other types, by their texts as they are and as the alphabet spells them.

        A merge may make one: a checkpoint may declare special what is a word of its vocabulary as well.
        """
        types = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        texts = {self._vocabulary.tokens[i]: i for i in self._vocabulary.of_type(*types)}
        return {alphabet.spell(text.encode()): i for text, i in texts.items()} | texts

    @cached_property
    def _splitter(self) -> Splitter:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        pattern = Regex(BY_ID[self._vocabulary.pre].pattern)
        return Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalize(self, text: str) -> str:
        """Nothing changes."""
        return text

    def token_bytes(self, token: int) -> bytes:
        """What the alphabet reads; a text that it cannot read is taken as it is, as `tokenizers` does."""
        text = self._vocabulary.tokens[token]
        data = alphabet.read(text)
        return text.encode() if data is None else data

    def encode(self, text: str) -> list[int]:
        """See `WordEncoder`; RequestError for a text with a run of millions of characters that could be one word."""
        if len(text) > LONGEST_WORD:
            longest = max(len(run) for pattern in (r"\s+", r"\S+") for run in re.split(pattern, text))
            if longest > LONGEST_WORD:
                raise RequestError(
                    f"the text has a run of {longest:,} characters with no space between, or of nothing but spaces; "
                    f"{LONGEST_WORD:,} are the most that can be cut into words"
                )
        return super().encode(text)

    def split(self, text: str) -> Iterable[str]:
        """Words in the byte alphabet."""
        return [word for word, _ in self._splitter.pre_tokenize_str(text)]

    def symbols(self, word: str) -> list[int]:
        """A token for each byte, or the one for the whole word if the file says that merges do not matter then."""
        if self._vocabulary.ignore_merges and word in self._pieces:
            return [self._pieces[word]]
        try:
            return [self._pieces[character] for character in word]
        except KeyError:
            return [self._byte(character) for character in word]

    def _byte(self, character: str) -> int:
        token = self._found(character)
        if token is None:
            raise TokenizerError(
                f"the vocabulary has no token for the byte {alphabet.BYTES[character]:#04x}; the file is damaged, "
                "convert the model again"
            )
        return token

    def find_merge(self, left: int, right: int) -> Merge | None:
        """See `WordEncoder`."""
        left_text, right_text = self._text(left), self._text(right)
        rank = self._ranks.get(f"{left_text} {right_text}")
        return None if rank is None else (rank, self._made(left_text + right_text), 0, 0)

    def _text(self, token: int) -> str:
        return self._spelled.get(token) or self._vocabulary.tokens[token]

    def _made(self, text: str) -> int:
        token = self._found(text)
        if token is None:
            raise TokenizerError(
                f"a merge makes {text!r}, which is no token of the vocabulary; the file is damaged, "
                "convert the model again"
            )
        return token

    def _found(self, text: str) -> int | None:
        token = self._pieces.get(text)
        if token is None:
            token = self._marked.get(text)
            if token is not None:
                self._spelled[token] = text
        return token

    def make_library(self) -> Library | None:
        """Needs all 256 bytes: without one the library would drop what this encoder refuses."""
        letters = {character: self._found(character) for character in alphabet.BYTES}
        if None in letters.values():
            return None
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        merges = []
        vocabulary = {**self._pieces, **{text: token for text, token in letters.items() if token is not None}}
        for merge in self._vocabulary.merges:
            left, _, right = merge.partition(" ")
            merges.append((left, right))
            if left + right not in vocabulary:
                vocabulary[left + right] = self._made(left + right)
        library = Tokenizer(BPE(vocabulary, merges, ignore_merges=self._vocabulary.ignore_merges))
        library.pre_tokenizer = self._splitter
        return library
