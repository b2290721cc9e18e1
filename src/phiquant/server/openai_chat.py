"""POST /v1/chat/completions; the fields are OpenAI's, and llama-server's for samplers and grammars."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant.completion import Options
from phiquant.server.conversation import (
    MOST_MESSAGES,
    ChatMessage,
    ToolChoice,
    ToolSpec,
    chat_ids,
    template_message,
    toolbox_of,
)
from phiquant.server.failures import Failure, body_of
from phiquant.server.fields import (
    MOST_TOKENS,
    Body,
    LlamaSampling,
    Name,
    Number,
    ResponseFormat,
    Stops,
    Switch,
    Whole,
    bias_of,
    grammar_of,
    seed_of,
    stops_of,
)
from phiquant.server.generation import Answer, CallDelta, CallStart, End, Event, TextDelta, Work
from phiquant.server.hosting import Loaded
from phiquant.server.service import Service, new_id, timings_of, token_logprobs
from phiquant.server.shapes import openai as shapes
from phiquant.server.shapes.document import answers
from phiquant.server.shapes.errors import OpenAIError
from phiquant.server.streaming import DONE, event

__all__ = ["ChatBody", "OpenAISampling", "failed", "routes", "usage_of"]

_ANSWERS = answers("openai", shapes.ChatCompletion, [shapes.ChatChunk, OpenAIError])


class StreamOptions(Body):
    """What a stream tells besides."""

    include_usage: Switch | None = None
    include_obfuscation: Switch | None = None


class OpenAISampling(LlamaSampling):
    """What chats and completions share. Fields that change nothing here are accepted, unknown ones are not."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = None
    stream: Switch | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    stop: Stops | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    def options(self, loaded: Loaded) -> Options:
        """The engine's options, without grammar and log-probabilities."""
        options = self.sampling()
        options |= self.given(("temperature", "top_p", "presence_penalty", "frequency_penalty"))
        options["stop"] = stops_of(self.stop)
        options["seed"] = seed_of(self.seed)
        options["max_tokens"] = self.max_tokens
        if self.logit_bias:
            options["logit_bias"] = bias_of(self.logit_bias, loaded.llm.config.vocab_size)
        return options

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(OpenAISampling):
    """A conversation to be continued."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: Switch | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Switch | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Accepted for what they are; there is nothing here that they could change.
    store: Switch | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, TemplateError, Failure."""
        if self.top_logprobs and not self.logprobs:
            raise Failure(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        toolbox = toolbox_of(loaded, self.tools, self.tool_choice, self.parallel_tool_calls)
        messages = [template_message(message, at) for at, message in enumerate(self.messages)]
        options = self.options(loaded)
        options["max_tokens"] = self.max_completion_tokens or self.max_tokens
        grammar = toolbox.grammar(grammar_of(self.response_format, self.grammar, self.json_schema))
        if grammar is not None:
            options["grammar"] = grammar
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        ids = await chat_ids(loaded, messages, toolbox, self.chat_template_kwargs)
        return Work([ids], options, self.n or 1, toolbox.reader if toolbox.active else None)


def usage_of(answers: Sequence[Answer], n: int) -> dict[str, Any]:
    """OpenAI's counts of all choices; `n` of them share a prompt, which counts once."""
    prompts = answers[::n]
    prompt = sum(answer.completion.usage.prompt_tokens for answer in prompts)
    cached = sum(answer.completion.usage.cached_tokens for answer in prompts)
    generated = sum(answer.completion.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def failed(failure: Failure) -> bytes:
    """An error in the midst of a stream, as OpenAI's clients see it."""
    return event(body_of(failure, "openai")) + DONE


def _choice(loaded: Loaded, body: ChatBody, at: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    logprobs = {"content": token_logprobs(loaded, answer.logprobs), "refusal": None} if body.logprobs else None
    return {"index": at, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", summary="Answer a conversation", responses=_ANSWERS)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        model = service.name(body.model)
        head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            return {
                **head,
                "object": "chat.completion",
                "choices": [_choice(loaded, body, at, answer) for at, answer in enumerate(answers)],
                "usage": usage_of(answers, body.n or 1),
                "timings": timings_of(answers[0]),
            }

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
                if body.tells_usage:
                    more.setdefault("usage", None)
                return event({**head, "object": "chat.completion.chunk", "choices": choices, **more})

            def delta(at: int, said: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
                return {"index": at, "delta": said, "logprobs": None, "finish_reason": finish, **more}

            begun, answers = set(), []
            async for item in found:
                at = item.choice
                if at not in begun:
                    begun.add(at)
                    yield chunk([delta(at, {"role": "assistant", "content": "", "refusal": None})])
                if isinstance(item, TextDelta):
                    more: dict[str, Any] = {}
                    if body.logprobs:
                        more["logprobs"] = {"content": token_logprobs(loaded, item.logprobs), "refusal": None}
                    if item.text or (body.logprobs and item.logprobs):
                        yield chunk([delta(at, {"content": item.text}, **more)])
                elif isinstance(item, CallStart):
                    function = {"name": item.name, "arguments": ""}
                    call = {"index": item.call, "id": new_id("call_"), "type": "function", "function": function}
                    yield chunk([delta(at, {"tool_calls": [call]})])
                elif isinstance(item, CallDelta):
                    call = {"index": item.call, "function": {"arguments": item.arguments}}
                    yield chunk([delta(at, {"tool_calls": [call]})])
                elif isinstance(item, End):
                    answers.append(Answer(end=item))
                    yield chunk([delta(at, {}, item.finish)], timings=timings_of(answers[-1]))
            if body.tells_usage:
                yield chunk([], usage=usage_of(answers, body.n or 1))
            yield DONE

        if body.stream:
            return service.stream(request, model, body.plan, pieces, failed)
        return await service.whole(request, model, body.plan, whole)

    return router
