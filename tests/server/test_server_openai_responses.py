"""/v1/responses, validated by the types of OpenAI's own client."""

from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from .conftest import Make, Server

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = '{"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}'
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events(server: Server, **body: Any) -> list[Any]:
    found = server.events(PATH, **body)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return [EVENTS.validate_python(event) for event in found]


def test_an_answer(server: Server) -> None:
    answer = server.post(PATH, input="Why?", instructions="Be brief.", max_output_tokens=9, temperature=0.5, store=True)
    found = Response.model_validate(answer.json())
    assert found.output_text == " It is blue."
    assert found.status == "completed"
    assert found.usage is not None
    assert found.usage.output_tokens == 4
    assert found.usage.input_tokens_details.cached_tokens == 2
    assert "Be brief." in server.engine.prompt
    assert server.engine.options["temperature"] == 0.5


def test_a_stream(server: Server) -> None:
    found = events(server, input="Why?")
    assert [event.type for event in found[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    deltas = [event for event in found if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == " It is blue."
    assert [event.type for event in found[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert found[-1].response.output_text == " It is blue."
    assert found[-1].response.id == found[0].response.id


def test_a_stream_that_says_nothing_still_has_a_message(make: Make) -> None:
    found = events(make(""), input="Why?")
    assert found[-1].response.output[0].type == "message"


def test_the_length_leaves_it_incomplete(server: Server) -> None:
    answer = Response.model_validate(server.post(PATH, input="Why?", max_output_tokens=2).json())
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert events(server, input="Why?", max_output_tokens=2)[-1].type == "response.incomplete"


def test_calls_and_their_results(make: Make) -> None:
    server = make(CALL)
    answer = Response.model_validate(server.post(PATH, input="Weather?", tools=[TOOL]).json())
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert call.arguments == '{"city": "Rome"}'
    found = events(server, input="Weather?", tools=[TOOL])
    deltas = [event.delta for event in found if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 1
    assert found[-1].response.output[0].arguments == call.arguments
    conversation = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "reasoning", "summary": []},
    ]
    assert server.post(PATH, input=conversation, tools=[TOOL]).status_code == 200
    assert "The call of weather returned:" in server.engine.prompt
    assert "sunny" in server.engine.prompt


def test_choices_of_tools_and_forms_become_grammars(server: Server) -> None:
    server.post(PATH, input="x", tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
    assert "weather" in server.engine.options["grammar"].text
    form = {"type": "json_schema", "name": "x", "schema": {"type": "integer"}, "strict": True}
    server.post(PATH, input="x", text={"format": form})
    assert server.engine.options["grammar"].text == '{"type": "integer"}'
    found = Response.model_validate(server.post(PATH, input="x", text={"format": {"type": "json_object"}}).json())
    assert found.text is not None


def test_log_probabilities(server: Server) -> None:
    answer = server.post(PATH, input="x", include=["message.output_text.logprobs"], top_logprobs=1).json()
    assert len(Response.model_validate(answer).output[0].content[0].logprobs) == 4  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": []},
        {},
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x", "background": True},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": "x", "tools": [{"type": "web_search"}]},
        {"input": "x", "messages": []},
        {"input": "x", "temperature": 9},
    ],
    ids=str,
)
def test_what_is_wrong_is_refused(server: Server, wrong: dict[str, object]) -> None:
    answer = server.post(PATH, **wrong)
    assert answer.status_code == 400, answer.text
    assert not server.engine.asked
