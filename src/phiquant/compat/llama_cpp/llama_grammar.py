"""Grammars by llama-cpp-python's names, over `text.grammar`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phiquant.compat.llama_cpp.refusals import ArgumentError
from phiquant.text.grammar import Grammar

__all__ = ["LlamaGrammar", "json_grammar"]

# Parts of a schema that are schemas by name, and parts that may list properties beside `properties`.
_NAMED: Final = ("properties", "$defs", "definitions")
_COMBINING: Final = ("allOf", "anyOf", "oneOf", "$ref", "if", "patternProperties")


class LlamaGrammar:
    """What output must look like.

    Attributes:
        grammar: the same for the engine. It is compiled when it is used, and GrammarError says then what is wrong.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> "LlamaGrammar":
        """A grammar in llama.cpp's notation, GBNF; `verbose` changes nothing."""
        return cls(Grammar("gbnf", grammar))

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> "LlamaGrammar":
        """The same from a file. Raises ArgumentError (a ValueError) for one that cannot be read, or is empty."""
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"the grammar file {file} cannot be read: {error}") from error
        if not text.strip():
            raise ArgumentError(f"the grammar file {file} is empty")
        return cls.from_string(text, verbose)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> "LlamaGrammar":
        """JSON that fits a schema, which is given as text; see `json_grammar`. GrammarError if it is no JSON."""
        return cls(json_grammar(json_schema))


def json_grammar(schema: Mapping[str, Any] | bool | str) -> Grammar:
    """JSON that fits a schema as llama-cpp-python reads it.

    An object has the properties that are listed and no others, unless the schema says otherwise, and no more than one
    blank stands between the parts.
    """
    read = json.loads(Grammar.json_schema(schema).text)
    if isinstance(read, dict):
        read = {**_closed(read), "x-guidance": {"whitespace_pattern": " ?"}}
    return Grammar.json_schema(read)


def _closed(schema: Any) -> Any:
    """The schema without further properties, where no other part of it may be the one that lists them."""
    if not isinstance(schema, dict) or any(name in schema for name in _COMBINING):
        return schema
    closed = {
        name: {key: _closed(part) for key, part in value.items()}
        if name in _NAMED and isinstance(value, dict)
        else _closed(value)
        if name == "items"
        else value
        for name, value in schema.items()
    }
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
