"""Text to token ids and back, for the SentencePiece vocabularies of Phi-3 and Phi-3.5.

The truth is the published tokenizer.json run by the `tokenizers` library:

1. Added tokens are found in the text (`added.py`), with the whitespace they strip.
2. Every fragment between them gets one space in front (unless the file's `add_space_prefix` is false), and spaces
   become U+2581.
3. The fragment is merged into pieces (`bpe.py`); what has no piece becomes bytes.

Decoding is the inverse: U+2581 is a space, byte tokens are bytes, and the one space that step 2 put in front of the
first fragment is dropped. So `decode(encode(text, special=False)) == text` for every text, leading spaces included,
with one exception that no tokenizer of this kind can avoid: U+2581 itself reads back as a space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phiquant.errors import RequestError, TokenError, TokenizerError
from phiquant.gguf import keys
from phiquant.text.added import (
    ADDED_TOKENS_KEY,
    AddedToken,
    Matcher,
    Span,
    added_tokens_from_json,
    default_added_tokens,
    spans,
)
from phiquant.text.bpe import SPACE, PieceEncoder
from phiquant.text.detokenizer import Detokenizer
from phiquant.text.template import ChatTemplate
from phiquant.text.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from phiquant.gguf import GGUFFile


class Tokenizer:
    """A vocabulary with its added tokens. Immutable but for caches; safe to share between threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        added_tokens: Iterable[AddedToken] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`added_tokens` None: the defaults of `added.default_added_tokens`."""
        self.chat_template = chat_template
        self.vocabulary = vocabulary
        self.added_tokens = tuple(default_added_tokens(vocabulary) if added_tokens is None else added_tokens)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """The tokenizer of an open GGUF file; TokenizerError or UnsupportedError when it has none that works."""
        return cls.from_metadata(gguf.metadata)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The same from plain keys and values."""
        vocabulary = Vocabulary.from_metadata(metadata)
        added = metadata.get(ADDED_TOKENS_KEY)
        source = metadata.get(keys.CHAT_TEMPLATE)
        if source is not None and not isinstance(source, str):
            raise TokenizerError(f"{keys.CHAT_TEMPLATE} must be a string, not {type(source).__name__}")
        texts = [vocabulary.tokens[i] if i is not None else "" for i in (vocabulary.bos_id, vocabulary.eos_id)]
        return cls(
            vocabulary,
            None if added is None else added_tokens_from_json(added, vocabulary),
            None if source is None else ChatTemplate(source, bos_token=texts[0], eos_token=texts[1]),
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, padding included."""
        return len(self.vocabulary)

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, None when the file has none."""
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, None when the file has none."""
        return self.vocabulary.eos_id

    @property
    def add_bos(self) -> bool:
        """Whether the file asks for `bos_id` in front of every prompt."""
        return self.vocabulary.add_bos

    @property
    def eog_ids(self) -> frozenset[int]:
        """Ids after which generation ends: end of text, of turn, of message."""
        return self.vocabulary.end_ids

    @cached_property
    def unused_ids(self) -> npt.NDArray[np.int64]:
        """Ids without a text of their own, which must never be sampled; int64 [count], ascending."""
        return np.array(self.vocabulary.padding(), dtype=np.int64)

    def encode(self, text: str, *, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`.

        special: added tokens in the text become their ids; False encodes them as ordinary characters, and then no id of
        a control or user-defined token can come out, whatever the text.
        add_bos: put `bos_id` in front; None does as the file says. The file's `add_eos_token` is not followed: a prompt
        that is to be continued must not end.
        Raises RequestError for text with lone surrogates, TokenizerError for a vocabulary that cannot express the text.
        """
        ids = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        return ids + self._encode(text, self._raw_matcher.matches(text) if special else (), special=special)

    def encode_marked(self, text: str, matches: Iterable[tuple[int, int, AddedToken]]) -> list[int]:
        """Ids of `text` in which exactly `matches` (start, end, token; ascending) are added tokens; no bos."""
        return self._encode(text, matches, special=False)

    def special_spans(self, text: str) -> list[tuple[int, int, AddedToken]]:
        """Where added tokens lie in the raw text: start, end and token, before whitespace is stripped."""
        return list(self._raw_matcher.matches(text))

    def _encode(self, text: str, matches: Iterable[tuple[int, int, AddedToken]], *, special: bool) -> list[int]:
        _refuse_surrogates(text)
        ids: list[int] = []
        for span in spans(text, matches):
            if span.token is not None:
                ids.append(span.token.id)
                continue
            fragment = text[span.start : span.end]
            if self.vocabulary.add_space_prefix:
                fragment = SPACE + fragment
            fragment = fragment.replace(" ", SPACE)
            for part in self._normalized_matcher.split(fragment) if special else [Span(0, len(fragment), None)]:
                if part.token is not None:
                    ids.append(part.token.id)
                else:
                    ids += self._pieces.encode(fragment[part.start : part.end])
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, without control tokens unless `skip_special` is False; one leading space is dropped.

        Equal to what `tokenizers` gives, but for bytes that are not UTF-8: here one U+FFFD stands for each maximal part
        of a character, there each byte of the whole run of byte tokens becomes one, valid characters in it included.
        Raises TokenError for an id outside the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self, *, continuation: bool = False, skip_special: bool = True) -> Detokenizer:
        """An incremental decoder.

        continuation: the ids continue a text, so that the space of a first token " there" is kept. See `continues`.
        """
        strip = self.vocabulary.add_space_prefix and not continuation
        return Detokenizer(self.token_bytes if skip_special else self._token_text, strip=strip)

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether what is generated after `ids` continues a text; after a control token or nothing it begins one."""
        return len(ids) > 0 and bool(self.token_bytes(ids[-1]))

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to decoded text: nothing for control, unknown and unused ones. Raises TokenError."""
        if self.vocabulary.types[self._checked(token)] in (TokenType.CONTROL, TokenType.UNKNOWN):
            return b""
        return self._token_text(token)

    def _token_text(self, token: int) -> bytes:
        type_ = self.vocabulary.types[self._checked(token)]
        text = self.vocabulary.tokens[token]
        if type_ == TokenType.UNUSED:
            return b""
        if type_ == TokenType.BYTE:
            return self._byte_values.get(token, b"")
        return text.replace(SPACE, " ").encode()

    def _checked(self, token: int) -> int:
        if not 0 <= token < len(self.vocabulary):
            raise TokenError(f"token id {token} lies outside the vocabulary of {len(self.vocabulary)} tokens")
        return token

    @cached_property
    def _byte_values(self) -> dict[int, bytes]:
        values = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        tokens = self.vocabulary.tokens
        return {i: values[tokens[i]] for i in self.vocabulary.of_type(TokenType.BYTE) if tokens[i] in values}

    @cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self.vocabulary)

    @cached_property
    def _raw_matcher(self) -> Matcher:
        return Matcher({token.content: token for token in self.added_tokens if not token.normalized})

    @cached_property
    def _normalized_matcher(self) -> Matcher:
        # `tokenizers` normalizes the texts of such tokens as well, prefix included.
        prefix = SPACE if self.vocabulary.add_space_prefix else ""
        normalized = (token for token in self.added_tokens if token.normalized)
        return Matcher({prefix + token.content.replace(" ", SPACE): token for token in normalized})


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"the text is not valid Unicode: character {error.start} is U+{code:04X}, half a pair"
        ) from error
