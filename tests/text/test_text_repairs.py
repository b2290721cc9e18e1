"""Conversations with tools, as templates of Phi-4-mini's kind have to get them."""

import json
from typing import Any

import pytest

from phiquant.errors import RequestError
from phiquant.text import ChatTemplate
from phiquant.text.repairs import NOTE, SYSTEM, read_calls, reads_tools_from_system, rearrange
from phiquant.text.template import known_templates

MINI = known_templates()["Phi-4-mini-instruct"]
ADD = {"name": "add", "description": "Adds „two“.", "parameters": {"a": {"type": "int"}}}
TOOLS = [{"type": "function", "function": ADD}]
TEXT = json.dumps([ADD], ensure_ascii=False)


def render(messages: list[dict[str, Any]], prompt: bool = True, source: str = MINI, **extra: Any) -> str:
    return ChatTemplate(source, bos_token="", eos_token="<|endoftext|>").render(messages, prompt, **extra)


def test_which_templates_read_tools_from_the_system_message() -> None:
    found = {name for name, source in known_templates().items() if reads_tools_from_system(source)}
    assert found == {"Phi-4-mini-instruct", "Phi-4-mini-instruct, no end", "Phi-4-mini-reasoning"}
    assert reads_tools_from_system(MINI.replace("'tools'", '"tools"').replace("{%", "{%-"))
    assert not reads_tools_from_system(MINI + "{{ tools | tojson }}")
    assert not reads_tools_from_system(MINI.replace("<|tool|>", ""))
    assert not reads_tools_from_system(MINI + " " * (1 << 17))
    assert ChatTemplate(MINI, bos_token="", eos_token="").notes == (NOTE,)


def test_tools_go_into_the_system_message() -> None:
    user = {"role": "user", "content": "1 + 1?"}
    assert render([{"role": "system", "content": "Be brief."}, user], tools=TOOLS) == (
        f"<|system|>Be brief.<|tool|>{TEXT}<|/tool|><|end|><|user|>1 + 1?<|end|><|assistant|>"
    )
    assert render([user], tools=TOOLS) == (
        f"<|system|>{SYSTEM}<|tool|>{TEXT}<|/tool|><|end|><|user|>1 + 1?<|end|><|assistant|>"
    )
    assert render([user], tools=[ADD]) == render([user], tools=TOOLS)
    # The way of the model's card still works.
    card = {"role": "system", "content": SYSTEM, "tools": TEXT}
    assert render([card, user]) == render([user], tools=TOOLS)
    for nothing in ({}, {"tools": None}, {"tools": []}):
        assert render([user], **nothing) == "<|user|>1 + 1?<|end|><|assistant|>"
    assert render([user], False, tools=[]) == "<|user|>1 + 1?<|end|><|endoftext|>"


def test_calls_and_results() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call, {"name": "é", "arguments": {"b": 2}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Well: ", "tool_calls": [call]},
    ]
    assert render(talk) == (
        '<|user|>1 + 1?<|end|><|assistant|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}, '
        '{"name": "é", "arguments": {"b": 2}}]<|/tool_call|><|end|><|tool_response|>2<|end|>'
        '<|assistant|>Well: <|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|><|end|><|assistant|>'
    )
    assert talk[1]["content"] is None  # what was given is not changed


def test_the_reasoning_variant_keeps_its_own_first_words() -> None:
    source = known_templates()["Phi-4-mini-reasoning"]
    first = "<|system|>Your name is Phi, an AI math expert developed by Microsoft."
    user = {"role": "user", "content": "1 + 1?"}
    assert render([user], source=source) == f"{first}<|end|><|user|>1 + 1?<|end|><|assistant|>"
    assert render([{"role": "system", "content": "Be brief."}, user], source=source, tools=TOOLS) == (
        f"{first} Be brief.<|tool|>{TEXT}<|/tool|><|end|><|user|>1 + 1?<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([{"role": "system", "content": "x", "tools": "[]"}], TOOLS, "given twice"),
        ([], "add", "must be lists, not str"),
        ([{"role": "assistant", "content": "", "tool_calls": {"a": 1}}], None, "must be lists, not dict"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], None, "needs a function with a name"),
        ([{"role": "assistant", "content": "", "tool_calls": [7]}], None, "needs a function with a name"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            None,
            "arguments of a call to 'f' are not JSON",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}],
            None,
            "arguments of a call to 'f' are not JSON",
        ),
    ],
)
def test_malformed_tools_are_refused(messages: list[dict[str, Any]], tools: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        rearrange([read_calls(message) for message in messages], tools)


def test_tools_that_a_template_would_leave_out_are_refused() -> None:
    for name in ("Phi-4", "Phi-3.5-mini-instruct"):
        with pytest.raises(RequestError, match="no place for tools"):
            render([{"role": "user", "content": "x"}], source=known_templates()[name], tools=TOOLS)
        assert render([{"role": "user", "content": "x"}], source=known_templates()[name], tools=None)


def test_templates_that_leave_system_messages_out_say_so() -> None:
    for name, source in known_templates().items():
        template = ChatTemplate(source, bos_token="", eos_token="")
        shown = "Be kind." in template.render(
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x"}]
        )
        assert shown != any("leaves out system messages" in note for note in template.notes), name
