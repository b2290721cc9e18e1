"""How byte-level vocabularies cut text into words: one regular expression for each family of tokenizers.

They are the expressions of the published tokenizers, for the engine that the `tokenizers` library uses. GGUF names them
by llama.cpp's pre-tokenizer ids, of which those that Phi models have are known here. llama.cpp itself approximates the
third: it takes every letter but a to z for a capital one, and every letter but A to Z for a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text into words.

    name: of the family, for people. pattern: what a word is; every character of any text belongs to one.
    """

    name: str
    pattern: str


_CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
_CAPITAL, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

GPT2 = PreTokenizer("GPT-2", _CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
CL100K = PreTokenizer(
    "cl100k",
    f"(?i:{_CONTRACTION})|{_LEAD}"
    r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
O200K = PreTokenizer(
    "o200k",
    f"{_LEAD}[{_CAPITAL}]*[{_SMALL}]+(?i:{_CONTRACTION})?|{_LEAD}[{_CAPITAL}]+[{_SMALL}]*(?i:{_CONTRACTION})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# llama.cpp's ids. "phi-2" and "gpt-2" cut alike; "dbrx" is what its converter finds for Phi-4.
BY_ID = {"phi-2": GPT2, "gpt-2": GPT2, "dbrx": CL100K, "gpt-4o": O200K}

_END_OF_TEXT = "<|endoftext|>"
_RUN_OF_SPACES = (50257, " " * 31)


# The same rules as other makers of tokenizer.json spell them: tiktoken's possessive quantifiers change nothing.
_CL100K_POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BY_PATTERN = {_CL100K_POSSESSIVE: CL100K, **{known.pattern: known for known in (GPT2, CL100K, O200K)}}


def by_pattern(pattern: str) -> PreTokenizer | None:
    """The known way of which this is the regular expression."""
    return _BY_PATTERN.get(pattern)


def id_of(known: PreTokenizer, tokens: Sequence[str]) -> str:
    """llama.cpp's id of a way to cut text, which for GPT-2's depends on the vocabulary."""
    if known is GPT2:
        return "phi-2" if recognize(tokens) == "phi-2" else "gpt-2"
    return next(key for key, value in BY_ID.items() if value is known)


def recognize(tokens: Sequence[str]) -> str | None:
    """The pre-tokenizer id of a known vocabulary, by where its end of text is; None for any other vocabulary.

    For what does not say: files from before llama.cpp had the ids, checkpoints with vocab.json and merges.txt alone.
    """

    def has(index: int, text: str) -> bool:
        return len(tokens) > index and tokens[index] == text

    if has(50256, _END_OF_TEXT):
        return "phi-2" if has(*_RUN_OF_SPACES) else "gpt-2"
    if has(100257, _END_OF_TEXT):
        return "dbrx"
    return "gpt-4o" if has(199999, _END_OF_TEXT) else None
