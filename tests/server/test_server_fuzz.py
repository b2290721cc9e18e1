"""Requests made by schemathesis from the document of the API, to the real process: none makes it fail.

What fits the document and what does not; a status, type or field that the document does not have counts as a failure,
and so does any 5xx. 503 and 429 are answers to load and to the end of the server, of which there is none here.
PHIQUANT_FUZZ says how many requests of both kinds each endpoint gets (`make fuzz`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.core.transport import Response
from schemathesis.specs.openapi import checks as openapi_checks

from .process import Process

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

EXAMPLES = int(os.environ.get("PHIQUANT_FUZZ", "6"))
POSTS = [
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"),
    *("/v1/messages/count_tokens", "/completion", "/tokenize", "/detokenize", "/apply-template"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/show"),
]
GETS = [
    *("/health", "/props", "/slots", "/metrics", "/v1/models", "/v1/models/{model}"),
    *("/api/tags", "/api/ps", "/api/version"),
]
CHECKED = [
    *(checks.not_a_server_error, openapi_checks.status_code_conformance, openapi_checks.content_type_conformance),
    *(openapi_checks.response_headers_conformance, openapi_checks.response_schema_conformance),
]


@pytest.fixture(scope="module")
def served(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Short answers, so that many fit into a test."""
    options = ["-m", gguf, "--alias", "tiny", "-c", "128", "--predict", "4", "--embeddings", "--metrics", "--slots"]
    process = Process(tmp_path_factory.mktemp("fuzz"), *options)
    yield process
    assert process.end() == 0
    assert "Traceback" not in process.lines()


@pytest.fixture(scope="module")
def schema(served: Process) -> Any:
    return schemathesis.openapi.from_url(f"{served.address}/openapi.json")


def test_every_endpoint_is_tried(schema: Any) -> None:
    known = {(result.ok().method, result.ok().path) for result in schema.get_all_operations()}
    assert known == {("post", path) for path in POSTS} | {("get", path) for path in GETS}


def sent(case: Any, session: requests.Session, statuses: Counter[int]) -> None:
    answer: Response = case.call(session=session, timeout=60)
    statuses[answer.status_code] += 1
    case.validate_response(answer, checks=CHECKED)


def bounded(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_fit_the_document(schema: Any, path: str) -> None:
    """Some of the optional fields at a time, since all of them at once are never right together."""
    statuses: Counter[int] = Counter()
    operation = schema[path]["POST"]
    required = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)
    needed = set(schema.raw_schema["components"]["schemas"][required[1]].get("required", ()))
    with requests.Session() as session:

        @bounded(EXAMPLES)
        @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE), st.data())
        def run(case: Any, data: st.DataObject) -> None:
            if isinstance(case.body, dict):
                kept = data.draw(st.sets(st.sampled_from(sorted(case.body)), max_size=3)) if case.body else set()
                case.body = {name: value for name, value in case.body.items() if name in needed | kept}
                if "model" in case.body or path == "/api/show":
                    case.body["model"] = "tiny"
            sent(case, session, statuses)

        run()
    assert sum(statuses.values()) >= EXAMPLES


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_do_not_fit_the_document(schema: Any, path: str) -> None:
    statuses: Counter[int] = Counter()
    with requests.Session() as session:

        @bounded(EXAMPLES)
        @given(schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
        def run(case: Any) -> None:
            sent(case, session, statuses)

        run()
    assert statuses[400] > 0
    assert statuses[200] == 0, "what the document forbids is refused"


@pytest.mark.parametrize("path", GETS)
def test_questions_without_a_body(schema: Any, path: str) -> None:
    statuses: Counter[int] = Counter()
    with requests.Session() as session:

        @bounded(EXAMPLES)
        @given(schema[path]["GET"].as_strategy(generation_mode=GenerationMode.POSITIVE))
        def run(case: Any) -> None:
            assume(case.path_parameters.get("model") != "")
            sent(case, session, statuses)

        run()
    assert statuses.keys() <= {200, 404}
