"""Messages and tools as OpenAI's clients send them, which the other families' are turned into."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from phiquant.server.failures import refuse
from phiquant.server.fields import Body, Name, Switch
from phiquant.server.hosting import Loaded
from phiquant.server.service import refuse_endless
from phiquant.text.tools import Tool, Toolbox

__all__ = [
    "MOST_MESSAGES",
    "CallSpec",
    "CalledFunction",
    "ChatMessage",
    "FunctionSpec",
    "NamedFunction",
    "NamedTool",
    "Part",
    "ToolChoice",
    "ToolName",
    "ToolSpec",
    "chat_ids",
    "plain_text",
    "template_message",
    "toolbox_of",
]

MOST_MESSAGES: Final = 10_000

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class Part(Body):
    """A part of a message; text is the only kind that Phi's language models take."""

    type: Name
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    """A function's name, and its arguments as JSON."""

    name: Name
    arguments: str | dict[str, Any] = "{}"


class CallSpec(Body):
    """A call that the assistant has made."""

    id: Name = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(max_length=1000)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[CallSpec], Field(max_length=1000)] | None = None
    tool_call_id: Name | None = None


class FunctionSpec(Body):
    """A function that may be called."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Switch | None = None


class ToolSpec(Body):
    """A tool; functions are the only kind there is here."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def plain_text(content: str | Sequence[Part] | None, where: str) -> str | None:
    """A message's text. Failure 400 for pictures and sounds."""
    if content is None or isinstance(content, str):
        return content
    pieces = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            raise refuse(f"{where} has a part of type {part.type[:50]!r}; the model takes text alone", where)
        pieces.append(text)
    return "\n".join(pieces)


def template_message(message: ChatMessage, at: int) -> dict[str, Any]:
    """A message as chat templates know it."""
    text = plain_text(message.content, f"messages.{at}.content")
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": text}
    if message.tool_calls and role == "assistant":
        found["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    elif text is None:
        if role != "assistant":
            raise refuse(f"messages.{at} has no content", f"messages.{at}.content")
        found["content"] = ""
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def toolbox_of(
    loaded: Loaded, tools: Sequence[ToolSpec] | None, choice: ToolChoice | None, parallel: bool | None
) -> Toolbox:
    """The tools of a request. Raises RequestError."""
    named = choice.function.name if isinstance(choice, NamedTool) else None
    mode: Any = "required" if named is not None else choice or "auto"
    specs = [tool.function for tool in tools or ()]
    made = [Tool(s.name, s.description or "", s.parameters or {}, bool(s.strict)) for s in specs]
    return Toolbox(made, loaded.llm.tokenizer.chat_template, mode=mode, name=named, parallel=parallel is not False)


async def chat_ids(
    loaded: Loaded,
    messages: Sequence[Mapping[str, Any]],
    toolbox: Toolbox,
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation with its tools, by the model's template; outside the event loop."""
    if not messages:
        raise refuse("messages is empty; there is nothing to answer", "messages")

    def read() -> list[int]:
        refuse_endless(loaded, (str(message.get("content") or "") for message in messages))
        found, extra = toolbox.arranged(messages)
        return loaded.llm.requests.chat_ids(found, extra.get("tools"), arguments)

    return await asyncio.to_thread(read)
