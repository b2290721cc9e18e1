"""Shapes of what goes in and comes out: OpenAI's, as far as llama-cpp-python has them."""

from typing import Any, Literal, NotRequired, TypedDict

__all__ = [
    "ChatCompletionLogprobs",
    "ChatCompletionRequestMessage",
    "ChatCompletionResponseChoice",
    "ChatCompletionResponseMessage",
    "ChatCompletionStreamResponseChoice",
    "ChatCompletionTool",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionUsage",
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "CreateCompletionStreamResponse",
    "CreateEmbeddingResponse",
    "Embedding",
    "EmbeddingUsage",
]


class EmbeddingUsage(TypedDict):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """A vector, or one for each token without pooling."""

    index: int
    object: str
    embedding: list[float] | list[list[float]]


class CreateEmbeddingResponse(TypedDict):
    """What `create_embedding` gives."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class CompletionLogprobs(TypedDict):
    """Of each token: where its text begins in prompt and completion, its log-probability, and the likeliest ones."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """A text, or a piece of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(TypedDict):
    """Tokens; that which ends a text is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CreateCompletionResponse(TypedDict):
    """What `create_completion` gives; chunks of a stream have no usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage]


CreateCompletionStreamResponse = CreateCompletionResponse


class ChatCompletionLogprobs(TypedDict):
    """Of each token {"token", "logprob", "bytes", "top_logprobs"}."""

    content: list[dict[str, Any]] | None
    refusal: list[dict[str, Any]] | None


class ChatCompletionResponseMessage(TypedDict):
    """An answer, or a call of a tool."""

    content: str | None
    role: Literal["assistant", "function"]
    tool_calls: NotRequired[list[dict[str, Any]]]
    function_call: NotRequired[dict[str, str]]


class ChatCompletionResponseChoice(TypedDict):
    """The only one."""

    index: int
    message: ChatCompletionResponseMessage
    logprobs: ChatCompletionLogprobs | None
    finish_reason: str | None


class CreateChatCompletionResponse(TypedDict):
    """What `create_chat_completion` gives."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: CompletionUsage


class ChatCompletionStreamResponseChoice(TypedDict):
    """What is new in a chunk."""

    index: int
    delta: dict[str, Any]
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"] | None
    logprobs: NotRequired[ChatCompletionLogprobs | None]


class CreateChatCompletionStreamResponse(TypedDict):
    """A chunk of it as a stream."""

    id: str
    model: str
    object: Literal["chat.completion.chunk"]
    created: int
    choices: list[ChatCompletionStreamResponseChoice]


class ChatCompletionRequestMessage(TypedDict):
    """A message: its content is text, or parts {"type": "text", "text"}."""

    role: Literal["system", "user", "assistant", "tool", "function"]
    content: NotRequired[str | list[dict[str, Any]] | None]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    function_call: NotRequired[dict[str, str]]


class ChatCompletionTool(TypedDict):
    """A function {"name", "description", "parameters"} that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]
