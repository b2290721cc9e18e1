"""Sequence breakers as tokens: where a text, such as a line's end, keeps DRY from seeing a repetition across it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final

from phiquant.errors import RequestError
from phiquant.text.tokenizer import Tokenizer, refuse_surrogates

__all__ = ["BREAKERS", "breakers"]

BREAKERS: Final = ("\n", ":", '"', "*")
"""The usual ones."""

MOST_CHARACTERS: Final = 40
MOST_TOKENS: Final = 20  # after the first


def breakers(tokenizer: Tokenizer, texts: Iterable[str] = BREAKERS) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(a token that holds a breaker's beginning, the tokens that complete it) for every way to write every breaker.

    A token that holds the whole breaker stands alone. RequestError for one that is empty, too long or no Unicode.
    """
    wanted = [_checked(text).encode() for text in texts]
    begun: dict[bytes, list[bytes]] = {}  # by each proper beginning of a breaker
    for text in wanted:
        for size in range(1, len(text)):
            begun.setdefault(text[:size], []).append(text)
    longest = max(map(len, begun), default=0)
    completes = cache(lambda rest: tuple(tokenizer.encode_continuation(rest.decode(errors="ignore"))[:MOST_TOKENS]))
    found: dict[tuple[int, tuple[int, ...]], None] = {}
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        if any(text in piece for text in wanted):
            found[token, ()] = None
        for size in range(1, min(longest, len(piece)) + 1):
            for text in begun.get(piece[-size:], ()):
                if text not in piece:
                    found[token, completes(text[size:])] = None
    return tuple(found)


def _checked(text: str) -> str:
    if not 0 < len(text) <= MOST_CHARACTERS:
        raise RequestError(
            f"a sequence breaker has from 1 to {MOST_CHARACTERS} characters; {text!r:.60} has {len(text)}"
        )
    refuse_surrogates(text)
    return text
