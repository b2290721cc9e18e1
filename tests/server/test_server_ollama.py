"""Ollama's endpoints, validated by the types of its own client."""

from typing import Any

import pytest
from ollama import ChatResponse, EmbedResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from .conftest import Make, Server

SAY = [{"role": "user", "content": "Why is the sky blue?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_a_chat_is_streamed_unless_told_otherwise(server: Server) -> None:
    answer = server.post("/api/chat", model="tiny", messages=SAY, stream=False)
    found = ChatResponse.model_validate(answer.json())
    assert found.message.content == " It is blue."
    assert (found.done, found.done_reason, found.eval_count) == (True, "stop", 4)
    assert found.eval_duration == 500_000_000
    pieces = [ChatResponse.model_validate(p) for p in server.events("/api/chat", model="tiny:latest", messages=SAY)]
    assert "".join(piece.message.content or "" for piece in pieces) == " It is blue."
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert server.ask("POST", "/api/chat", {"model": "tiny", "messages": SAY}).headers["content-type"] == (
        "application/x-ndjson"
    )


def test_options_reach_the_engine(server: Server) -> None:
    options = {"num_predict": 3, "temperature": 0.1, "top_k": 5, "seed": 9, "stop": ["x"], "num_ctx": 99, "num_gpu": 1}
    server.post("/api/chat", model="tiny", messages=SAY, options=options, format="json", logprobs=True)
    grammar = server.engine.options.pop("grammar")
    assert grammar.kind == "json_schema"
    expected = {"max_tokens": 3, "temperature": 0.1, "top_k": 5, "seed": 9, "stop": ["x"], "logprobs": 0}
    assert server.engine.options == expected
    server.post("/api/chat", model="tiny", messages=SAY, options={"num_predict": -1}, format={"type": "integer"})
    assert server.engine.options["max_tokens"] is None
    assert server.engine.options["grammar"].text == '{"type": "integer"}'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(make: Make, stream: bool) -> None:
    server = make('{"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather"}]}')
    asked: dict[str, Any] = {"model": "tiny", "messages": SAY, "tools": [TOOL]}
    if stream:
        pieces = [ChatResponse.model_validate(piece) for piece in server.events("/api/chat", **asked)]
    else:
        pieces = [ChatResponse.model_validate(server.post("/api/chat", stream=False, **asked).json())]
    calls = [call.function for piece in pieces for call in piece.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [("weather", {"city": "Rome"}), ("weather", {})]
    conversation = [
        *SAY,
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    assert server.post("/api/chat", model="tiny", messages=conversation, stream=False).status_code == 200
    assert "The call of weather returned:" in server.engine.prompt


def test_a_prompt_becomes_a_conversation_unless_it_is_raw(server: Server) -> None:
    answer = server.post("/api/generate", model="tiny", prompt="Sky?", system="Brief.", stream=False).json()
    assert GenerateResponse.model_validate(answer).response == " It is blue."
    assert "<|system|>" in server.engine.prompt
    server.post("/api/generate", model="tiny", prompt="Sky?", raw=True, stream=False)
    assert server.engine.prompt == server.engine.llm.tokenizer.decode(
        server.engine.llm.tokenizer.encode("Sky?"), skip_special=False
    )
    pieces = server.events("/api/generate", model="tiny", prompt="Sky?")
    assert "".join(piece["response"] for piece in pieces) == " It is blue."


def test_models_are_loaded_and_unloaded_on_request(server: Server) -> None:
    assert server.ask("GET", "/api/ps").json() == {"models": []}
    assert server.post("/api/generate", model="tiny").json()["done_reason"] == "load"
    assert ProcessResponse.model_validate(server.ask("GET", "/api/ps").json()).models[0].context_length == 256
    assert server.post("/api/chat", model="tiny", keep_alive="0s").json()["done_reason"] == "unload"
    assert server.engine.closed
    assert server.ask("GET", "/api/ps").json() == {"models": []}
    assert server.loads == ["tiny"]


def test_what_is_known_of_the_models(server: Server) -> None:
    (entry,) = ListResponse.model_validate(server.ask("GET", "/api/tags").json()).models
    assert entry.details is not None
    assert (entry.model, entry.details.family, entry.details.quantization_level) == ("tiny", "phi3", "Q8_0")
    assert entry.details.parameter_size == "15.0M"
    shown = ShowResponse.model_validate(server.post("/api/show", model="tiny").json())
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "phi3"
    assert "<|user|>" in (shown.template or "")
    assert server.loads == [], "a model need not be loaded for this"
    assert server.ask("GET", "/api/version").json()["version"]


def test_embeddings(make: Make) -> None:
    answer = make().post("/api/embed", model="tiny", input=["a", "b"]).json()
    assert len(EmbedResponse.model_validate(answer).embeddings) == 2
    assert make(embeddings=False).post("/api/embed", model="tiny", input="a").status_code == 400
    openai = make().post("/v1/embeddings", input=[[5, 6, 7]], encoding_format="float", dimensions=4).json()
    assert openai["data"][0]["embedding"] == pytest.approx([0.3] * 4)
    assert openai["usage"]["prompt_tokens"] == 3
    assert make().post("/v1/embeddings", input="a", dimensions=3).status_code == 400
    assert make().post("/v1/embeddings", input=[]).status_code == 400
    assert make(embeddings=False).post("/v1/embeddings", input="a").json()["error"]["code"] == "embeddings_disabled"


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("chat", {"messages": SAY}),
        ("chat", {"model": "tiny", "messages": [{"role": "user", "content": "x", "images": ["x"]}]}),
        ("chat", {"model": "tiny", "messages": SAY, "options": {"temperature": -1}}),
        ("chat", {"model": "tiny", "messages": SAY, "options": {"num_predict": 0}}),
        ("chat", {"model": "tiny", "messages": SAY, "format": "xml"}),
        ("chat", {"model": "tiny", "messages": SAY, "think": True}),
        ("generate", {"model": "tiny", "prompt": "x", "suffix": "y"}),
        ("generate", {"model": "tiny", "prompt": "x", "context": [1]}),
        ("embed", {"model": "tiny", "input": []}),
        ("show", {}),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_ollamas_shape(server: Server, path: str, wrong: dict[str, object]) -> None:
    answer = server.post(f"/api/{path}", **wrong)
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)
    assert not server.engine.asked
