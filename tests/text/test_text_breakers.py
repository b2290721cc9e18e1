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


@pytest.mark.parametrize("text", ["", "x" * 41])
def test_a_breaker_has_a_sensible_length(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="from 1 to 40"):
        breakers(tokenizer, [text])
