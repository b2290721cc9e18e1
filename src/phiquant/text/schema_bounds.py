"""What a JSON schema may hold: texts that must come as they are cost every token, and depth costs the reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from phiquant.errors import GrammarError

__all__ = ["DEEPEST", "LONGEST_TEXT", "check_schema"]

LONGEST_TEXT: Final = 8192
"""Characters of a text that is part of a grammar; some microseconds each, for every token that comes."""
DEEPEST: Final = 200

_SAID: Final = frozenset({"description", "title", "$comment", "default", "examples", "example"})


def check_schema(schema: Any, depth: int = 0) -> None:
    """GrammarError for a schema with a text that is too long, or nested too deeply; what only describes may be long."""
    if depth > DEEPEST:
        raise GrammarError("the JSON schema is nested too deeply")
    if isinstance(schema, str):
        if len(schema) > LONGEST_TEXT:
            raise GrammarError(
                f"the JSON schema cannot be used: a text of it has {len(schema):,} characters; {LONGEST_TEXT:,} are "
                "the most"
            )
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            check_schema(key, depth + 1)
            if not (key in _SAID and isinstance(value, str)):
                check_schema(value, depth + 1)
    elif isinstance(schema, list | tuple):
        for value in schema:
            check_schema(value, depth + 1)
