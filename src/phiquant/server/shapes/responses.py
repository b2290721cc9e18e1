"""OpenAI's Responses: the object, and the events of its stream."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from phiquant.server.shapes.openai import TokenEntry

__all__ = ["EVENTS", "ResponseObject"]

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """Words."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenEntry]


class OutputMessage(TypedDict):
    """A message of the output."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class OutputCall(TypedDict):
    """A call of a function; arguments are JSON."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


class IncompleteDetails(TypedDict):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class CacheDetails(TypedDict):
    """Tokens that were taken from earlier work."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningDetails(TypedDict):
    """Always none: the models do not think apart from their answers."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens."""

    input_tokens: int
    input_tokens_details: CacheDetails
    output_tokens: int
    output_tokens_details: ReasoningDetails
    total_tokens: int


class ResponseObject(TypedDict):
    """An answer, with what was asked for it; `usage` is null until it has ended."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseTold(TypedDict):
    """The answer as it is now."""

    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete"]
    sequence_number: int
    response: ResponseObject


class ItemTold(TypedDict):
    """An item of the output begins, or has ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage | OutputCall


class PartTold(TypedDict):
    """A part of a message begins, or has ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextPiece(TypedDict):
    """More words."""

    type: Literal["response.output_text.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenEntry]


class TextDone(TypedDict):
    """All words of a part."""

    type: Literal["response.output_text.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenEntry]


class ArgumentsPiece(TypedDict):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(TypedDict):
    """All arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


class ResponseFailed(TypedDict):
    """An error in the midst of a stream."""

    type: Literal["error"]
    sequence_number: int
    code: str | None
    message: str
    param: NotRequired[str | None]


EVENTS = (ResponseTold, ItemTold, PartTold, TextPiece, TextDone, ArgumentsPiece, ArgumentsDone, ResponseFailed)
