"""Ollama's /api/chat, generate, embed, tags, show, ps and version; answers are streamed unless told otherwise."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant import __version__
from phiquant.completion import Options
from phiquant.server.conversation import MOST_MESSAGES, ToolSpec, chat_ids, toolbox_of
from phiquant.server.describe import Description, describe
from phiquant.server.failures import Failure, body_of, refuse
from phiquant.server.fields import MOST_TOKENS, Body, Name, Number, Stops, Switch, Whole, grammar_of, seed_of, stops_of
from phiquant.server.generation import Answer, Call, CallDelta, CallStart, End, Event, TextDelta, Work
from phiquant.server.hosting import Hosted, Loaded
from phiquant.server.openai_embeddings import embedded
from phiquant.server.service import Service, read_prompt, token_logprobs
from phiquant.server.shapes import ollama as shapes
from phiquant.server.shapes.document import LINES, answers
from phiquant.server.shapes.errors import OllamaError
from phiquant.server.streaming import Json, line, record_of
from phiquant.text.grammar import Grammar
from phiquant.text.tools import Toolbox

__all__ = ["GenerateBody", "OllamaChatBody", "routes"]


class OllamaOptions(Body):
    """What a sampler is told; options about memory and threads change nothing here."""

    num_predict: Annotated[Whole, Field(ge=-2, le=MOST_TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1000)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1 << 30)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_last_n: Annotated[Whole, Field(ge=-1, le=1 << 30)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-100, le=100)] | None = None
    mirostat: Annotated[Whole, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[Number, Field(gt=0, le=1000)] | None = None
    mirostat_eta: Annotated[Number, Field(gt=0, le=1000)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Stops | None = None


class OllamaBody(Body):
    """What chats and prompts share."""

    model: Name
    stream: Switch | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: Number | Name | None = None
    think: Switch | Name | None = None
    logprobs: Switch | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    def sampling(self, toolbox: Toolbox | None) -> Options:
        """The engine's options. Raises RequestError, Failure."""
        asked = self.options or OllamaOptions()
        given = asked.given(set(OllamaOptions.model_fields) - {"num_predict", "seed", "stop"})
        most = asked.num_predict
        if most == 0:
            raise refuse("num_predict is 0; ask for at least one token, or for -1")
        given["max_tokens"] = None if most is None or most < 0 else most
        given["seed"], given["stop"] = seed_of(asked.seed), stops_of(asked.stop)
        answer: Grammar | None = None
        if self.format == "json":
            answer = Grammar.json()
        elif isinstance(self.format, dict):
            answer = grammar_of(None, None, self.format)
        grammar = toolbox.grammar(answer) if toolbox is not None else answer
        if grammar is not None:
            given["grammar"] = grammar
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        if self.think not in (None, False):
            raise refuse("think: the model does not think apart from its answer; leave it out")
        options: Options = given
        return options

    @property
    def unloads(self) -> bool:
        """Whether the model is not to stay: keep_alive of 0, with or without a unit."""
        return self.keep_alive is not None and str(self.keep_alive).strip().rstrip("smh") in ("0", "0.0")


class OllamaFunction(Body):
    """A called function; its arguments are an object."""

    name: Name
    arguments: dict[str, Any] | str = Field(default_factory=dict)


class OllamaCall(Body):
    """A call that the assistant has made."""

    id: Name = ""
    function: OllamaFunction


class OllamaMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=1000)] | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None


class OllamaChatBody(OllamaBody):
    """A conversation to be continued."""

    messages: Annotated[list[OllamaMessage], Field(default_factory=list, max_length=MOST_MESSAGES)]
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, TemplateError, Failure."""
        toolbox = toolbox_of(loaded, self.tools, None, None)
        found: list[dict[str, Any]] = []
        for message in self.messages:
            if message.images:
                raise refuse("images: the model takes text alone")
            role = "system" if message.role == "developer" else message.role
            said: dict[str, Any] = {"role": role, "content": message.content or ""}
            if message.tool_calls and role == "assistant":
                said["tool_calls"] = [{"type": "function", **call.model_dump()} for call in message.tool_calls]
            if message.tool_name is not None:
                said["name"] = message.tool_name
            if message.tool_call_id is not None:
                said["tool_call_id"] = message.tool_call_id
            found.append(said)
        options = self.sampling(toolbox)
        ids = await chat_ids(loaded, found, toolbox)
        return Work([ids], options, 1, toolbox.reader if toolbox.active else None)


class GenerateBody(OllamaBody):
    """A prompt, which becomes a conversation if the model has a template, unless it is `raw`."""

    prompt: str | None = None
    system: str | None = None
    raw: Switch | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[Any] | None = None
    images: list[Any] | None = None

    async def plan(self, loaded: Loaded) -> Work:
        """What is to be computed. Raises RequestError, TemplateError, Failure."""
        for name in ("suffix", "template", "context", "images"):
            if getattr(self, name):
                raise refuse(f"{name} is not served here; leave it out")
        options = self.sampling(None)
        if self.raw or loaded.llm.tokenizer.chat_template is None:
            prompt = self.prompt or ""
            if self.system:
                prompt = f"{self.system}\n\n{prompt}"
            return Work([await read_prompt(loaded, prompt)], options)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt or ""})
        return Work([await chat_ids(loaded, messages, toolbox_of(loaded, None, None, None))], options)


class EmbedBody(Body):
    """Texts whose meaning is asked for."""

    model: Name
    input: str | list[str]
    truncate: Switch | None = None
    dimensions: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    keep_alive: Number | Name | None = None


class ShowBody(Body):
    """A model's name."""

    model: Name | None = None
    name: Name | None = None
    verbose: Switch | None = None


def failed(failure: Failure) -> bytes:
    """An error in the midst of a stream."""
    return line(body_of(failure, "ollama"))


def _moment(seconds: float | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _details(found: Description) -> dict[str, Any]:
    size = found.parameters
    text = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": found.architecture,
        "families": [found.architecture],
        "parameter_size": text,
        "quantization_level": found.kind,
    }


def _counts(end: End, began: float, load_seconds: float) -> dict[str, Any]:
    """Tokens and nanoseconds."""
    usage, timings = end.completion.usage, end.completion.timings
    return {
        "total_duration": int((time.perf_counter() - began) * 1e9),
        "load_duration": int(load_seconds * 1e9),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(timings.prompt_seconds * 1e9),
        "eval_count": usage.completion_tokens,
        "eval_duration": int(timings.decode_seconds * 1e9),
    }


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(prefix="/api", tags=["Ollama"])
    Piece = Callable[[str, list[Call]], dict[str, Any]]

    async def answered(
        body: OllamaChatBody | GenerateBody, request: Request, plan: Callable[[Loaded], Awaitable[Work]], piece: Piece
    ) -> Response:
        began = time.perf_counter()
        hosted = service.hosting.find(body.model)
        was_loaded = hosted.loaded is not None
        model = body.model

        def head() -> dict[str, Any]:
            return {"model": model, "created_at": _moment()}

        def ended(end: End) -> dict[str, Any]:
            reason = "length" if end.finish == "length" else "stop"
            counts = _counts(end, began, 0.0 if was_loaded else hosted.load_seconds)
            return {"done": True, "done_reason": reason, **counts}

        def whole(loaded: Loaded, answers: list[Answer]) -> dict[str, Any]:
            answer = answers[0]
            assert answer.end is not None
            found = {**head(), **piece(answer.text, answer.calls), **ended(answer.end)}
            if body.logprobs:
                found["logprobs"] = token_logprobs(loaded, answer.logprobs)
            return found

        async def pieces(loaded: Loaded, found: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
            call: Call | None = None
            async for item in found:
                if call is not None and not isinstance(item, CallDelta):
                    yield line({**head(), **piece("", [call]), "done": False})
                    call = None
                if isinstance(item, TextDelta) and (item.text or item.logprobs):
                    data = {**head(), **piece(item.text, []), "done": False}
                    if body.logprobs:
                        data["logprobs"] = token_logprobs(loaded, item.logprobs)
                    yield line(data)
                elif isinstance(item, CallStart):
                    call = Call(item.name)
                elif isinstance(item, CallDelta) and call is not None:
                    call.arguments += item.arguments
                elif isinstance(item, End):
                    yield line({**head(), **piece("", []), **ended(item)})

        if body.stream is not False:
            return service.stream(request, model, plan, pieces, failed, media_type=LINES, heartbeat=b"")
        return await service.whole(request, model, plan, whole)

    async def only_loaded(body: OllamaBody, piece: Piece) -> Response:
        """Nothing is asked but that the model be there, or not."""
        hosted = service.hosting.find(body.model)
        if body.unloads:
            await service.hosting.unload(hosted, unless_used=True)
        else:
            async with service.hosting.lease(body.model):
                pass
        reason = "unload" if body.unloads else "load"
        return Json(
            {"model": body.model, "created_at": _moment(), **piece("", []), "done": True, "done_reason": reason}
        )

    @router.post(
        "/chat",
        summary="Answer a conversation",
        responses=answers("ollama", shapes.OllamaChat, [shapes.OllamaChat, OllamaError], media=LINES),
    )
    async def chat(body: OllamaChatBody, request: Request) -> Response:
        def piece(text: str, calls: list[Call]) -> dict[str, Any]:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls:
                message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.parsed}} for call in calls]
            return {"message": message}

        if not body.messages:
            return await only_loaded(body, piece)
        return await answered(body, request, body.plan, piece)

    @router.post(
        "/generate",
        summary="Answer a prompt",
        responses=answers("ollama", shapes.OllamaText, [shapes.OllamaText, OllamaError], media=LINES),
    )
    async def generate(body: GenerateBody, request: Request) -> Response:
        def piece(text: str, calls: list[Call]) -> dict[str, Any]:
            return {"response": text}

        if not body.prompt:
            return await only_loaded(body, piece)
        return await answered(body, request, body.plan, piece)

    @router.post(
        "/embed",
        summary="What texts mean, as vectors of length 1",
        responses=answers("ollama", shapes.OllamaEmbeddings),
    )
    async def embed(body: EmbedBody, request: Request) -> Response:
        began = time.perf_counter()

        async def work(loaded: Loaded) -> dict[str, Any]:
            inputs = [body.input] if isinstance(body.input, str) else body.input
            vectors, tokens = await embedded(service, loaded, body.model, inputs, record_of(request))
            if body.dimensions not in (None, vectors.shape[1]):
                raise refuse(f"dimensions is {body.dimensions}; the model has {vectors.shape[1]}")
            seconds = time.perf_counter() - began
            counts = {"total_duration": int(seconds * 1e9), "load_duration": 0, "prompt_eval_count": tokens}
            return {"model": body.model, "embeddings": vectors.tolist(), **counts}

        return await service.use(request, body.model, work)

    async def described(hosted: Hosted) -> dict[str, Any]:
        found = await asyncio.to_thread(describe, hosted.model.path)
        name = hosted.model.name
        return {"name": name, "model": name, "size": found.size, "details": _details(found)}

    @router.get(
        "/tags",
        summary="The models that are served",
        responses=answers("ollama", shapes.OllamaTags, post=False, model=False),
    )
    async def tags() -> Response:
        models = []
        for hosted in service.hosting.hosted.values():
            found = await asyncio.to_thread(describe, hosted.model.path)
            models.append({**await described(hosted), "modified_at": _moment(found.modified)})
        return Json({"models": models})

    @router.post("/show", summary="What a model's file says of it", responses=answers("ollama", shapes.OllamaShown))
    async def show(body: ShowBody) -> Response:
        if not (body.model or body.name):
            raise refuse("model is missing", "model")
        found = await asyncio.to_thread(describe, service.hosting.find(body.model or body.name).model.path)
        return Json(
            {
                "modelfile": "",
                "parameters": "",
                "template": found.template,
                "details": _details(found),
                "model_info": found.metadata,
                "capabilities": ["completion", *(["tools"] if found.template else [])],
                "modified_at": _moment(found.modified),
            }
        )

    @router.get(
        "/ps",
        summary="The models that are in memory",
        responses=answers("ollama", shapes.Running, post=False, model=False),
    )
    async def ps() -> Response:
        models = []
        for hosted in service.hosting.hosted.values():
            if hosted.loaded is not None:
                idle = service.settings.idle_timeout or 365 * 86400.0
                models.append(
                    {
                        **await described(hosted),
                        "expires_at": _moment(time.time() + idle),
                        "size_vram": 0,
                        "context_length": hosted.loaded.llm.context,
                    }
                )
        return Json({"models": models})

    @router.get(
        "/version",
        summary="The version of phiquant",
        responses=answers("ollama", shapes.OllamaVersion, post=False, model=False),
    )
    async def version() -> Response:
        return Json({"version": __version__})

    return router
