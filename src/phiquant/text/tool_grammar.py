"""Grammars of calls of tools, in llguidance's dialect of Lark.

    calls_only       nothing but calls, or a JSON answer instead of them
    words_or_calls   words as they come, or calls; once a call has begun, its arguments are held to their schema

The second is for tools that are strict where the model may as well answer in words. It lets no text pass that
`ToolReader` would take for a call of a tool, but by the rules for calls: what begins a call is a lexeme that ends as
soon as it matches ("lazy"), and words are a lexeme that holds none of these beginnings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from phiquant.errors import RequestError
from phiquant.text.grammar import JSON_BLANK, Grammar
from phiquant.text.schema_bounds import check_schema
from phiquant.text.tool_reader import MARKED, TAGGED

__all__ = ["Form", "calls_only", "words_or_calls"]

Form = Literal["marked", "tagged", "plain"]
Function = tuple[str, Mapping[str, Any]]
"""A tool's name and the JSON schema of its arguments."""

# Written as models see JSON most often, and with no more space than that: fewer tokens, and none to waver at.
_TIGHT: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_B: Final = r"[ \t\r\n]*"
_FENCE: Final = rf"{_B}(```(json)?{_B})?"


def calls_only(functions: Sequence[Function], form: Form, parallel: bool, answer: Grammar | None) -> Grammar:
    """Calls in a model's own form, one or, if `parallel`, several; or the `answer`, a JSON schema."""
    definitions: dict[str, Any] = {}
    kinds = []
    for at, (name, schema) in enumerate(functions):
        definitions[f"tool{at}"] = _moved(schema, f"#/$defs/tool{at}")
        kinds.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool{at}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    call = {"anyOf": kinds}
    calls: dict[str, Any] = {"type": "array", "items": call, "minItems": 1}
    if not parallel:
        calls["maxItems"] = 1
    if form == "marked":
        rule, inner = f'calls: "{MARKED[0]}" list "{MARKED[1]}"\nlist: %json ', calls
    elif form == "tagged":
        again = ' ("\\n" one)*' if parallel else ""
        rule = f'calls: one{again}\none: "{TAGGED[0]}\\n" call "\\n{TAGGED[1]}"\ncall: %json '
        inner = call
    else:
        rule = "calls: %json "
        inner = {"type": "object", "properties": {"tool_calls": calls}, "required": ["tool_calls"]}
        inner["additionalProperties"] = False
    text = rule + json.dumps({**inner, "$defs": definitions, "x-guidance": _TIGHT}) + "\n"
    if answer is None:
        return Grammar("lark", "start: calls\n" + text)
    schema = json.loads(answer.text)
    shaped = {"x-guidance": {"whitespace_pattern": JSON_BLANK}, **schema} if isinstance(schema, dict) else schema
    return Grammar("lark", f"start: calls | answer\n{text}answer: %json {json.dumps(shaped)}\n")


def words_or_calls(functions: Sequence[Function], parallel: bool) -> Grammar:
    """Words, or words and then calls, in any of the forms that are read as calls."""
    names = [json.dumps(name, ensure_ascii=False) for name, _ in functions]
    named = rf'"name"{_B}:{_B}'
    more = '(", " call)*' if parallel else ""
    rules = [
        "call: " + " | ".join(f"named{at}" for at in range(len(names))),
        f'list: "[" call {more} "]"',
        'close: ("\\n```")?',
    ]
    openings = {
        "wrapped": rf'{_FENCE}\{{{_B}"tool_calls"{_B}:{_B}\[{_B}',
        "worded": rf"{_B}functools\[{_B}",
        "marked": f"(?s:.*){_exact(MARKED[0])}",
        "tagged": f"(?s:.*){_exact(TAGGED[0])}",
    }
    again = f'("\\n{TAGGED[0]}\\n" call "\\n{TAGGED[1]}")*' if parallel else ""
    ways = {
        "wrapped": f'call {more} "]}}" close',
        "worded": f'call {more} "]"',
        "marked": f'list "{MARKED[1]}"',
        "tagged": f'"\\n"? call "\\n{TAGGED[1]}" {again}',
    }
    for at, name in enumerate(names):
        begun, between = json.dumps('{"name": ' + name, ensure_ascii=False), json.dumps(', "arguments": ')
        schema = json.dumps({**_moved(functions[at][1], "#"), "x-guidance": _TIGHT})
        rules.append(f"named{at}: {begun} rest{at}")
        rules.append(f'rest{at}: {between} arguments{at} "}}"\narguments{at}: %json {schema}')
        openings[f"bare{at}"] = rf"{_FENCE}\{{{_B}{named}{_exact(name)}"
        openings[f"listed{at}"] = rf"{_FENCE}\[{_B}\{{{_B}{named}{_exact(name)}"
        ways[f"bare{at}"] = f"rest{at} close"
        ways[f"listed{at}"] = f'rest{at} {more} "]" close'
    # Which words the reader would take for calls: marks anywhere, and at the start JSON that names a tool somewhere (or
    # a name that is written with escapes), all of `tool_calls`, and what follows the word.
    known = "|".join(_exact(name) for name in names)
    inside = rf'{_FENCE}[\[{{](?s:.*){named}({known}|"[^"\\]*\\)(?s:.*)'
    outside = rf'({_FENCE}\{{{_B}"tool_calls"|{_B}functools\[)(?s:.*)'
    marks = f"(?s:.*)({_exact(MARKED[0])}|{_exact(TAGGED[0])})(?s:.*)"
    for way, opening in openings.items():
        bounded = " & ~INSIDE & ~OUTSIDE" if opening.startswith("(?s:.*)") else ""
        rules.append(f"{way}: {way}_begun {ways[way]}\n{way}_begun[lazy]: {way.upper()}")
        rules.append(f"{way.upper()}: {_regex(opening)}{bounded}")
    rules += [
        "WORDS: /(?s:.*)/ & ~MARKS & ~INSIDE & ~OUTSIDE",
        f"MARKS: {_regex(marks)}",
        f"INSIDE: {_regex(inside)}",
        f"OUTSIDE: {_regex(outside)}",
    ]
    return Grammar("lark", "\n".join(["start: WORDS | " + " | ".join(ways), *rules]) + "\n")


def _regex(pattern: str) -> str:
    """A regular expression as Lark has it."""
    return "/" + pattern.replace("/", r"\/") + "/"


def _exact(text: str) -> str:
    """A regular expression for a text as it is."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _moved(schema: Any, place: str, depth: int = 0) -> Any:
    """A schema whose references to itself still hold when it lies at `place` of another."""
    if depth > 100:
        raise RequestError("the parameters of a tool are nested too deeply")
    if depth == 0:
        check_schema(schema)
    if isinstance(schema, Mapping):
        moved = {}
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str) and value.startswith("#"):
                moved[key] = place + value[1:]
            elif key not in ("$schema", "$id"):
                moved[key] = _moved(value, place, depth + 1)
        return moved
    if isinstance(schema, list):
        return [_moved(item, place, depth + 1) for item in schema]
    return schema
