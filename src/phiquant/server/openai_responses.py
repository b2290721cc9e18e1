"""POST /v1/responses: OpenAI's newer form of a chat. Nothing is stored, so a conversation is sent whole every time."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant.server.conversation import (
    MOST_MESSAGES,
    CalledFunction,
    CallSpec,
    ChatMessage,
    FunctionSpec,
    NamedFunction,
    NamedTool,
    Part,
    ToolChoice,
    ToolSpec,
    chat_ids,
    plain_text,
    template_message,
    toolbox_of,
)
from phiquant.server.failures import Failure, refuse
from phiquant.server.fields import (
    MOST_TOKENS,
    Body,
    JsonSchema,
    Name,
    Number,
    ResponseFormat,
    Switch,
    Whole,
    grammar_of,
)
from phiquant.server.generation import Answer, Call, CallDelta, CallStart, End, Event, TextDelta, Work
from phiquant.server.hosting import Loaded
from phiquant.server.service import Service, new_id, token_logprobs
from phiquant.server.shapes import responses as shapes
from phiquant.server.shapes.document import answers
from phiquant.server.streaming import event

__all__ = ["ResponseBody", "routes"]

_ANSWERS = answers("openai", shapes.ResponseObject, shapes.EVENTS)
_LOGPROBS = "message.output_text.logprobs"


class Item(Body):
    """A message, a call of a function, or its result."""

    type: Name = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[Part], Field(max_length=1000)] | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], Field(max_length=1000)] | None = None


class FunctionTool(FunctionSpec):
    """A function, without the wrapper that it has in chats."""

    type: Literal["function"]


class NamedChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(JsonSchema):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Body):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseBody(Body):
    """A conversation to be continued."""

    model_config = ConfigDict(extra="forbid")

    input: str | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: Name | None = None
    instructions: str | None = None
    stream: Switch | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: Switch | None = None
    text: TextOptions | None = None
    include: list[Name] | None = None
    previous_response_id: Name | None = None
    conversation: Any | None = None
    background: Switch | None = None
    # Accepted for what they are; there is nothing here that they could change.
    store: Switch | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: Whole | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def messages(self) -> list[ChatMessage]:
        """The conversation as chats have it. Failure 400 for items that only a store could explain."""
        found: list[ChatMessage] = []
        if self.instructions:
            found.append(ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*found, ChatMessage(role="user", content=self.input)]
        for at, item in enumerate(self.input):
            if item.type == "message" and item.role is not None:
                text = plain_text(item.content, f"input.{at}.content")
                found.append(ChatMessage(role=item.role, content=text or ""))
            elif item.type == "function_call" and item.name:
                function = CalledFunction(name=item.name, arguments=item.arguments or "{}")
                call = CallSpec(id=item.call_id or "", function=function)
                last = found[-1] if found else None
                if last is not None and last.role == "assistant":
                    last.tool_calls = [*(last.tool_calls or []), call]
                else:
                    found.append(ChatMessage(role="assistant", tool_calls=[call]))
            elif item.type == "function_call_output":
                text = plain_text(item.output, f"input.{at}.output")
                found.append(ChatMessage(role="tool", content=text or "", tool_call_id=item.call_id))
            elif item.type != "reasoning":
                raise refuse(
                    f"input.{at} is of type {item.type[:50]!r}, which is not served, or incomplete", f"input.{at}"
                )
        return found

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, TemplateError, Failure."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise refuse(f"{name}: nothing is stored here; send the conversation whole", name)
        choice: ToolChoice | None
        if isinstance(self.tool_choice, NamedChoice):
            choice = NamedTool(function=NamedFunction(name=self.tool_choice.name))
        else:
            choice = self.tool_choice
        specs = [ToolSpec(function=FunctionSpec(**tool.model_dump(exclude={"type"}))) for tool in self.tools or ()]
        toolbox = toolbox_of(loaded, specs, choice, self.parallel_tool_calls)
        options: Any = {"max_tokens": self.max_output_tokens}
        options |= self.given(("temperature", "top_p"))
        form = self.text.format if self.text is not None else None
        asked = None
        if form is not None:
            schema = JsonSchema(name=form.name, schema=form.schema_) if form.type == "json_schema" else None
            asked = ResponseFormat(type=form.type, json_schema=schema)
        grammar = toolbox.grammar(grammar_of(asked, None, None))
        if grammar is not None:
            options["grammar"] = grammar
        if self.wants_logprobs:
            options["logprobs"] = self.top_logprobs or 0
        messages = [template_message(message, at) for at, message in enumerate(self.messages())]
        ids = await chat_ids(loaded, messages, toolbox)
        return Work([ids], options, 1, toolbox.reader if toolbox.active else None)


class _Form:
    """The response object, as it is at any time."""

    def __init__(self, body: ResponseBody, model: str) -> None:
        self._body, self._model = body, model
        self.id, self._created = new_id("resp_"), int(time.time())

    def response(self, status: str, output: Sequence[dict[str, Any]], end: End | None = None) -> dict[str, Any]:
        """It with its output so far."""
        body = self._body
        form: dict[str, Any] = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            form = body.text.format.model_dump(by_alias=True, exclude_none=True)
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedChoice) else body.tool_choice
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": form},
            "tool_choice": choice or "auto",
            "tools": [
                {**tool.model_dump(), "parameters": tool.parameters or {}, "strict": bool(tool.strict)}
                for tool in body.tools or ()
            ],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if end is None else _usage(end),
            "user": body.user,
        }


def _usage(end: End) -> dict[str, Any]:
    usage = end.completion.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _text_part(text: str, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _message(id_: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": id_, "type": "message", "role": "assistant", "status": status, "content": content}


def _function(id_: str, call_id: str, call: Call, status: str) -> dict[str, Any]:
    found = {"id": id_, "type": "function_call", "call_id": call_id, "name": call.name, "arguments": call.arguments}
    return {**found, "status": status}


def _status(end: End) -> str:
    return "incomplete" if end.finish == "length" else "completed"


class _Pieces:
    """The events of a stream: each item of the output is added, grows, and is done before the next."""

    def __init__(self, form: _Form, loaded: Loaded, body: ResponseBody) -> None:
        self._form, self._loaded, self._body = form, loaded, body
        self._number = -1
        self._output: list[dict[str, Any]] = []
        self._text: tuple[str, list[str], list[dict[str, Any]]] | None = None  # id, pieces, log-probabilities
        self._call: tuple[str, str, Call] | None = None  # id, call's id, and the call

    def event(self, kind: str, **data: Any) -> bytes:
        """One event, numbered."""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **data}, kind)

    def begin(self) -> bytes:
        """The first two."""
        response = self._form.response("in_progress", [])
        return self.event("response.created", response=response) + self.event("response.in_progress", response=response)

    def take(self, item: Event) -> bytes:
        """What a step of the generation becomes."""
        if isinstance(item, TextDelta):
            return self._words(item) if item.text or item.logprobs else b""
        if isinstance(item, CallStart):
            return self._called(item)
        if isinstance(item, CallDelta):
            assert self._call is not None
            id_, _, call = self._call
            call.arguments += item.arguments
            where = {"item_id": id_, "output_index": len(self._output)}
            return self.event("response.function_call_arguments.delta", **where, delta=item.arguments)
        assert isinstance(item, End)
        nothing = self._text is None and self._call is None and not self._output
        found = self._words(TextDelta(item.choice, "")) if nothing else b""
        status = _status(item)
        found += self._close(status)
        return found + self.event(f"response.{status}", response=self._form.response(status, self._output, item))

    def _words(self, item: TextDelta) -> bytes:
        found = b""
        at = {"output_index": len(self._output)}
        if self._text is None:
            found = self._close("completed")
            at = {"output_index": len(self._output)}
            self._text = (new_id("msg_"), [], [])
            message = _message(self._text[0], "in_progress", [])
            found += self.event("response.output_item.added", **at, item=message)
            part = {"item_id": self._text[0], **at, "content_index": 0, "part": _text_part("", None)}
            found += self.event("response.content_part.added", **part)
        id_, pieces, known = self._text
        logprobs = token_logprobs(self._loaded, item.logprobs) if self._body.wants_logprobs else []
        pieces.append(item.text)
        known += logprobs
        where = {"item_id": id_, **at, "content_index": 0}
        return found + self.event("response.output_text.delta", **where, delta=item.text, logprobs=logprobs)

    def _called(self, item: CallStart) -> bytes:
        found = self._close("completed")
        self._call = (new_id("fc_"), new_id("call_"), Call(item.name))
        added = _function(*self._call, "in_progress")
        return found + self.event("response.output_item.added", output_index=len(self._output), item=added)

    def _close(self, status: str) -> bytes:
        """End the item that is open, if one is."""
        at = {"output_index": len(self._output)}
        if self._text is not None:
            id_, pieces, logprobs = self._text
            text, where = "".join(pieces), {"item_id": id_, **at, "content_index": 0}
            part = _text_part(text, logprobs)
            found = self.event("response.output_text.done", **where, text=text, logprobs=logprobs)
            found += self.event("response.content_part.done", **where, part=part)
            whole = _message(id_, status, [part])
        elif self._call is not None:
            id_, _, call = self._call
            where = {"item_id": id_, **at, "arguments": call.arguments}
            found = self.event("response.function_call_arguments.done", **where, name=call.name)
            whole = _function(*self._call, status)
        else:
            return b""
        found += self.event("response.output_item.done", **at, item=whole)
        self._output.append(whole)
        self._text = self._call = None
        return found


def failed(failure: Failure) -> bytes:
    """An error in the midst of a stream."""
    data = {"type": "error", "code": failure.code, "message": failure.message, "param": failure.param}
    return event({**data, "sequence_number": 0}, "error")


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/responses", summary="Answer a conversation", responses=_ANSWERS)
    async def responses(body: ResponseBody, request: Request) -> Response:
        model = service.name(body.model)
        form = _Form(body, model)

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            answer = answers[0]
            assert answer.end is not None
            status = _status(answer.end)
            output = []
            if answer.text or not answer.calls:
                logprobs = token_logprobs(loaded, answer.logprobs) if body.wants_logprobs else None
                output.append(_message(new_id("msg_"), status, [_text_part(answer.text, logprobs)]))
            output += [_function(new_id("fc_"), new_id("call_"), call, status) for call in answer.calls]
            return form.response(status, output, answer.end)

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            written = _Pieces(form, loaded, body)
            begun = False
            async for item in found:
                if not begun:
                    begun = True
                    yield written.begin()
                piece = written.take(item)
                if piece:
                    yield piece

        if body.stream:
            return service.stream(request, model, body.plan, pieces, failed)
        return await service.whole(request, model, body.plan, whole)

    return router
