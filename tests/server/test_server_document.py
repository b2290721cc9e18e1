"""The document at /openapi.json: that it tells everything, and that what holds answers against it can fail."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

from phiquant.server import anthropic, llama_cpp, ollama, openai_chat, openai_completions, openai_embeddings
from phiquant.server import openai_responses as responses

from .conftest import Make, Server

SAY = {"messages": [{"role": "user", "content": "Hello"}]}
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": openai_chat.ChatBody,
    "/v1/completions": openai_completions.CompletionBody,
    "/v1/responses": responses.ResponseBody,
    "/v1/embeddings": openai_embeddings.EmbeddingBody,
    "/v1/messages": anthropic.MessagesBody,
    "/v1/messages/count_tokens": anthropic.CountBody,
    "/completion": llama_cpp.LlamaCompletionBody,
    "/tokenize": llama_cpp.TokenizeBody,
    "/detokenize": llama_cpp.DetokenizeBody,
    "/apply-template": llama_cpp.TemplateBody,
    "/api/chat": ollama.OllamaChatBody,
    "/api/generate": ollama.GenerateBody,
    "/api/embed": ollama.EmbedBody,
    "/api/show": ollama.ShowBody,
}
STREAMS = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/responses"), "text/event-stream"),
    **dict.fromkeys(("/v1/messages", "/completion"), "text/event-stream"),
    **dict.fromkeys(("/api/chat", "/api/generate"), "application/x-ndjson"),
}


@pytest.fixture
def document(make: Make) -> dict[str, Any]:
    made = make(metrics=True, slots=True, api_keys=("k",))
    found: dict[str, Any] = made.ask("GET", "/openapi.json", headers={"authorization": "Bearer k"}).json()
    return found


def test_bodies_are_documented_as_they_are_read(document: dict[str, Any]) -> None:
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts == set(BODIES)
    for path, body in BODIES.items():
        told = document["paths"][path]["post"]["requestBody"]
        assert told["required"] is True
        assert list(told["content"]) == ["application/json"]
        name = told["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        schema = document["components"]["schemas"][name]
        read = {field.alias or name for name, field in body.model_fields.items()}
        assert schema["properties"].keys() == read
        assert set(schema.get("required", ())) == {n for n, field in body.model_fields.items() if field.is_required()}
        assert (schema.get("additionalProperties") is False) == (body.model_config.get("extra") == "forbid")


def test_every_endpoint_tells_its_answer_and_its_errors(document: dict[str, Any]) -> None:
    shapes = {"/v1/messages": "AnthropicError", "/api/": "OllamaError", "/v1/": "OpenAIError", "/": "LlamaError"}
    for path, operations in document["paths"].items():
        family = next(shape for begin, shape in shapes.items() if path.startswith(begin))
        for method, operation in operations.items():
            told = operation["responses"]
            assert {"200", "400", "401", "403", "500"} <= told.keys(), path
            assert "422" not in told
            if method == "post":
                assert {"404", "408", "413", "415", "429", "503"} <= told.keys(), path
                assert told["429"]["headers"].keys() == told["503"]["headers"].keys() == {"Retry-After"}
            for status in told.keys() - {"200"}:
                reference = told[status]["content"]["application/json"]["schema"]["$ref"]
                assert reference == f"#/components/schemas/{family}", (path, status)
            content = told["200"]["content"]
            stream = STREAMS.get(path)
            assert set(content) == ({"application/json", stream} if stream else set(content) - set(STREAMS.values()))
            if path != "/metrics":
                assert content["application/json"]["schema"], path
            if stream:
                assert "#/components/schemas/" in json.dumps(content[stream]["itemSchema"])


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                assert value["$ref"] in known
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)


def test_keys_are_documented_where_they_are_asked_for(server: Server, document: dict[str, Any]) -> None:
    assert document["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
    assert "security" not in server.app.openapi()


def test_all_addresses_are_in_the_document_or_other_names_of_those(server: Server) -> None:
    documented = server.app.openapi()["paths"]
    hidden = {r.path for r in server.app.routes if isinstance(r, APIRoute) and not r.include_in_schema}
    assert {path for path in hidden if not path.startswith(("/assets", "/index"))} - {"/"} <= {
        *("/models", "/completions", "/v1/health"),
    }
    assert not hidden & documented.keys()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_not_as_documented_are_noticed(server: Server, stream: bool) -> None:
    answer = server.post("/v1/chat/completions", **SAY, stream=stream)
    text = answer.text

    def told(changed: str, status: int = 200, **headers: str) -> None:
        made = httpx.Response(status, headers={"content-type": answer.headers["content-type"], **headers}, text=changed)
        server.documented.check("POST", "/v1/chat/completions", made)

    told(text)
    for wrong in (
        text.replace('"created":', '"made":'),
        text.replace('"created":', '"created":"x","old":'),
        text.replace('"index":0', '"index":"0"'),
        text.replace('"finish_reason":"stop"', '"finish_reason":"tired"'),
    ):
        assert wrong != text
        with pytest.raises(AssertionError, match="not as documented"):
            told(wrong)
    with pytest.raises(AssertionError, match="no such status"):
        told(text, 418)
    with pytest.raises(AssertionError, match="no such type"):
        told(text, **{"content-type": "text/html"})
    with pytest.raises(AssertionError, match="429"):
        told('{"error": {"message": "x", "type": "x", "param": null, "code": null}}', 429)


def test_the_document_is_made_once_and_is_the_servers_own(server: Server) -> None:
    first = copy.deepcopy(server.app.openapi())
    assert server.ask("GET", "/openapi.json").json() == first
    assert server.app.openapi() is server.app.openapi()
