"""Answers as Ollama has them; durations are nanoseconds."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from phiquant.server.shapes.openai import TokenEntry

__all__ = ["OllamaChat", "OllamaEmbeddings", "OllamaShown", "OllamaTags", "OllamaText", "OllamaVersion", "Running"]


class Piece(TypedDict):
    """What chats and prompts share; the counts come with the last piece."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[Literal["stop", "length", "load", "unload"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[TokenEntry]]


class ObjectFunction(TypedDict):
    """The function that is called, and its arguments as an object."""

    name: str
    arguments: dict[str, Any]


class ObjectCall(TypedDict):
    """A call of a tool."""

    function: ObjectFunction


class SaidMessage(TypedDict):
    """The answer, or more of it."""

    role: Literal["assistant"]
    content: str
    tool_calls: NotRequired[list[ObjectCall]]


class OllamaChat(Piece):
    """An answer, or a piece of one."""

    message: SaidMessage


class OllamaText(Piece):
    """A prompt continued, or a piece of it."""

    response: str


class OllamaEmbeddings(TypedDict):
    """Vectors of length 1."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class Details(TypedDict):
    """What a model is."""

    parent_model: str
    format: Literal["gguf"]
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(TypedDict):
    """A model that is served."""

    name: str
    model: str
    size: int
    details: Details
    modified_at: str


class OllamaTags(TypedDict):
    """The models that are served."""

    models: list[Tag]


class RunningModel(TypedDict):
    """A model that is in memory."""

    name: str
    model: str
    size: int
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Running(TypedDict):
    """The models that are in memory."""

    models: list[RunningModel]


class OllamaShown(TypedDict):
    """What a model's file says of it."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, str | int | float | bool]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(TypedDict):
    """The version of phiquant."""

    version: str
