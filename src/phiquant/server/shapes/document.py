"""The document at /openapi.json: what FastAPI makes of the endpoints, with streams, errors and keys as they are."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from phiquant.server.failures import Family
from phiquant.server.shapes import anthropic, errors, llama_cpp, ollama, openai, responses

__all__ = ["EVENTS", "LINES", "PLACE", "answers", "document", "plain_answers"]

PLACE: Final = "#/components/schemas/"
EVENTS: Final = "text/event-stream"
LINES: Final = "application/x-ndjson"

_ERRORS: Final[Mapping[Family, Any]] = {
    "openai": errors.OpenAIError,
    "anthropic": errors.AnthropicError,
    "ollama": errors.OllamaError,
    "llama": errors.LlamaError,
}
_STREAMED: Final[Sequence[Any]] = (
    *(openai.ChatChunk, openai.TextCompletionChunk, llama_cpp.LlamaPiece, llama_cpp.LlamaCompletion),
    *(ollama.OllamaChat, ollama.OllamaText),
    *(*responses.EVENTS, *anthropic.EVENTS, *_ERRORS.values()),
)
"""Shapes that are in streams, and so in no answer that FastAPI knows of."""

_Statuses = Mapping[int, tuple[str, Mapping[str, Any]]]
_RETRY: Final = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_KEY: Final = {"WWW-Authenticate": {"schema": {"const": "Bearer"}}}
_ALWAYS: Final[_Statuses] = {
    400: ("The request cannot be served; the message says why.", {}),
    401: ("A key is needed.", _KEY),
    403: ("The Host or the Origin is not one that may ask.", {}),
    500: ("The server failed at this request; its log says why.", {}),
}
_MODEL: Final[_Statuses] = {404: ("There is no such model.", {})}
_POST: Final[_Statuses] = {
    408: ("The body took too long.", {}),
    413: ("The body is too large.", {}),
    415: ("The body is not JSON.", {}),
}
_WORK: Final[_Statuses] = {
    429: ("Too many requests wait.", _RETRY),
    503: ("The server is shutting down.", _RETRY),
}


def answers(
    family: Family,
    whole: Any,
    streamed: Sequence[Any] = (),
    *,
    media: str = EVENTS,
    post: bool = True,
    model: bool = True,
) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer, for FastAPI's `responses`.

    Args:
        family: gives the shape of errors.
        whole: the shape of the answer in one piece.
        streamed: shapes of the pieces of a stream, errors included, if it may be one; its type is `media`.
        post: whether it takes a body.
        model: whether it is about one model.
    """
    found: dict[int | str, dict[str, Any]] = {200: {"model": whole, "description": "The answer."}}
    if streamed:
        each: dict[str, Any] = {"oneOf": [{"$ref": PLACE + shape.__name__} for shape in streamed]}
        if media == EVENTS:
            named = family == "anthropic" or whole is responses.ResponseObject
            each = _event(each, named=named, done=family == "openai" and not named)
        found[200]["content"] = {media: {"itemSchema": each}}
        found[200]["description"] = "The answer, or, with `stream`, its pieces as they come."
    for status, (description, headers) in {
        **_ALWAYS,
        **(_MODEL if model else {}),
        **(_POST if post else {}),
        **(_WORK if model else {}),
    }.items():
        found[status] = {"model": _ERRORS[family], "description": description}
        if headers:
            found[status]["headers"] = headers
    return found


def _event(content: dict[str, Any], *, named: bool, done: bool) -> dict[str, Any]:
    """A server-sent event, as OpenAPI describes it: `content` is the schema of its data, which are JSON.

    named: whether the event has its type besides. done: whether the last one says [DONE] instead.
    """
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    fields = {"data": {"anyOf": [data, {"const": "[DONE]"}]} if done else data}
    if named:
        fields["event"] = {"type": "string", "description": "The `type` of the data."}
    return {"type": "object", "properties": fields, "required": list(fields)}


def plain_answers(family: Family, media: str) -> dict[int | str, dict[str, Any]]:
    """The same for one that answers a text."""
    found = answers(family, str, post=False, model=False)
    found[200] = {"description": "The answer.", "content": {media: {"schema": {"type": "string"}}}}
    return found


def document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """The whole of it; `keys`: whether requests need one."""
    made = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        openapi_version=app.openapi_version,
        routes=app.routes,
    )
    schemas = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; here such bodies are answered with 400
        schemas.pop(name, None)
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    _, more = TypeAdapter.json_schemas(
        [(shape.__name__, "serialization", TypeAdapter(shape)) for shape in _STREAMED], ref_template=PLACE + "{model}"
    )
    for name, schema in more["$defs"].items():
        schemas.setdefault(name, schema)
    if keys:
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        made["security"] = [{"bearer": []}, {"x-api-key": []}]
    return made
