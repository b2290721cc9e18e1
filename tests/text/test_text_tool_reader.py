"""Calls of tools in words that come in pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.text.tool_reader import CallArguments, CallBegun, Content, Found, ToolReader

NAMES = ("weather", "time")


def read(*pieces: str, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolReader(NAMES, parallel=parallel)
    found: list[Found] = [item for piece in pieces for item in reader.push(piece)] + reader.finish()
    text, calls = "", []
    for item in found:
        if isinstance(item, Content):
            text += item.text
        elif isinstance(item, CallBegun):
            assert item.call == len(calls)
            calls.append([item.name, ""])
        else:
            calls[item.call][1] += item.text
    assert reader.calls == len(calls)
    return text, [(name, arguments) for name, arguments in calls]


ONE = '{"name": "weather", "arguments": {"city": "Köln \\"am\\" [Rhein}", "days": 2}}'
CALL = ("weather", '{"city": "Köln \\"am\\" [Rhein}", "days": 2}')
FORMS = [
    ONE,
    f"[{ONE}]",
    f"\n [ {ONE} ] \n",
    f"```json\n[{ONE}]\n```",
    f"<|tool_call|>[{ONE}]<|/tool_call|>",
    f"<tool_call>\n{ONE}\n</tool_call>",
    f"functools[{ONE}]",
    f'{{"tool_calls": [{ONE}]}}',
    f'[{{"type": "function", "id": "x", "function": {ONE}}}]',
    ONE.replace("arguments", "parameters"),
    '{"arguments": {"city": "Köln \\"am\\" [Rhein}", "days": 2}, "name": "weather"}',
    '{"name": "weather", "arguments": ' + json.dumps(CALL[1]) + "}",
]


@pytest.mark.parametrize("text", FORMS)
def test_every_form_of_a_call_is_read(text: str) -> None:
    assert read(text) == ("", [CALL])


@pytest.mark.parametrize("text", FORMS)
def test_pieces_make_no_difference(text: str) -> None:
    assert read(*text) == read(text)
    assert read(*(text[i : i + 3] for i in range(0, len(text), 3))) == read(text)


def test_several_calls_and_the_words_before_them() -> None:
    two = '{"name": "time", "arguments": {}}'
    assert read(f"Let me see.<|tool_call|>[{ONE}, {two}]<|/tool_call|>") == ("Let me see.", [CALL, ("time", "{}")])
    assert read(f"<tool_call>{ONE}</tool_call>\n<tool_call>{two}</tool_call>") == ("", [CALL, ("time", "{}")])
    assert read(f"[{ONE}, {two}]", parallel=False) == ("", [CALL])
    assert read(f"<tool_call>{ONE}</tool_call>\n<tool_call>{two}</tool_call>", parallel=False) == ("", [CALL])


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert read('[{"name": "time"}]') == ("", [("time", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        '{"answer": 42}',
        '{"name": "Bob", "arguments": 1}',
        '["a", "list"]',
        "[]",
        "{}",
        "  indented",
        "```python\nprint([1])\n```",
        "```json\n{}\n```",
        "{not JSON at all",
        '{"name": {"first": "weather"}}',
        "functional programming",
        "a < b, <|tool and <tool_",
        '[1, 2, {"x": "y"}]',
        "",
        " ",
    ],
)
def test_what_is_no_call_stays_as_it_is(text: str) -> None:
    assert read(text)[1] == []
    assert read(text)[0].strip() == text.strip()
    assert read(*text) == read(text)


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolReader(NAMES)
    assert reader.push('<|tool_call|>[{"name": "wea') == []
    assert reader.push('ther"') == [CallBegun(0, "weather")]
    assert reader.push(', "arguments": {"ci') == [CallArguments(0, '{"ci')]
    assert reader.push('ty": "Rome"}') == [CallArguments(0, 'ty": "Rome"}')]
    assert reader.push("}]<|/tool") == []
    assert reader.push("_call|>") == []
    assert reader.finish() == []


def test_a_call_that_is_cut_off_keeps_what_it_has() -> None:
    assert read('[{"name": "weather", "arguments": {"city": "Ro') == ("", [("weather", '{"city": "Ro')])


def test_a_mark_around_something_else_stays_visible() -> None:
    assert read("<|tool_call|>nothing<|/tool_call|>")[0] == "<|tool_call|>nothing<|/tool_call|>"
    assert read("<|tool_call|>[1]<|/tool_call|> end")[1] == []


PIECES = [
    "<|tool_call|>",
    "<|/tool_call|>",
    "[",
    "]",
    "{",
    "}",
    '"name"',
    '"weather"',
    ":",
    ",",
    '"arguments"',
    " ",
    "x",
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "<tool_call>", "functools", "```json", "\n", "\\", '"', "1", "ONE", ONE])))
def test_any_words_read_the_same_however_they_are_cut(parts: list[str]) -> None:
    text = "".join(parts)
    assert read(*text) == read(text)


@given(st.text())
def test_words_without_brackets_are_words(text: str) -> None:
    plain = "".join(c for c in text if c not in "[{<")
    assert read(*plain) == (plain, []) if plain.strip() else read(*plain)[1] == []
