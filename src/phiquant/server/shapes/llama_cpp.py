"""Answers of llama-server's endpoints."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from phiquant.server.shapes.openai import Timings

__all__ = [
    "Applied",
    "Detokenized",
    "Health",
    "LlamaCompletion",
    "LlamaPiece",
    "Props",
    "Slot",
    "Tokenized",
]


class IdAlternative(TypedDict):
    """A token that could have come."""

    id: int
    token: str
    logprob: float
    bytes: list[int]


class IdEntry(IdAlternative):
    """A token that came, and the likeliest ones in its place."""

    top_logprobs: list[IdAlternative]


class UsedSettings(TypedDict):
    """What the completion was made with; the seed gives the same again."""

    seed: int
    n_predict: int
    n_ctx: int


class LlamaCompletion(TypedDict):
    """A prompt continued; the last piece of a stream is the same without the text."""

    index: int
    content: str
    tokens: list[int]
    completion_probabilities: NotRequired[list[IdEntry]]
    model: str
    id_slot: int
    stop: Literal[True]
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    truncated: bool
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    has_new_line: bool
    generation_settings: UsedSettings
    timings: Timings


class LlamaPiece(TypedDict):
    """A piece of a stream."""

    index: int
    content: str
    tokens: list[int]
    completion_probabilities: NotRequired[list[IdEntry]]
    stop: Literal[False]


class TokenPiece(TypedDict):
    """A token with its text, or its bytes where they are no text alone."""

    id: int
    piece: str | list[int]


class Tokenized(TypedDict):
    """Token ids, with their texts if asked."""

    tokens: list[int] | list[TokenPiece]


class Detokenized(TypedDict):
    """A text."""

    content: str


class Applied(TypedDict):
    """The prompt that a conversation becomes."""

    prompt: str


class Health(TypedDict):
    """It answers."""

    status: Literal["ok"]


class DefaultSettings(TypedDict):
    """What a request gets that says nothing."""

    n_ctx: int
    params: dict[str, Any]


class TemplateCaps(TypedDict):
    """What a chat template has a place for."""

    supports_tools: bool


class Modalities(TypedDict):
    """What models take besides text: nothing."""

    vision: Literal[False]
    audio: Literal[False]


class Props(TypedDict):
    """What is served, and how."""

    default_generation_settings: DefaultSettings
    total_slots: int
    model_alias: str
    chat_template: str
    chat_template_caps: TemplateCaps
    bos_token: str
    eos_token: str
    modalities: Modalities
    build_info: str
    is_sleeping: bool


class Slot(TypedDict):
    """A place in the steps of an engine."""

    id: int
    model: str
    n_ctx: int
    is_processing: bool
