"""Messages, as Anthropic has them, and the events of their stream."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from phiquant.server.shapes.errors import AnthropicError

__all__ = ["EVENTS", "AnthropicMessage", "TokenCount"]

Reason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(TypedDict):
    """Words."""

    type: Literal["text"]
    text: str


class ToolUseBlock(TypedDict):
    """A call of a tool; in a stream its input comes afterwards, as JSON in pieces."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(TypedDict):
    """Tokens; those of the prompt that were taken from earlier work are counted apart, once the answer has ended."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: NotRequired[int]
    cache_read_input_tokens: NotRequired[int]


class AnthropicMessage(TypedDict):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: Reason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(TypedDict):
    """Tokens of a conversation."""

    input_tokens: int


class MessageStart(TypedDict):
    """The answer, still empty."""

    type: Literal["message_start"]
    message: AnthropicMessage


class Ping(TypedDict):
    """A sign of life while the prompt is computed."""

    type: Literal["ping"]


class BlockStart(TypedDict):
    """A block begins, empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: TextBlock | ToolUseBlock


class WordsDelta(TypedDict):
    """More words."""

    type: Literal["text_delta"]
    text: str


class InputDelta(TypedDict):
    """More of a call's input, which is JSON."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(TypedDict):
    """More of a block."""

    type: Literal["content_block_delta"]
    index: int
    delta: WordsDelta | InputDelta


class BlockStop(TypedDict):
    """A block has ended."""

    type: Literal["content_block_stop"]
    index: int


class Ended(TypedDict):
    """Why the answer ended."""

    stop_reason: Reason
    stop_sequence: str | None


class MessageDelta(TypedDict):
    """How the answer ended."""

    type: Literal["message_delta"]
    delta: Ended
    usage: AnthropicUsage


class MessageStop(TypedDict):
    """Nothing more comes."""

    type: Literal["message_stop"]


EVENTS = (MessageStart, Ping, BlockStart, BlockDelta, BlockStop, MessageDelta, MessageStop, AnthropicError)
