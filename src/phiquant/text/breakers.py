"""Sequence breakers as tokens: where a text, such as a line's end, keeps DRY from seeing a repetition across it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from phiquant.errors import RequestError
from phiquant.text.tokenizer import Tokenizer

__all__ = ["BREAKERS", "breakers"]

BREAKERS: Final = ("\n", ":", '"', "*")
"""The usual ones."""

MOST_CHARACTERS: Final = 40
MOST_TOKENS: Final = 20  # after the first


def breakers(tokenizer: Tokenizer, texts: Iterable[str] = BREAKERS) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(a token that holds a breaker's beginning, the tokens that complete it) for every way to write every breaker.

    A token that holds the whole breaker stands alone. RequestError for one that is empty or too long.
    """
    wanted = [text.encode() for text in texts]
    if not all(0 < len(text) <= MOST_CHARACTERS for text in wanted):
        raise RequestError(f"a sequence breaker has from 1 to {MOST_CHARACTERS} characters")
    found: dict[tuple[int, tuple[int, ...]], None] = {}
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        for text in wanted:
            if text in piece:
                found[token, ()] = None
                continue
            for size in range(1, min(len(text), len(piece) + 1)):
                if piece.endswith(text[:size]):
                    rest = text[size:].decode(errors="ignore")
                    found[token, tuple(tokenizer.encode_continuation(rest)[:MOST_TOKENS])] = None
    return tuple(found)
