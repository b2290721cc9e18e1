"""POST /v1/completions: prompts continued as they are."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant.server.failures import refuse
from phiquant.server.fields import Switch, Whole, grammar_of
from phiquant.server.generation import Answer, End, Event, TextDelta, Work
from phiquant.server.hosting import Loaded
from phiquant.server.openai_chat import OpenAISampling, failed, usage_of
from phiquant.server.service import Service, logprob_of, new_id, read_prompt, timings_of, token_text
from phiquant.server.shapes import openai as shapes
from phiquant.server.shapes.document import answers
from phiquant.server.shapes.errors import OpenAIError
from phiquant.server.streaming import DONE, event

__all__ = ["CompletionBody", "Prompts", "Token", "routes"]

_ANSWERS = answers("openai", shapes.TextCompletion, [shapes.TextCompletionChunk, OpenAIError])

Token = Annotated[Whole, Field(ge=0, lt=1 << 31)]
Prompts = str | list[Token] | list[str] | list[list[Token]]


class CompletionBody(OpenAISampling):
    """Prompts to be continued."""

    prompt: Prompts
    best_of: Annotated[Whole, Field(ge=1, le=128)] | None = None
    echo: Switch | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or ids."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return list(prompt) if several else [prompt]

    @property
    def drawn(self) -> int:
        """Texts to compute for each prompt; the best `n` of them are the answer."""
        return max(self.best_of or 1, self.n or 1)

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, Failure."""
        if self.suffix:
            raise refuse("suffix: the models were not trained to fill gaps; leave it out", "suffix")
        if self.echo and self.logprobs is not None:
            raise refuse("echo with logprobs is not offered: prompts have no log-probabilities here", "logprobs")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise refuse("best_of must be at least n", "best_of")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise refuse("best_of cannot be streamed: the best is known at the end", "best_of")
        if len(self.prompts) > 128:
            raise refuse(f"there are {len(self.prompts)} prompts; 128 are the most", "prompt")
        options = self.options(loaded)
        options["max_tokens"] = self.max_tokens or 16  # OpenAI's default
        grammar = grammar_of(self.response_format, self.grammar, self.json_schema)
        if grammar is not None:
            options["grammar"] = grammar
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        elif self.drawn > (self.n or 1):
            options["logprobs"] = 0
        return Work([await read_prompt(loaded, prompt) for prompt in self.prompts], options, self.drawn)

    def chosen(self, answers: list[Answer]) -> list[Answer]:
        """Of each prompt's texts the `n` with the highest mean log-probability."""
        n = self.n or 1
        if self.drawn == n:
            return answers
        found = []
        for first in range(0, len(answers), self.drawn):
            drawn = answers[first : first + self.drawn]
            found += sorted(drawn, key=_mean, reverse=True)[:n]
        return found


def _mean(answer: Answer) -> float:
    return sum(item.logprob for item in answer.logprobs) / max(len(answer.logprobs), 1)


def _logprobs(loaded: Loaded, item: TextDelta | Answer, offset: int) -> dict[str, Any]:
    """The older form: lists side by side; `offset` is where the text begins."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in item.logprobs:
        text = token_text(loaded, entry.token)[0]
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob_of(entry.logprob))
        found["top_logprobs"].append({token_text(loaded, token)[0]: logprob_of(value) for token, value in entry.top})
        found["text_offset"].append(offset)
        offset += len(text)
    return found


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", summary="Continue prompts", responses=_ANSWERS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        model, n = service.name(body.model), body.n or 1
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}

        def echoed(loaded: Loaded, choice: int) -> str:
            prompt = body.prompts[choice // n]
            return "" if not body.echo else prompt if isinstance(prompt, str) else loaded.llm.detokenize(prompt)

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            choices = [
                {
                    "index": at,
                    "text": echoed(loaded, at) + answer.text,
                    "logprobs": None if body.logprobs is None else _logprobs(loaded, answer, 0),
                    "finish_reason": answer.finish,
                }
                for at, answer in enumerate(body.chosen(answers))
            ]
            usage = usage_of(answers, body.drawn)
            return {**head, "choices": choices, "usage": usage, "timings": timings_of(answers[0])}

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            def chunk(at: int, text: str, logprobs: Any, finish: str | None, **more: Any) -> bytes:
                if body.tells_usage:
                    more.setdefault("usage", None)
                choice = {"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}
                return event({**head, "choices": [choice], **more})

            begun: dict[int, int] = {}
            answers = []
            async for item in found:
                at = item.choice
                if at not in begun:
                    begun[at] = 0
                    if body.echo:
                        yield chunk(at, echoed(loaded, at), None, None)
                if isinstance(item, TextDelta) and (item.text or item.logprobs):
                    logprobs = None if body.logprobs is None else _logprobs(loaded, item, begun[at])
                    begun[at] += len(item.text)
                    yield chunk(at, item.text, logprobs, None)
                elif isinstance(item, End):
                    answers.append(Answer(end=item))
                    yield chunk(at, "", None, item.finish, timings=timings_of(answers[-1]))
            if body.tells_usage:
                yield event({**head, "choices": [], "usage": usage_of(answers, n)})
            yield DONE

        if body.stream:
            return service.stream(request, model, body.plan, pieces, failed)
        return await service.whole(request, model, body.plan, whole)

    return router
