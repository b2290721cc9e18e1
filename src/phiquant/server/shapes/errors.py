"""Errors, in the shape of each family."""

from typing import Literal

from typing_extensions import TypedDict

__all__ = ["AnthropicError", "LlamaError", "OllamaError", "OpenAIError"]


class OpenAIErrorDetail(TypedDict):
    """What went wrong; `param` is the field at fault, `code` a short name of the reason."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(TypedDict):
    """An error, as OpenAI's clients read it."""

    error: OpenAIErrorDetail


class AnthropicErrorDetail(TypedDict):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(TypedDict):
    """An error, as Anthropic's clients read it; in a stream the event `error`."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class OllamaError(TypedDict):
    """An error, as Ollama's clients read it."""

    error: str


class LlamaErrorDetail(TypedDict):
    """What went wrong; `code` is the status."""

    code: int
    message: str
    type: str


class LlamaError(TypedDict):
    """An error, as llama-server's clients read it."""

    error: LlamaErrorDetail
