"""Grammars in llama.cpp's notation as Lark, by llguidance's reader, within bounds.

The reader makes a terminal of every rule that refers to no rule but such ones, and a terminal is written out in full
wherever another refers to it: rules that double each other (a ::= b b, b ::= c c, ...) would take time and memory that
grow with 2 to the power of their number. So the size that terminals have written out is counted first. A text that must
come as it is costs every token some microseconds for each of its characters, so it is not to be too long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from phiquant.errors import GrammarError
from phiquant.text.schema_bounds import LONGEST_TEXT

__all__ = ["lark_of"]

MOST_RULES: Final = 1000
"""The reader looks at all of them as often as there are terminals."""
MOST_PARTS: Final = 100_000
"""Characters and classes of all terminals, written out; some microseconds each."""

_RULE: Final = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*): ", re.MULTILINE)
_PART: Final = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)*/|\b[A-Z_][A-Z0-9_]*\b', re.DOTALL)


def lark_of(text: str) -> str:
    """The same grammar as Lark. GrammarError if it is too large; what the reader raises if it is none."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    rules = text.count("::=")
    if rules > MOST_RULES:
        raise GrammarError(f"the grammar cannot be used: it has {rules:,} rules, and {MOST_RULES:,} are the most")
    lark = gbnf_to_lark(text)
    literal = max((len(part) - 2 for part in _PART.findall(lark)), default=0)
    sizes = _written_out(_terminals(lark))
    if max(literal, *sizes) > LONGEST_TEXT:
        raise GrammarError(f"the grammar cannot be used: a text of it has more than {LONGEST_TEXT:,} characters")
    if sum(sizes) > MOST_PARTS:
        raise GrammarError(f"the grammar cannot be used: its rules, written out, have more than {MOST_PARTS:,} parts")
    return lark


def _terminals(lark: str) -> dict[str, list[str]]:
    """What each terminal refers to, and the literals and classes of it as they are."""
    found = {}
    begins = list(_RULE.finditer(lark))
    for at, rule in enumerate(begins):
        if rule[1].isupper():
            end = begins[at + 1].start() if at + 1 < len(begins) else len(lark)
            found[rule[1]] = _PART.findall(lark, rule.end(), end)
    return found


def _written_out(terminals: Mapping[str, list[str]]) -> list[int]:
    """The size of each terminal, all of `MOST_PARTS` at most; no terminal holds itself."""
    sizes: dict[str, int] = {}
    waiting = list(terminals)
    while waiting:
        name = waiting[-1]
        unknown = {part for part in terminals[name] if part in terminals and part not in sizes}
        if unknown and name not in sizes:
            waiting += unknown
            continue
        sizes[name] = min(sum(sizes.get(part, _size(part)) for part in terminals[name]) + 1, MOST_PARTS)
        waiting.pop()
    return [0, *sizes.values()]


def _size(part: str) -> int:
    return len(part) - 2 if part.startswith('"') else 1
