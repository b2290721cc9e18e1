"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients speak."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant.completion import Options
from phiquant.server.conversation import (
    MOST_MESSAGES,
    FunctionSpec,
    NamedFunction,
    NamedTool,
    ToolName,
    ToolSpec,
    chat_ids,
    toolbox_of,
)
from phiquant.server.conversation import ToolChoice as OpenAIChoice
from phiquant.server.failures import Failure, body_of, refuse
from phiquant.server.fields import MOST_TOKENS, Body, Name, Number, Stop, Switch, Whole
from phiquant.server.generation import Answer, CallDelta, CallStart, End, Event, TextDelta, Work
from phiquant.server.hosting import Loaded
from phiquant.server.service import Service, new_id
from phiquant.server.shapes import anthropic as shapes
from phiquant.server.shapes.document import answers
from phiquant.server.streaming import event
from phiquant.text.tools import Toolbox

__all__ = ["MessagesBody", "routes"]

_ANSWERS = answers("anthropic", shapes.AnthropicMessage, shapes.EVENTS)
_COUNTS = answers("anthropic", shapes.TokenCount)


class Block(Body):
    """A part of a message: words, a call of a tool, or its result."""

    type: Name
    text: str | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: str | list["Block"] | None = None
    is_error: Switch | None = None


class InputMessage(Body):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=1000)]


class AnthropicTool(Body):
    """A tool; those that Anthropic runs itself are not here."""

    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: Switch | None = None
    type: Name | None = None


class Choice(Body):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: Switch | None = None


class CountBody(Body):
    """A conversation whose tokens are counted."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: Name | None = None
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    thinking: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def toolbox(self, loaded: Loaded) -> Toolbox:
        """The tools. Raises RequestError, Failure."""
        specs = []
        for tool in self.tools or ():
            if tool.type not in (None, "custom"):
                raise refuse(f"there are no tools of type {str(tool.type)[:50]!r} here", "tools")
            specs.append(
                ToolSpec(
                    function=FunctionSpec(
                        name=tool.name,
                        description=tool.description,
                        parameters=tool.input_schema,
                        strict=tool.strict,
                    )
                )
            )
        choice: OpenAIChoice | None = None
        asked = self.tool_choice
        if asked is not None and asked.type == "tool":
            if asked.name is None:
                raise refuse("tool_choice has no name", "tool_choice")
            choice = NamedTool(function=NamedFunction(name=asked.name))
        elif asked is not None:
            choice = {"auto": "auto", "any": "required", "none": "none"}[asked.type]  # type: ignore[assignment]
        parallel = None if asked is None else not asked.disable_parallel_tool_use
        return toolbox_of(loaded, specs, choice, parallel)

    async def ids(self, loaded: Loaded, toolbox: Toolbox) -> list[int]:
        """Token ids of the conversation."""
        thinking = self.thinking or {}
        if thinking.get("type") not in (None, "disabled"):
            raise refuse("thinking: the model does not think apart from its answer; leave it out", "thinking")
        found: list[dict[str, Any]] = []
        system = _words(self.system, "system")
        if system:
            found.append({"role": "system", "content": system})
        for at, message in enumerate(self.messages):
            found += _converted(message, f"messages.{at}")
        return await chat_ids(loaded, found, toolbox)


class MessagesBody(CountBody):
    """A conversation to be continued."""

    max_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)]
    stream: Switch | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=64)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1 << 30)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: str | None = None
    inference_geo: str | None = None

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, TemplateError, Failure."""
        toolbox = self.toolbox(loaded)
        options = Options(max_tokens=self.max_tokens, stop=self.stop_sequences or [])
        options |= self.given(("temperature", "top_k", "top_p"))
        grammar = toolbox.grammar()
        if grammar is not None:
            options["grammar"] = grammar
        return Work([await self.ids(loaded, toolbox)], options, 1, toolbox.reader if toolbox.active else None)


def _words(content: str | Sequence[Block] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for block in content:
        if block.type != "text" or block.text is None:
            raise refuse(f"{where} has a block of type {block.type[:50]!r}; the model takes text alone", where)
    return "\n".join(str(block.text) for block in content)


def _converted(message: InputMessage, where: str) -> list[dict[str, Any]]:
    """A message as OpenAI has it: results of tools are messages of their own, before the words beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, words, calls = [], [], []
    for block in message.content:
        if block.type == "tool_result":
            text = _words(block.content, f"{where}.content")
            text = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": text})
        elif block.type == "tool_use" and message.role == "assistant":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type not in ("thinking", "redacted_thinking"):
            words.append(_words([block], f"{where}.content"))
    found: list[dict[str, Any]] = [*results]
    if words or calls or not results:
        said: dict[str, Any] = {"role": message.role, "content": "\n".join(words)}
        if calls:
            said["tool_calls"] = calls
        found.append(said)
    return found


def _reason(end: End) -> tuple[str, str | None]:
    """Why it ended, and the stop text that did it."""
    if end.finish == "tool_calls":
        return "tool_use", None
    if end.finish == "length":
        return "max_tokens", None
    stop = end.completion.stop
    return ("end_turn", None) if stop is None else ("stop_sequence", stop)


def _usage(end: End) -> dict[str, Any]:
    """Anthropic counts what was taken from the cache apart."""
    usage = end.completion.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def failed(failure: Failure) -> bytes:
    """An error in the midst of a stream."""
    return event(body_of(failure, "anthropic"), "error")


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(tags=["Anthropic"])

    @router.post("/v1/messages", summary="Answer a conversation", responses=_ANSWERS)
    async def messages(body: MessagesBody, request: Request) -> Response:
        model = service.name(body.model)
        head: dict[str, Any] = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        prompt = 0

        async def plan(loaded: Loaded) -> Work:
            nonlocal prompt
            work = await body.plan(loaded)
            prompt = len(work.prompts[0])
            return work

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            answer = answers[0]
            assert answer.end is not None
            content: list[dict[str, Any]] = []
            if answer.text or not answer.calls:
                content.append({"type": "text", "text": answer.text})
            for call in answer.calls:
                content.append({"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": call.parsed})
            reason, stop = _reason(answer.end)
            return {
                **head,
                "content": content,
                "stop_reason": reason,
                "stop_sequence": stop,
                "usage": _usage(answer.end),
            }

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            at, kind = -1, ""

            def started() -> bytes:
                # How many of the prompt's tokens were in the cache is told at the end.
                usage = {"input_tokens": prompt, "output_tokens": 0}
                message = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                return event({"type": "message_start", "message": message}, "message_start")

            def block(content: dict[str, Any]) -> bytes:
                nonlocal at, kind
                end = stopped()
                at, kind = at + 1, content["type"]
                data = {"type": "content_block_start", "index": at, "content_block": content}
                return end + event(data, "content_block_start")

            def stopped() -> bytes:
                return event({"type": "content_block_stop", "index": at}, "content_block_stop") if kind else b""

            def delta(content: dict[str, Any]) -> bytes:
                return event({"type": "content_block_delta", "index": at, "delta": content}, "content_block_delta")

            begun = False
            async for item in found:
                if not begun:
                    begun = True
                    yield started()
                if isinstance(item, TextDelta) and item.text:
                    if kind != "text":
                        yield block({"type": "text", "text": ""})
                    yield delta({"type": "text_delta", "text": item.text})
                elif isinstance(item, CallStart):
                    yield block({"type": "tool_use", "id": new_id("toolu_"), "name": item.name, "input": {}})
                elif isinstance(item, CallDelta):
                    yield delta({"type": "input_json_delta", "partial_json": item.arguments})
                elif isinstance(item, End):
                    yield stopped()
                    reason, stop = _reason(item)
                    ended = {"stop_reason": reason, "stop_sequence": stop}
                    yield event({"type": "message_delta", "delta": ended, "usage": _usage(item)}, "message_delta")
                    yield event({"type": "message_stop"}, "message_stop")

        if body.stream:
            ping = event({"type": "ping"}, "ping")
            return service.stream(request, model, plan, pieces, failed, heartbeat=ping)
        return await service.whole(request, model, plan, whole)

    @router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation", responses=_COUNTS)
    async def count_tokens(body: CountBody, request: Request) -> Response:
        async def work(loaded: Loaded) -> dict[str, Any]:
            return {"input_tokens": len(await body.ids(loaded, body.toolbox(loaded)))}

        return await service.use(request, body.model, work)

    return router
