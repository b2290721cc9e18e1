"""/v1/messages, validated by the types of Anthropic's own client."""

import json
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from .conftest import Make, Server

PATH = "/v1/messages"
SAY = [{"role": "user", "content": "Why is the sky blue?"}]
TOOL = {"name": "weather", "description": "Of a city.", "input_schema": {"type": "object", "properties": {"city": {}}}}
CALL = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def ask(server: Server, **body: Any) -> Message:
    answer = server.post(PATH, **{"max_tokens": 50, "messages": SAY, **body})
    assert answer.status_code == 200, answer.text
    return Message.model_validate(answer.json())


def test_an_answer(server: Server) -> None:
    found = ask(server, system="Be brief.", temperature=0.5, top_k=3, stop_sequences=["\n"])
    assert found.content[0].text == " It is blue."  # type: ignore[union-attr]
    assert found.stop_reason == "end_turn"
    assert found.usage.cache_read_input_tokens == 2
    assert found.usage.input_tokens + 2 == len(server.engine.asked[0][0])
    assert "Be brief." in server.engine.prompt
    assert server.engine.options == {"max_tokens": 50, "temperature": 0.5, "top_k": 3, "stop": ["\n"]}


def test_a_stream(server: Server) -> None:
    found = [EVENTS.validate_python(event) for event in server.events(PATH, max_tokens=50, messages=SAY)]
    kinds = [event.type for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in found if event.type == "content_block_delta") == " It is blue."
    assert found[0].message.usage.input_tokens == len(server.engine.asked[0][0])
    assert found[-2].delta.stop_reason == "end_turn"
    assert found[-2].usage.output_tokens == 4


def test_why_it_ended(make: Make) -> None:
    assert ask(make(), max_tokens=2).stop_reason == "max_tokens"
    server = make()
    server.engine.stop = "END"
    found = ask(server)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "END")


def test_calls_of_tools(make: Make) -> None:
    server = make("Let me look." + CALL)
    found = ask(server, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in found.content] == ["text", "tool_use"]
    assert found.content[1].input == {"city": "Rome"}  # type: ignore[union-attr]
    assert found.stop_reason == "tool_use"
    events = [EVENTS.validate_python(e) for e in server.events(PATH, max_tokens=99, messages=SAY, tools=[TOOL])]
    starts = [event.content_block.type for event in events if event.type == "content_block_start"]
    assert starts == ["text", "tool_use"]
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 1]
    assert json.loads("".join(pieces)) == {"city": "Rome"}
    assert sum(event.type == "content_block_stop" for event in events) == 2


def test_choices_of_tools(server: Server) -> None:
    ask(server, tools=[TOOL], tool_choice={"type": "any"})
    assert "weather" in server.engine.options["grammar"].text
    ask(server, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"})
    assert '"maxItems": 1' in server.engine.options["grammar"].text
    ask(server, tools=[TOOL], tool_choice={"type": "none"})
    assert "grammar" not in server.engine.options
    assert "Of a city." not in server.engine.prompt


def test_results_of_tools_come_before_the_words_beside_them(server: Server) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]}
    messages = [
        *SAY,
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, result]},
    ]
    ask(server, messages=messages, tools=[TOOL], system=[{"type": "text", "text": "Brief."}])
    prompt = server.engine.prompt
    assert prompt.index("The call of weather returned:") < prompt.index("sunny") < prompt.index("And?")


def test_tokens_are_counted_without_an_answer(server: Server) -> None:
    answer = server.post(PATH + "/count_tokens", messages=SAY, model="tiny")
    ask(server)
    assert answer.json() == {"input_tokens": len(server.engine.asked[0][0])}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"temperature": 1.5},
        {"unknown": 1},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tools": [{"type": "computer_20250124", "name": "computer"}]},
        {"tool_choice": {"type": "tool"}, "tools": [TOOL]},
        {"tools": [{**TOOL, "name": "two words"}]},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_anthropics_shape(server: Server, wrong: dict[str, object]) -> None:
    answer = server.post(PATH, **{"max_tokens": 9, "messages": SAY, **wrong})
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not server.engine.asked


def test_errors_have_anthropics_names(make: Make) -> None:
    server = make()
    server.engine.full = True
    asked = {"max_tokens": 9, "messages": SAY}
    assert server.post(PATH, **asked).json()["error"]["type"] == "rate_limit_error"
    assert server.post(PATH, model="other", **asked).json()["error"]["type"] == "not_found_error"
    server.engine.full, server.engine.error, server.engine.error_after = False, ValueError("secret"), 1
    last = server.events(PATH, **asked)[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"
