"""Results as llama-cpp-python has them: dictionaries with OpenAI's keys."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from phiquant.compat.llama_cpp.llama_types import (
    ChatCompletionLogprobs,
    CompletionLogprobs,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    CreateCompletionResponse,
)
from phiquant.compat.llama_cpp.pieces import Mark

__all__ = ["Envelope", "called", "called_chunks", "chat", "chat_chunks", "completion_logprobs"]


@dataclass(frozen=True)
class Envelope:
    """What all results of a completion have in common; `model` is its name."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(
        self, text: str, logprobs: CompletionLogprobs | None = None, finish: Any = None
    ) -> CreateCompletionResponse:
        """A result, without its usage."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish}],
        }

    def whole(
        self, text: str, logprobs: CompletionLogprobs | None, finish: str, prompt: int, generated: int
    ) -> CreateCompletionResponse:
        """A result with its usage, in tokens."""
        return {
            **self.chunk(text, logprobs, finish),
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "total_tokens": prompt + generated,
            },
        }


def completion_logprobs(marks: Iterable[Mark], base: int, text_of: Callable[[int], str]) -> CompletionLogprobs:
    """Of tokens; `base` is where the text begins that their offsets count from. One without figures has None."""
    logprobs: CompletionLogprobs = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for mark in marks:
        text, found = text_of(mark.token), mark.found
        logprobs["tokens"].append(text)
        logprobs["text_offset"].append(base + mark.offset)
        logprobs["token_logprobs"].append(None if found is None else found.logprob)
        top: dict[str, float] = {}
        if found is not None:
            for token, logprob in found.top:
                top.setdefault(text_of(token), logprob)  # the likeliest of those with the same text
            top[text] = found.logprob
        logprobs["top_logprobs"].append(None if found is None else top)
    return logprobs


def _chat_logprobs(logprobs: CompletionLogprobs | None) -> ChatCompletionLogprobs | None:
    if logprobs is None:
        return None
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return {
        "content": [
            {
                "token": token,
                "bytes": None,
                "logprob": logprob,
                "top_logprobs": [
                    {"token": text, "logprob": value, "bytes": None} for text, value in (top or {}).items()
                ],
            }
            for token, logprob, top in columns
        ],
        "refusal": None,
    }


def chat(completion: CreateCompletionResponse) -> CreateChatCompletionResponse:
    """A completion as an answer."""
    choice = completion["choices"][0]
    return {
        "id": "chat" + completion["id"],
        "object": "chat.completion",
        "created": completion["created"],
        "model": completion["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": choice["text"]},
                "logprobs": _chat_logprobs(choice["logprobs"]),
                "finish_reason": choice["finish_reason"],
            }
        ],
        "usage": completion["usage"],
    }


def _chat_chunk(
    chunk: CreateCompletionResponse, delta: dict[str, Any], logprobs: ChatCompletionLogprobs | None, finish: Any
) -> CreateChatCompletionStreamResponse:
    return {
        "id": "chat" + chunk["id"],
        "model": chunk["model"],
        "created": chunk["created"],
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
    }


def chat_chunks(chunks: Iterable[CreateCompletionResponse]) -> Iterator[CreateChatCompletionStreamResponse]:
    """A stream of a completion as that of an answer: first who speaks, then what, then why it ended."""
    for i, chunk in enumerate(chunks):
        choice = chunk["choices"][0]
        if i == 0:
            yield _chat_chunk(chunk, {"role": "assistant"}, None, None)
        finish = choice["finish_reason"]
        delta = {"content": choice["text"]} if finish is None else {}
        yield _chat_chunk(chunk, delta, _chat_logprobs(choice["logprobs"]), finish)


def _call(name: str, arguments: str, id: str) -> dict[str, Any]:
    return {"id": f"call__0_{name}_{id}", "type": "function", "function": {"name": name, "arguments": arguments}}


def called(name: str, completion: CreateCompletionResponse) -> CreateChatCompletionResponse:
    """A completion that is the arguments of a function, as a call of it: in the new form and in the old."""
    answer = chat(completion)
    choice, arguments = answer["choices"][0], completion["choices"][0]["text"]
    choice["message"] = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": name, "arguments": arguments},
        "tool_calls": [_call(name, arguments, completion["id"])],
    }
    choice["finish_reason"] = "tool_calls"
    return answer


def called_chunks(
    name: str, chunks: Iterable[CreateCompletionResponse]
) -> Iterator[CreateChatCompletionStreamResponse]:
    """The same as a stream."""
    nothing: dict[str, Any] = {"role": None, "content": None, "function_call": None, "tool_calls": None}
    begun = False
    for chunk in chunks:
        choice = chunk["choices"][0]
        if not begun:
            begun = True
            yield _chat_chunk(chunk, {**nothing, "role": "assistant"}, None, None)
        if choice["finish_reason"] is not None:
            yield _chat_chunk(chunk, nothing, None, "tool_calls")
            continue
        arguments = choice["text"]
        delta = {
            **nothing,
            "function_call": {"name": name, "arguments": arguments},
            "tool_calls": [{"index": 0, **_call(name, arguments, chunk["id"])}],
        }
        yield _chat_chunk(chunk, delta, _chat_logprobs(choice["logprobs"]), None)
