"""What goes wrong with a request, as status and body: one meaning, in the shape that each family of clients reads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from phiquant.errors import ContextError, QueueFull, RequestError, TemplateError

__all__ = ["ENDING", "Failure", "Family", "body_of", "failure_of", "family_of", "refuse"]

Family = Literal["openai", "anthropic", "ollama", "llama"]

# OpenAI's, Anthropic's and llama-server's names of what a status means.
_TYPES: Final[Mapping[int, tuple[str, str, str]]] = {
    400: ("invalid_request_error", "invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large", "invalid_request_error"),
    415: ("invalid_request_error", "invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error", "unavailable_error"),
    503: ("server_error", "overloaded_error", "unavailable_error"),
}
_BROKEN: Final = ("server_error", "api_error", "server_error")


@dataclass(eq=False)
class Failure(Exception):  # noqa: N818 - it is what is answered, too
    """An answer that is none.

    Attributes:
        status: of HTTP.
        message: one sentence for whoever sent the request.
        param: the field that is at fault.
        code: OpenAI's short name of the reason, where it has one.
        retry_after: seconds.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


ENDING: Final = Failure(503, "the server is shutting down and has ended this request", retry_after=10)
"""What requests are told that are cancelled at the end."""


def refuse(message: str, param: str | None = None, code: str | None = None) -> Failure:
    """A request that cannot be served, with status 400."""
    return Failure(400, message, param, code)


def failure_of(error: BaseException) -> Failure:
    """What an exception means to the client; 500, without details, for what is no fault of theirs."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, QueueFull):
        return Failure(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, ContextError):
        return Failure(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError | TemplateError):
        return Failure(400, str(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        return _plain(error)
    return Failure(500, "the server failed at this request; its log says why")


def family_of(path: str) -> Family:
    """Whose clients ask for this path."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith("/api/"):
        return "ollama"
    return "openai" if path.startswith("/v1/") and path != "/v1/health" else "llama"


def body_of(failure: Failure, family: Family) -> dict[str, Any]:
    """The answer's body."""
    openai, anthropic, llama = _TYPES.get(failure.status, _BROKEN)
    if family == "ollama":
        return {"error": failure.message}
    if family == "anthropic":
        return {"type": "error", "error": {"type": anthropic, "message": failure.message}}
    if family == "llama":
        return {"error": {"code": failure.status, "message": failure.message, "type": llama}}
    return {
        "error": {"message": failure.message, "type": openai, "param": failure.param, "code": failure.code},
    }


def _invalid(errors: Sequence[Any]) -> Failure:
    """The first of what pydantic complains about, as a sentence; the value itself is not repeated."""
    first: dict[str, Any] = errors[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", "")).strip()
        return Failure(400, f"the body is not valid JSON: {reason}" if reason else "the body is not valid JSON")
    # Names of pydantic's own alternatives ("function-after[...]", "list[int]") are no part of the path.
    path = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier())
    if first["type"] == "missing":
        return Failure(400, f"{path or 'the body'} is missing", path or None, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Failure(400, f"unknown parameter: {path[:100]!r}", path[:100] or None, "unknown_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return Failure(400, f"{path[:100]}: {message}" if path else message, path[:100] or None)


def _plain(error: HTTPException) -> Failure:
    messages = {404: "there is nothing at this address", 405: "this address does not take this method"}
    message = messages.get(error.status_code, str(error.detail) if error.status_code < 500 else "the server failed")
    return Failure(error.status_code, message[:1].lower() + message[1:])
