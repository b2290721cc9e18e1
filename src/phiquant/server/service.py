"""What the families of endpoints share: which model answers, as a whole or in pieces, and what is counted of it."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from phiquant.engine import TokenLogprob
from phiquant.errors import ContextError
from phiquant.server.failures import Failure
from phiquant.server.generation import Answer, Event, Work, collect, events
from phiquant.server.hosting import Hosting, Loaded
from phiquant.server.settings import Settings
from phiquant.server.streaming import Json, Stream, attended, record_of

__all__ = [
    "Service",
    "logprob_of",
    "new_id",
    "read_prompt",
    "refuse_endless",
    "timings_of",
    "token_logprobs",
    "token_text",
]

Plan = Callable[[Loaded], Awaitable[Work]]
Pieces = Callable[[Loaded, AsyncIterator[Event]], AsyncGenerator[bytes, None]]


class Service:
    """The models and the settings of a server, as its endpoints use them."""

    def __init__(self, settings: Settings, hosting: Hosting) -> None:
        self.settings, self.hosting = settings, hosting

    def name(self, model: str | None) -> str:
        """The configured name of a model; Failure 404 if there is none."""
        return self.hosting.find(model).model.name

    async def whole(
        self, request: Request, model: str | None, plan: Plan, form: Callable[[Loaded, list[Answer]], Any]
    ) -> Response:
        """Compute what `plan` says and answer it in one piece; `form` makes JSON of it."""

        async def work() -> Any:
            record = record_of(request)
            async with self.hosting.lease(model) as loaded:
                record.model = self.name(model)
                return form(loaded, await collect(loaded, await plan(loaded), record))

        return Json(await attended(request, work()))

    def stream(
        self,
        request: Request,
        model: str | None,
        plan: Plan,
        pieces: Pieces,
        failed: Callable[[Failure], bytes],
        **how: Any,
    ) -> Response:
        """The same, answered as it comes; `pieces` makes bytes of events."""

        async def work() -> AsyncGenerator[bytes, None]:
            record = record_of(request)
            async with self.hosting.lease(model) as loaded:
                record.model = self.name(model)
                found = events(loaded, await plan(loaded), record)
                async with aclosing(found), aclosing(pieces(loaded, found)) as encoded:
                    async for piece in encoded:
                        yield piece

        return Stream(work(), failed, limit=self.settings.client_timeout, **how)

    async def use(self, request: Request, model: str | None, work: Callable[[Loaded], Awaitable[Any]]) -> Response:
        """Answer something that is not generated."""

        async def done() -> Any:
            async with self.hosting.lease(model) as loaded:
                record_of(request).model = self.name(model)
                return await work(loaded)

        return Json(await attended(request, done()))


def new_id(prefix: str) -> str:
    """An identifier that nobody guesses."""
    return prefix + secrets.token_hex(12)


def token_text(loaded: Loaded, token: int) -> tuple[str, list[int]]:
    """A token's text, and its bytes, which may be a part of a character."""
    data = loaded.llm.tokenizer.token_bytes(token)
    return data.decode("utf-8", "replace"), list(data)


def logprob_of(value: float) -> float:
    """A log-probability that JSON can express; OpenAI's number for those too small to tell."""
    return max(value, -9999.0)


def token_logprobs(loaded: Loaded, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """As OpenAI's chats tell them, and Ollama."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(loaded, token)
        return {"token": text, "logprob": logprob_of(logprob), "bytes": data}

    return [
        {**one(item.token, item.logprob), "top_logprobs": [one(token, value) for token, value in item.top]}
        for item in logprobs
    ]


def timings_of(answer: Answer) -> dict[str, float | int]:
    """Speeds by llama-server's names; milliseconds, tokens per second."""
    usage, timings = answer.completion.usage, answer.completion.timings
    fresh = usage.prompt_tokens - usage.cached_tokens
    prompt, decode = timings.prompt_seconds * 1e3, timings.decode_seconds * 1e3
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": prompt,
        "prompt_per_token_ms": prompt / fresh if fresh else 0.0,
        "prompt_per_second": timings.prompt_per_second,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": decode,
        "predicted_per_token_ms": decode / usage.completion_tokens if usage.completion_tokens else 0.0,
        "predicted_per_second": timings.decode_per_second,
        "draft_n": timings.drafted,
        "draft_n_accepted": timings.accepted,
    }


def refuse_endless(loaded: Loaded, texts: Iterable[str]) -> None:
    """ContextError for texts that cannot fit, whatever their tokens: it would take seconds to learn their number.

    Space is not counted, since there are tokens that swallow it. Takes a while, too: not for the event loop.
    """
    least = sum(len("".join(text.split())) for text in texts) // loaded.longest_token
    if least > loaded.llm.context:
        raise ContextError(
            f"a prompt of at least {least} tokens does not fit the context of {loaded.llm.context}; shorten it"
        )


async def read_prompt(loaded: Loaded, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; a long text takes a while, so outside the event loop."""

    def read() -> list[int]:
        if isinstance(prompt, str):
            refuse_endless(loaded, [prompt])
        return loaded.llm.requests.ids(prompt)

    ids = await asyncio.to_thread(read)
    if not ids:
        raise Failure(400, "the prompt is empty; give at least one token", "prompt")
    return ids
