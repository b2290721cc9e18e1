"""Grammars by llama-cpp-python's names, over `text.grammar`."""

import os
from pathlib import Path

from phiquant.compat.llama_cpp.refusals import ArgumentError
from phiquant.text.grammar import Grammar

__all__ = ["LlamaGrammar"]


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
        """JSON that fits a schema, which is given as text. GrammarError if it is no JSON."""
        return cls(Grammar.json_schema(json_schema))
