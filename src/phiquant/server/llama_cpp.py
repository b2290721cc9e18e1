"""llama-server's own endpoints: /completion, /tokenize, /detokenize, /apply-template, /props, /slots, /health."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import fields
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant import __version__
from phiquant.completion import Options
from phiquant.engine import Sampling
from phiquant.server.conversation import MOST_MESSAGES, ChatMessage, ToolSpec, template_message, toolbox_of
from phiquant.server.failures import Failure, body_of, refuse
from phiquant.server.fields import (
    MOST_TOKENS,
    Body,
    LlamaSampling,
    Name,
    Number,
    Stop,
    Stops,
    Switch,
    Whole,
    grammar_of,
    seed_of,
    stops_of,
)
from phiquant.server.generation import Answer, End, Event, TextDelta, Work
from phiquant.server.hosting import Loaded
from phiquant.server.openai_completions import Token
from phiquant.server.service import Service, read_prompt, refuse_endless, timings_of, token_logprobs
from phiquant.server.shapes import llama_cpp as shapes
from phiquant.server.shapes.document import answers
from phiquant.server.shapes.errors import LlamaError
from phiquant.server.streaming import Json, event

__all__ = ["LlamaCompletionBody", "routes"]

_ANSWERS = answers("llama", shapes.LlamaCompletion, [shapes.LlamaPiece, shapes.LlamaCompletion, LlamaError])
_KINDS = {"stop": "eos", "length": "limit", "tool_calls": "eos"}
Bias = Annotated[Number, Field(ge=-1e6, le=1e6)] | Literal[False]


class LlamaCompletionBody(LlamaSampling):
    """A prompt to be continued; a list may mix texts and token ids."""

    prompt: str | list[Token | str]
    model: Name | None = None
    stream: Switch | None = None
    n_predict: Annotated[Whole, Field(ge=-1, le=MOST_TOKENS)] | None = None
    max_tokens: Annotated[Whole, Field(ge=-1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[Number, Field(le=1000)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stops | Annotated[list[Stop], Field(max_length=0)] | None = None
    logit_bias: list[tuple[Token | str, Bias]] | dict[str, Bias] | None = None
    n_probs: Annotated[Whole, Field(ge=0, le=100)] | None = None
    return_tokens: Switch | None = None

    @property
    def most(self) -> int | None:
        """Tokens to generate at most; None for as many as fit."""
        asked = self.n_predict if self.n_predict is not None else self.max_tokens
        return None if asked is None or asked < 0 else asked

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, Failure."""
        options = self.sampling()
        options |= self.given(("top_p", "presence_penalty", "frequency_penalty"))
        if self.temperature is not None:
            options["temperature"] = max(self.temperature, 0.0)
        if self.most == 0:
            raise refuse("n_predict is 0; ask for at least one token, or for -1", "n_predict")
        options |= Options(max_tokens=self.most, seed=seed_of(self.seed), stop=stops_of(self.stop))
        bias = await asyncio.to_thread(self._bias, loaded)
        if bias:
            options["logit_bias"] = bias
        if self.n_probs:
            options["logprobs"] = self.n_probs
        grammar = grammar_of(None, self.grammar, self.json_schema)
        if grammar is not None:
            options["grammar"] = grammar
        return Work([await self.ids(loaded)], options)

    async def ids(self, loaded: Loaded) -> list[int]:
        """Token ids of the prompt."""
        if isinstance(self.prompt, str):
            return await read_prompt(loaded, self.prompt)
        texts = [part for part in self.prompt if isinstance(part, str)]
        await asyncio.to_thread(refuse_endless, loaded, texts)
        ids: list[int] = []
        for at, part in enumerate(self.prompt):
            if isinstance(part, int):
                ids.append(part)
            elif at == 0:
                ids += await read_prompt(loaded, part)
            else:
                ids += await asyncio.to_thread(loaded.llm.tokenizer.encode_continuation, part)
        return await read_prompt(loaded, ids)

    def _bias(self, loaded: Loaded) -> dict[int, float]:
        """llama-server's forms: pairs, with false for never, and texts for all of their tokens."""
        given: Any = self.logit_bias or []
        found: dict[int, float] = {}
        for key, value in given.items() if isinstance(given, dict) else given:
            number = float("-inf") if value is False else float(value)
            if isinstance(key, int):
                ids = [key]
            elif isinstance(given, dict) and re.fullmatch("[0-9]{1,9}", key):
                ids = [int(key)]
            else:
                ids = loaded.llm.tokenizer.encode_continuation(key)
            found |= dict.fromkeys(ids, number)
        return found


_DEFAULTS: Final = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in fields(Sampling)
    if field.name in LlamaCompletionBody.model_fields and field.name not in ("seed", "logit_bias")
}
"""What a sampler does that is told nothing, by llama-server's names; the seed is one of chance."""


class TokenizeBody(Body):
    """A text."""

    content: str
    model: Name | None = None
    add_special: Switch = False
    parse_special: Switch = True
    with_pieces: Switch = False


class DetokenizeBody(Body):
    """Token ids."""

    tokens: Annotated[list[Token], Field(max_length=1 << 20)]
    model: Name | None = None


class TemplateBody(Body):
    """A conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: Name | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def failed(failure: Failure) -> bytes:
    """An error in the midst of a stream."""
    return event(body_of(failure, "llama"))


def _ended(body: LlamaCompletionBody, loaded: Loaded, model: str, answer: Answer) -> dict[str, Any]:
    """What the last piece says besides the text."""
    usage, stop = answer.completion.usage, answer.completion.stop
    return {
        "index": 0,
        "model": model,
        "id_slot": -1,
        "stop": True,
        "stop_type": "word" if stop is not None else _KINDS[answer.finish],
        "stopping_word": stop or "",
        "truncated": False,
        "tokens_predicted": usage.completion_tokens,
        "tokens_evaluated": usage.prompt_tokens,
        "tokens_cached": usage.prompt_tokens + usage.completion_tokens,
        "has_new_line": "\n" in answer.completion.text,
        "generation_settings": {
            "seed": answer.completion.seed,
            "n_predict": body.most or -1,
            "n_ctx": loaded.llm.context,
        },
        "timings": timings_of(answer),
    }


def _probabilities(loaded: Loaded, item: TextDelta | Answer) -> list[dict[str, Any]]:
    found = token_logprobs(loaded, item.logprobs)
    for entry, source in zip(found, item.logprobs, strict=True):
        entry["id"] = source.token
        for alternative, (token, _) in zip(entry["top_logprobs"], source.top, strict=True):
            alternative["id"] = token
    return found


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(tags=["llama.cpp"])

    @router.post("/completion", summary="Continue a prompt", responses=_ANSWERS)
    @router.post("/completions", include_in_schema=False)
    async def completion(body: LlamaCompletionBody, request: Request) -> Response:
        model = service.name(body.model)

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            answer = answers[0]
            found = {"content": answer.text, "tokens": list(answer.completion.ids) if body.return_tokens else []}
            if body.n_probs:
                found["completion_probabilities"] = _probabilities(loaded, answer)
            return {**found, **_ended(body, loaded, model, answer)}

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            async for item in found:
                if isinstance(item, TextDelta):
                    tokens = list(item.ids) if body.return_tokens else []
                    data: dict[str, Any] = {"index": 0, "content": item.text, "tokens": tokens, "stop": False}
                    if body.n_probs:
                        data["completion_probabilities"] = _probabilities(loaded, item)
                    yield event(data)
                elif isinstance(item, End):
                    ended = _ended(body, loaded, model, Answer(end=item))
                    yield event({"content": "", "tokens": [], **ended})

        if body.stream:
            return service.stream(request, model, body.plan, pieces, failed)
        return await service.whole(request, model, body.plan, whole)

    @router.post("/tokenize", summary="Token ids of a text", responses=answers("llama", shapes.Tokenized))
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        async def work(loaded: Loaded) -> dict[str, Any]:
            encode = loaded.llm.tokenizer.encode
            add_bos = None if body.add_special else False
            ids = await asyncio.to_thread(encode, body.content, special=body.parse_special, add_bos=add_bos)
            return {"tokens": [_piece(loaded, i) for i in ids] if body.with_pieces else ids}

        return await service.use(request, body.model, work)

    @router.post("/detokenize", summary="Text of token ids", responses=answers("llama", shapes.Detokenized))
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        async def work(loaded: Loaded) -> dict[str, Any]:
            return {"content": await asyncio.to_thread(loaded.llm.tokenizer.decode, body.tokens)}

        return await service.use(request, body.model, work)

    @router.post(
        "/apply-template",
        summary="The prompt that a conversation becomes",
        responses=answers("llama", shapes.Applied),
    )
    async def apply_template(body: TemplateBody, request: Request) -> Response:
        async def work(loaded: Loaded) -> dict[str, Any]:
            toolbox = toolbox_of(loaded, body.tools, None, None)
            messages = [template_message(message, at) for at, message in enumerate(body.messages)]
            template = loaded.llm.tokenizer.chat_template
            if template is None:
                raise refuse("the model has no chat template; give it a plain prompt instead", "messages")

            def render() -> str:
                found, extra = toolbox.arranged(messages)
                return template.render(found, **{**(body.chat_template_kwargs or {}), **extra})

            return {"prompt": await asyncio.to_thread(render)}

        return await service.use(request, body.model, work)

    @router.get(
        "/health",
        summary="Whether the server is ready",
        responses=answers("llama", shapes.Health, post=False, model=False),
    )
    @router.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/props", summary="What is served, and how", responses=answers("llama", shapes.Props, post=False))
    async def props(request: Request, model: str | None = None) -> Response:
        async def work(loaded: Loaded) -> dict[str, Any]:
            llm, hosted = loaded.llm, service.hosting.find(model)
            template = llm.tokenizer.chat_template
            return {
                "default_generation_settings": {
                    "n_ctx": llm.context,
                    "params": {"n_predict": -1, "seed": -1, **_DEFAULTS},
                },
                "total_slots": hosted.model.parallel,
                "model_alias": hosted.model.name,
                "chat_template": "" if template is None else template.source,
                "chat_template_caps": {"supports_tools": template is not None and template.takes_tools},
                "bos_token": _text_of(loaded, llm.tokenizer.bos_id),
                "eos_token": _text_of(loaded, llm.tokenizer.eos_id),
                "modalities": {"vision": False, "audio": False},
                "build_info": f"phiquant {__version__}",
                "is_sleeping": False,
            }

        return await service.use(request, model, work)

    if service.settings.slots:

        @router.get(
            "/slots",
            summary="What the engines are doing",
            responses=answers("llama", list[shapes.Slot], post=False, model=False),
        )
        async def slots() -> Response:
            found: list[dict[str, Any]] = []
            for hosted in service.hosting.hosted.values():
                stats = None if hosted.loaded is None else hosted.loaded.engine.stats()
                running = 0 if stats is None else stats.running
                context = 0 if hosted.loaded is None else hosted.loaded.llm.context
                for number in range(hosted.model.parallel if hosted.loaded is not None else 0):
                    found.append(
                        {
                            "id": len(found),
                            "model": hosted.model.name,
                            "n_ctx": context,
                            "is_processing": number < running,
                        }
                    )
            return Json(found)

    return router


def _piece(loaded: Loaded, token: int) -> dict[str, Any]:
    data = loaded.llm.tokenizer.token_bytes(token)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


def _text_of(loaded: Loaded, token: int | None) -> str:
    return "" if token is None else loaded.llm.tokenizer.decode([token], skip_special=False)
