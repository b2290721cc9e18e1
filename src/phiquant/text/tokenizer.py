"""Text to token ids and back, for the SentencePiece vocabularies of Phi-3 and the byte-level ones of all other Phis.

The truth is the published tokenizer.json run by the `tokenizers` library:

1. Added tokens are found in the text (`added.py`), with the whitespace they strip.
2. The fragments between them are spelled as the vocabulary does. For SentencePiece every fragment gets one space in
   front (unless the file's `add_space_prefix` is false), and spaces become U+2581; a byte-level vocabulary changes
   nothing.
3. Words are merged into pieces (`words.py`); what has no piece becomes bytes (`pieces.py`), or everything is bytes to
   begin with (`bytelevel.py`).

Decoding is the inverse; of SentencePiece the one space that step 2 put in front of the first fragment is dropped. So
`decode(encode(text, special=False)) == text` for every text, leading spaces included, with one exception that no
SentencePiece tokenizer can avoid: U+2581 itself reads back as a space. Nothing is tidied: the spaces before punctuation
that transformers can be told to drop (`clean_up_tokenization_spaces`) are part of the text.
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
    added_tokens_from_json,
    default_added_tokens,
    spans,
)
from phiquant.text.detokenizer import Detokenizer
from phiquant.text.pieces import PieceEncoder
from phiquant.text.template import ChatTemplate
from phiquant.text.vocabulary import SENTENCEPIECE, TokenType, Vocabulary
from phiquant.text.words import WordEncoder

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
        self._assumed = added_tokens is None
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
    def notes(self) -> tuple[str, ...]:
        """What the file does not say and was assumed, and what was repaired in its template; one sentence each."""
        from phiquant.text import published

        notes = list(self.vocabulary.notes)
        known = published.recognize(self.vocabulary.tokens) if self._assumed else None
        if known is not None:
            notes.append(f"the file lacks the attributes of added tokens; those published for {known.name} are assumed")
        if self.chat_template is not None:
            notes += self.chat_template.notes
        return tuple(notes)

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

    @cached_property
    def marks(self) -> tuple[AddedToken, ...]:
        """Added tokens that mean something, so that only a template may write them: all but those that are text."""
        return tuple(token for token in self.added_tokens if not token.is_text or token.id in self.eog_ids)

    def encode(self, text: str, *, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`.

        special: added tokens in the text become their ids; False encodes those that are marks as ordinary characters
        (see `AddedToken.is_text`), and then no id of a control token or of a mark comes out, whatever the text.
        add_bos: put `bos_id` in front; None does as the file says. The file's `add_eos_token` is not followed: a prompt
        that is to be continued must not end.
        Raises RequestError for text with lone surrogates, TokenizerError for a vocabulary that cannot express the text.
        """
        ids = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None else []
        raw, normalized = self._matchers if special else self._text_matchers
        return ids + self._encode(text, raw.matches(text), normalized)

    def encode_marked(self, text: str, matches: Iterable[tuple[int, int, AddedToken]]) -> list[int]:
        """Ids of `text` in which, of all marks, exactly `matches` (start, end, token; ascending) are tokens; no bos."""
        return self._encode(text, matches, self._text_matchers[1])

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` right after other text, without added tokens: nothing is put in front of it."""
        refuse_surrogates(text)
        prefix = len(self._encoder.normalize(""))
        return self._encoder.encode(self._encoder.normalize(text)[prefix:])

    def special_spans(self, text: str) -> list[tuple[int, int, AddedToken]]:
        """Where added tokens lie in the raw text: start, end and token, before whitespace is stripped."""
        raw, normalized = self._matchers
        found = list(raw.matches(text))
        if self._encoder.normalize(" ") == " ":  # then the normalized text is the raw one, and positions hold
            for span in spans(text, found):
                if span.token is None:
                    inner = normalized.matches(text[span.start : span.end])
                    found += [(span.start + start, span.start + end, token) for start, end, token in inner]
        return sorted(found, key=lambda match: match[0])

    def _encode(self, text: str, matches: Iterable[tuple[int, int, AddedToken]], normalized: Matcher) -> list[int]:
        refuse_surrogates(text)
        ids: list[int] = []
        for span in spans(text, matches):
            if span.token is not None:
                ids.append(span.token.id)
                continue
            fragment = self._encoder.normalize(text[span.start : span.end])
            for part in normalized.split(fragment):
                if part.token is not None:
                    ids.append(part.token.id)
                else:
                    ids += self._encoder.encode(fragment[part.start : part.end])
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
        """What a token adds to decoded text: nothing for special, unknown and unused ones. Raises TokenError."""
        return b"" if self._checked(token) in self._silent else self._token_text(token)

    def _token_text(self, token: int) -> bytes:
        type_ = self.vocabulary.types[self._checked(token)]
        if type_ == TokenType.UNUSED:
            return b""
        if type_ in (TokenType.NORMAL, TokenType.BYTE):
            return self._encoder.token_bytes(token)
        return self.vocabulary.tokens[token].encode()

    def _checked(self, token: int) -> int:
        if not 0 <= token < len(self.vocabulary):
            raise TokenError(f"token id {token} lies outside the vocabulary of {len(self.vocabulary)} tokens")
        return token

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Ids that decoded text leaves out. What is said of an added token counts more than its type."""
        silent = set(self.vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
        silent -= {token.id for token in self.added_tokens if not token.special}
        return frozenset(silent | {token.id for token in self.added_tokens if token.special})

    @cached_property
    def _encoder(self) -> WordEncoder:
        if self.vocabulary.model == SENTENCEPIECE:
            return PieceEncoder(self.vocabulary)
        from phiquant.text.bytelevel import ByteLevelEncoder  # half of the vocabularies never need it

        return ByteLevelEncoder(self.vocabulary)

    @cached_property
    def _matchers(self) -> tuple[Matcher, Matcher]:
        """Of all added tokens: those looked for in the raw text, and those in normalized fragments."""
        return self._matchers_of(self.added_tokens)

    @cached_property
    def _text_matchers(self) -> tuple[Matcher, Matcher]:
        """The same of tokens that are text."""
        return self._matchers_of([token for token in self.added_tokens if token not in self.marks])

    def _matchers_of(self, tokens: Iterable[AddedToken]) -> tuple[Matcher, Matcher]:
        tokens = list(tokens)
        # `tokenizers` normalizes the texts of such tokens as well, prefix included.
        normalized = {self._encoder.normalize(token.content): token for token in tokens if token.normalized}
        return Matcher({token.content: token for token in tokens if not token.normalized}), Matcher(normalized)


def refuse_surrogates(text: str) -> None:
    """RequestError for a text that UTF-8 cannot express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"the text is not valid Unicode: character {error.start} is U+{code:04X}, half a pair"
        ) from error
