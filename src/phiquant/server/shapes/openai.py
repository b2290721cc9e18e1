"""Chats, completions, embeddings and models, as OpenAI has them; `timings` are llama-server's addition."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

__all__ = [
    "ChatChunk",
    "ChatCompletion",
    "EmbeddingList",
    "ModelEntry",
    "ModelList",
    "TextCompletion",
    "TextCompletionChunk",
    "Timings",
    "TokenEntry",
]

Finish = Literal["stop", "length", "tool_calls"]


class AlternativeEntry(TypedDict):
    """A token that could have come, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(AlternativeEntry):
    """A token that came, and the likeliest ones in its place."""

    top_logprobs: list[AlternativeEntry]


class ContentLogprobs(TypedDict):
    """Log-probabilities of all tokens of a choice."""

    content: list[TokenEntry]
    refusal: None


class Timings(TypedDict):
    """Counts and speeds: milliseconds, tokens per second; `cache_n` tokens of the prompt were not computed again."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int


class PromptDetails(TypedDict):
    """Tokens that were taken from earlier work."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of prompt and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class MadeFunction(TypedDict):
    """The function that is called, and its arguments as JSON."""

    name: str
    arguments: str


class MadeCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class AssistantMessage(TypedDict):
    """The answer; without content if there is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MadeCall]]


class ChatChoice(TypedDict):
    """One answer of possibly several."""

    index: int
    message: AssistantMessage
    logprobs: ContentLogprobs | None
    finish_reason: Finish


class ChatCompletion(TypedDict):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class FunctionPiece(TypedDict):
    """More of a call: its name comes first, alone."""

    name: NotRequired[str]
    arguments: str


class CallPiece(TypedDict):
    """More of the call number `index`; `id` and `type` come with the first piece."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPiece


class ChatDelta(TypedDict):
    """What is new; nothing in the last one of a choice."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]
    tool_calls: NotRequired[list[CallPiece]]


class ChunkChoice(TypedDict):
    """What is new of a choice; `finish_reason` comes with its last piece."""

    index: int
    delta: ChatDelta
    logprobs: ContentLogprobs | None
    finish_reason: Finish | None


class ChatChunk(TypedDict):
    """A piece of a streamed answer; `usage`, if it was asked for, is null in all but the last one."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    timings: NotRequired[Timings]


class ListedLogprobs(TypedDict):
    """Log-probabilities in the older form: lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One continuation of possibly several."""

    index: int
    text: str
    logprobs: ListedLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(TypedDict):
    """Prompts continued."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings


class TextChunkChoice(TypedDict):
    """What is new of a choice."""

    index: int
    text: str
    logprobs: ListedLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletionChunk(TypedDict):
    """A piece of a streamed continuation."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: NotRequired[Usage | None]
    timings: NotRequired[Timings]


class EmbeddingEntry(TypedDict):
    """A vector of length 1: numbers, or float32 in base64, lowest byte first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """Vectors in the order of the inputs."""

    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


class ModelStatus(TypedDict):
    """Whether a model is in memory."""

    value: Literal["loaded", "unloaded"]


class ModelEntry(TypedDict):
    """A model that is served; `meta`, what is known once it is in memory."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["phiquant"]
    status: ModelStatus
    meta: NotRequired[dict[str, Any]]


class ModelList(TypedDict):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelEntry]
