"""Text from a stream of token ids, a whole number of characters at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Turns ids into text as they come; the pieces together are exactly what `Tokenizer.decode` gives for all of them.

    A character whose bytes come in several tokens is held back until it is complete. Bytes that are not UTF-8 become
    U+FFFD, one for each maximal part of a character (the rule of Unicode and of Python's "replace").

    token_bytes: gives the bytes of an id.
    strip: drop one space at the very beginning of the text (see `Tokenizer.decode`).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip: bool) -> None:
        self._token_bytes = token_bytes
        self._strip = strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete once this id is known; may be empty. Raises TokenError for an unknown id."""
        return self._text(self._token_bytes(token), final=False)

    def finish(self) -> str:
        """What was held back: U+FFFD for the beginning of a character that never ended, else nothing."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, *, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
