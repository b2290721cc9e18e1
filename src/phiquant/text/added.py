"""Added tokens: texts that become one id before the rest of a text is encoded, and how much whitespace they swallow.

GGUF's own keys carry no strip attributes, so phiquant writes them beside: `phiquant.tokenizer.added_tokens` is a JSON
list of objects with the fields of `AddedToken`. The matching rules are those of the `tokenizers` library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from phiquant.errors import TokenizerError
from phiquant.gguf import keys
from phiquant.text.vocabulary import TokenType, Vocabulary

ADDED_TOKENS_KEY = keys.ADDED_TOKENS

# Unicode White_Space, which is what \s means in `tokenizers`; Python's \s also has U+001C to U+001F.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

_MARKUP = frozenset("<>[]{}|")


@dataclass(frozen=True)
class AddedToken:
    """One added token with the attributes of Hugging Face's `AddedToken`.

    lstrip, rstrip: whitespace on that side of a match belongs to the match and vanishes.
    normalized: matched in the normalized text (spaces as U+2581, prefix added), not in the raw one.
    single_word: matches only between characters that are not part of a word.
    special: left out of decoded text.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = False

    @property
    def is_text(self) -> bool:
        """Whether the token is only a word of its own, such as Phi-2's runs of spaces, and no mark with a meaning.

        Anybody may write it: it is matched in what a user typed, too.
        """
        return not self.special and _MARKUP.isdisjoint(self.content)


_FLAGS = tuple(field.name for field in fields(AddedToken) if field.name not in ("id", "content"))


def added_tokens_to_json(tokens: Iterable[AddedToken]) -> str:
    """The value of `phiquant.tokenizer.added_tokens`: compact JSON, ordered by id."""
    return json.dumps(
        [asdict(token) for token in sorted(tokens, key=lambda t: t.id)], ensure_ascii=False, separators=(",", ":")
    )


def added_tokens_from_json(text: object, vocabulary: Vocabulary) -> list[AddedToken]:
    """Read the value of `phiquant.tokenizer.added_tokens`; TokenizerError where it contradicts the vocabulary."""
    if not isinstance(text, str):
        raise TokenizerError(f"{ADDED_TOKENS_KEY} must be a string of JSON, not {type(text).__name__}")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{ADDED_TOKENS_KEY} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise TokenizerError(f"{ADDED_TOKENS_KEY} must be a JSON list of objects")
    tokens = [_entry(entry, f"{ADDED_TOKENS_KEY}[{at}]") for at, entry in enumerate(entries)]
    for token in tokens:
        if token.id >= len(vocabulary) or vocabulary.tokens[token.id] != token.content:
            raise TokenizerError(
                f"{ADDED_TOKENS_KEY} names token {token.id} {token.content!r}; tokenizer.ggml.tokens disagrees"
            )
    return tokens


def added_tokens_from_hf(
    tokenizer_config: Mapping[str, Any], tokenizer_json: Mapping[str, Any] | None
) -> list[AddedToken]:
    """The added tokens of a Hugging Face checkpoint, ordered by id.

    `added_tokens_decoder` of tokenizer_config.json comes first, `added_tokens` of tokenizer.json second; the second
    wins where both name an id, since `tokenizers` runs tokenizer.json. Raises TokenizerError for malformed entries.
    """
    found: dict[int, AddedToken] = {}
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder must be an object of id to token")
    for key, entry in decoder.items():
        if not isinstance(entry, Mapping) or not str(key).isdecimal():
            raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder[{key!r}] must be an id with an object")
        token = _entry({**entry, "id": int(key)}, f"tokenizer_config.json: added_tokens_decoder[{key!r}]")
        found[token.id] = token
    listed = (tokenizer_json or {}).get("added_tokens") or []
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise TokenizerError("tokenizer.json: added_tokens must be a list")
    for at, entry in enumerate(listed):
        token = _entry(entry, f"tokenizer.json: added_tokens[{at}]")
        found[token.id] = token
    return [found[key] for key in sorted(found)]


def default_added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    """What to assume of a file without our key: the published attributes for a published vocabulary, else all false.

    Which is which is told by the tokens (`published.py`), whatever `general.name` says.
    """
    from phiquant.text import published

    known = published.recognize(vocabulary.tokens)
    padding = set(vocabulary.padding())
    found = []
    for token in vocabulary.of_type(TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
        if token in padding:
            continue
        text = vocabulary.tokens[token]
        special = vocabulary.types[token] != TokenType.USER_DEFINED
        if known is None:
            found.append(AddedToken(token, text, special=special))
            continue
        found.append(
            AddedToken(
                token,
                text,
                lstrip=token in known.lstrip,
                rstrip=token in known.rstrip,
                normalized=known.normalized(text),
                special=special and token not in known.visible,
            )
        )
    return found


def _entry(entry: object, where: str) -> AddedToken:
    if not isinstance(entry, Mapping):
        raise TokenizerError(f"{where} must be an object")
    token, content = entry.get("id"), entry.get("content")
    if type(token) is not int or token < 0 or not isinstance(content, str) or not content:
        raise TokenizerError(f"{where} needs an id (an integer from 0) and a content (a non-empty string)")
    flags = {name: entry.get(name, False) for name in _FLAGS}
    for name, value in flags.items():
        if type(value) is not bool:
            raise TokenizerError(f"{where}: {name} must be true or false")
    return AddedToken(token, content, **flags)


@dataclass(frozen=True)
class Span:
    """A part of a text: characters start to end, and the added token they are, or None for ordinary text."""

    start: int
    end: int
    token: AddedToken | None


class Matcher:
    """Finds added tokens in a text: leftmost first, longest among those that begin at one place."""

    def __init__(self, patterns: Mapping[str, AddedToken]) -> None:
        self._patterns = dict(patterns)
        ordered = sorted(self._patterns, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, ordered))).finditer if ordered else None

    def matches(self, text: str) -> Iterator[tuple[int, int, AddedToken]]:
        """Start, end and token of every match, before whitespace is stripped."""
        if self._find is None:
            return
        for match in self._find(text):
            token = self._patterns[match.group()]
            if token.single_word and (_in_word(text, match.start() - 1) or _in_word(text, match.end())):
                continue
            yield match.start(), match.end(), token

    def split(self, text: str) -> list[Span]:
        """The whole of `text` as spans, added tokens with the whitespace they strip; empty fragments are left out."""
        return spans(text, self.matches(text))


def spans(text: str, matches: Iterable[tuple[int, int, AddedToken]]) -> list[Span]:
    """Extend matches over the whitespace that their tokens strip and fill the gaps with fragments."""
    found: list[Span] = []
    done = 0
    for start, end, token in matches:
        if token.lstrip:
            start = max(len(text[:start].rstrip(WHITESPACE)), done)
        if token.rstrip:
            end = len(text) - len(text[end:].lstrip(WHITESPACE))
        if done < start:
            found.append(Span(done, start, None))
        found.append(Span(start, end, token))
        done = end
    if done < len(text):
        found.append(Span(done, len(text), None))
    return found


def _in_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and re.match(r"\w", text[at]) is not None
