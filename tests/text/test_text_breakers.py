"""Breakers as tokens."""

import pytest

from phiquant.errors import RequestError
from phiquant.text import Tokenizer
from phiquant.text.breakers import BREAKERS, breakers


def test_every_token_that_holds_a_breaker_is_one(tokenizer: Tokenizer) -> None:
    heads = {head for head, tail in breakers(tokenizer) if not tail}
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        assert (token in heads) == any(text.encode() in piece for text in BREAKERS)
    assert all(not tail for _, tail in breakers(tokenizer))  # of one character each


def test_a_longer_breaker_may_begin_within_a_token(tokenizer: Tokenizer) -> None:
    found = breakers(tokenizer, ["\n\nQ"])
    texts = {tokenizer.token_bytes(head) + b"".join(map(tokenizer.token_bytes, tail)) for head, tail in found}
    assert all(b"\n\nQ" in text for text in texts)
    newline = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\n")
    assert any(head == newline and tail for head, tail in found)


def test_what_is_found_is_what_every_token_and_every_breaker_give(tokenizer: Tokenizer) -> None:
    texts = ["\n\n", "\n\n\nQ", ".\n", "the end", "日本", "e"]
    expected: set[tuple[int, tuple[int, ...]]] = set()
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        for text in map(str.encode, texts):
            if text in piece:
                expected.add((token, ()))
                continue
            for size in range(1, len(text)):
                if piece.endswith(text[:size]):
                    rest = text[size:].decode(errors="ignore")
                    expected.add((token, tuple(tokenizer.encode_continuation(rest))))
    found = breakers(tokenizer, texts)
    assert len(found) == len(expected) > 1000
    assert set(found) == expected
    assert breakers(tokenizer, []) == ()


@pytest.mark.parametrize("text", ["", "x" * 41])
def test_a_breaker_has_a_sensible_length(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match=f"from 1 to 40 characters; '{text}' has {len(text)}"):
        breakers(tokenizer, [text])
    assert breakers(tokenizer, ["日" * 40])  # characters, not bytes


def test_a_breaker_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"character 0 is U\+D800"):
        breakers(tokenizer, ["\ud800"])
