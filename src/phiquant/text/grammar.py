"""Constrained output: a grammar, compiled for a vocabulary by `llguidance`, becomes the mask of a sequence.

The engine knows masks only (`engine.TokenMask`). A grammar is one of

    json_schema   a JSON schema, or "{}" for any JSON value
    regex         a regular expression that the whole output matches
    lark          a Lark grammar (llguidance's dialect)
    gbnf          a grammar in llama.cpp's notation

Bytes that are no valid UTF-8 never come out: the grammar is over characters, and a token that ends within one is
followed by the rest of it. An end token is allowed where the grammar may end, and nothing else once it has.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import GrammarError
from phiquant.text.gbnf import lark_of
from phiquant.text.schema_bounds import check_schema
from phiquant.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["JSON_BLANK", "Constraint", "Constraints", "Grammar"]

Kind = Literal["json_schema", "regex", "lark", "gbnf"]

# What may stand between the parts of JSON. Without a bound a model that likes blanks never comes to an end.
JSON_BLANK: Final = r"( |\n{1,2}[ \t]{0,20})?"

# Characters of a grammar. What is long takes long: some ten microseconds a character, and a hundred bytes of memory.
MOST_TEXT: Final[Mapping[Kind, int]] = {"json_schema": 1 << 18, "regex": 1 << 16, "lark": 1 << 18, "gbnf": 1 << 16}


@dataclass(frozen=True)
class Grammar:
    """What output must look like; not yet looked at."""

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        most = MOST_TEXT[self.kind]
        if len(self.text) > most:
            raise GrammarError(f"the {_NAMES[self.kind]} has {len(self.text):,} characters; {most:,} are the most")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """A JSON value that fits a schema, given as an object or as text. GrammarError if it is no JSON."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise GrammarError(f"the JSON schema is not valid JSON: {error}") from error
        if not isinstance(schema, Mapping | bool):
            raise GrammarError(f"a JSON schema is an object, not {type(schema).__name__}")
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema cannot be written as JSON: {error}") from error

    @classmethod
    def json(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')


class Constraints:
    """Compiles grammars for one tokenizer; safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """A mask for one sequence that begins now.

        Raises:
            GrammarError: it is malformed, cannot be expressed, or is too complex.
        """
        from llguidance import LLMatcher

        with self._lock:
            library = self._library
        matcher = LLMatcher(library, _compiled(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"the {_NAMES[grammar.kind]} cannot be used: {_sentence(matcher.get_error())}")
        return Constraint(matcher, self._tokenizer.vocab_size, self._tokenizer.eog_ids)

    @cached_property
    def _library(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)), eos_token=sorted(self._tokenizer.eog_ids))


class Constraint:
    """What may come next in one sequence, and what has come."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: frozenset[int]) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._ends = np.array(sorted(ends), np.int64)
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next, bool [vocabulary]. GrammarError if the grammar turns out too complex."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            mask = np.zeros(self._vocabulary, bool)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self._check()
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
            mask = bits[: self._vocabulary].astype(bool)
        # The library knows the end tokens, but says of the first only whether it may come.
        mask[self._ends] = self._matcher.is_accepting()
        return mask

    def accept(self, token: int) -> None:
        """This one came. GrammarError if the grammar turns out too complex."""
        if self._matcher.is_stopped() or token in self._ends:
            return
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {_sentence(self._matcher.get_error())}")


class _Vocabulary:
    """A tokenizer as llguidance wants to see it: the bytes of every token, empty for those that have no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eog_ids, default=0)
        texts = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # A token without bytes would match anywhere; as a special one it never does.
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        self.tokens = [text or b"\xff<%d>" % i for i, text in enumerate(texts)]

    def __call__(self, text: str) -> list[int]:
        """Ids of a text, for the tokens that a grammar forces."""
        return self._tokenizer.encode_continuation(text)


_NAMES: Final[Mapping[Kind, str]] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "Lark grammar",
    "gbnf": "grammar",
}


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    try:
        if grammar.kind == "json_schema":
            check_schema(json.loads(grammar.text))
            return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": JSON_BLANK})
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        return LLMatcher.grammar_from_lark(lark_of(grammar.text))
    except GrammarError:
        raise
    except Exception as error:  # the library's reader of GBNF raises what it likes
        raise GrammarError(f"the {_NAMES[grammar.kind]} cannot be used: {_sentence(str(error))}") from error


def _limits() -> LLParserLimits:
    """What one grammar may cost: about a second to compile, 25 ms for a token, some tens of megabytes."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=10_000_000,
        step_lexer_fuel=400_000,
        step_max_items=100_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _sentence(message: str) -> str:
    """The first line of what the library says, not too long."""
    lines = message.strip().splitlines()
    return lines[0][:200] if lines else "no reason given"
