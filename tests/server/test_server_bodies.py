"""No body, whatever it holds, makes the server fail: bodies made from the document of the API, and broken ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phiquant.text import Tokenizer

from .conftest import Server

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2),  # halves of pairs
    st.sampled_from(
        ["user", "assistant", "tool", "text", "function", "json_schema", "auto", "required", "tiny", "", "\x00"]
    ),
)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def shaped(schema: dict[str, Any], definitions: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that mostly fit a schema, and here and there do not."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    if depth > 6:
        return SCALARS
    if "anyOf" in schema or "oneOf" in schema:
        kinds = schema.get("anyOf") or schema["oneOf"]
        return st.one_of([shaped(kind, definitions, depth + 1) for kind in kinds])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        required = set(schema.get("required", ()))
        fields = {name: shaped(field, definitions, depth + 1) for name, field in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: field for name, field in fields.items() if name in required},
            optional={name: field for name, field in fields.items() if name not in required},
        )
    if kind == "object":
        return st.dictionaries(st.sampled_from(["type", "properties", "x", "5", "$ref", "anyOf"]), ANY, max_size=3)
    if kind == "array":
        items = shaped(schema.get("items", {}), definitions, depth + 1)
        return st.lists(items, min_size=min(schema.get("minItems", 0), 1), max_size=2)
    if kind == "integer":
        least, most = schema.get("minimum", -5), schema.get("maximum", schema.get("exclusiveMaximum", 2**31))
        return st.integers(int(least), int(min(most, 50))) | st.integers(-(2**70), 2**70)
    if kind == "number":
        return st.floats(schema.get("minimum", -5), schema.get("maximum", 5)) | SCALARS
    if kind == "string":
        return st.text(max_size=30) | st.sampled_from(["get_weather", "tiny", "<|end|>", "text", "message", "{}", "["])
    if kind == "boolean":
        return st.booleans()
    return ANY


def body_of(path: str, server: Server) -> st.SearchStrategy[Any]:
    document = server.app.openapi()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return shaped(schema, document["components"]["schemas"])


PATHS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"),
    *("/v1/messages/count_tokens", "/completion", "/tokenize", "/detokenize", "/apply-template"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/show"),
]


def check(server: Server, path: str, body: Any) -> int:
    data = json.dumps(body, allow_nan=True).encode()
    answer = server.ask("POST", path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)
    if answer.headers["content-type"] == "application/json":
        answer.json()
    else:
        assert "the server failed" not in answer.text, body
    return answer.status_code


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_no_body_makes_the_server_fail(server: Server, tokenizer: Tokenizer, path: str) -> None:
    seen: set[int] = set()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(body_of(path, server) | ANY)
    def run(body: Any) -> None:
        seen.add(check(server, path, body))

    run()
    assert 400 in seen


def mutated(body: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good body with one or two fields replaced by anything."""
    names = st.sampled_from([*body, "temperature", "max_tokens", "stop", "seed", "tools", "tool_choice", "stream", "n"])
    return st.dictionaries(names, ANY, min_size=1, max_size=2).map(lambda change: {**body, **change})


GOOD = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "logprobs": 1}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
    ("/completion", {"prompt": "Hello", "n_predict": 3}),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "options": {}}),
]


@pytest.mark.parametrize(("path", "good"), GOOD, ids=[path for path, _ in GOOD])
def test_a_good_body_with_something_odd_in_it_does_not_either(server: Server, path: str, good: dict[str, Any]) -> None:
    assert check(server, path, good) == 200

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(good))
    def run(body: dict[str, Any]) -> None:
        check(server, path, body)

    run()
