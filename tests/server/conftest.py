"""A server whose models say what the test wants: no weights, but the real tokenizer, options and templates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from phiquant.completion import Completion, CompletionChunk, Embeddings, Timings, TokenLogprob, Usage
from phiquant.convert import convert
from phiquant.errors import ContextError, QueueFull
from phiquant.gguf import open_model
from phiquant.request import Requests
from phiquant.server.app import create_app
from phiquant.server.hosting import Hosting, Loaded
from phiquant.server.settings import Model, Settings
from phiquant.text import ChatTemplate, Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, as Q8_0."""
    file = tmp_path_factory.mktemp("served") / "tiny-Q8_0.gguf"
    convert(ROOT / "models" / "phi3-tiny", file, "q8_0")
    return file


@pytest.fixture(scope="session")
def tokenizer(gguf: Path) -> Tokenizer:
    with open_model(gguf) as opened:
        return Tokenizer.from_gguf(opened)


@dataclass
class ScriptedEngine:
    """Says `says(prompt, choice)` token by token, whatever it is asked; remembers what that was."""

    llm: Any
    says: Callable[[str, int], str]
    finish: str = "stop"
    stop: str | None = None
    error: Exception | None = None
    error_after: int = -1
    pause: float = 0.0
    asked: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    full: bool = False
    closed: bool = False

    @property
    def prompt(self) -> str:
        """The last prompt, as text."""
        return self.llm.tokenizer.decode(self.asked[-1][0], skip_special=False)

    @property
    def options(self) -> dict[str, Any]:
        return self.asked[-1][1]

    async def stream(self, prompt: Sequence[int], **options: Any) -> AsyncGenerator[CompletionChunk, None]:
        (request,) = self.llm.requests.make(prompt, options)  # refuses what the real one would
        if len(request.job.ids) >= self.llm.context:
            raise ContextError(f"a prompt of {len(prompt)} tokens does not fit the context of {self.llm.context}")
        if self.full:
            raise QueueFull("64 requests wait already", 2.5)
        if self.error is not None and self.error_after < 0:
            raise self.error
        choice = len(self.asked)
        self.asked.append((list(prompt), options))
        tokenizer, text = self.llm.tokenizer, self.says(self.llm.tokenizer.decode(prompt), choice)
        ids = tokenizer.encode_continuation(text)[: options.get("max_tokens") or None]
        detokenizer = tokenizer.stream(continuation=True)
        count, pieces, noted = options.get("logprobs"), [], []
        self.running += 1
        try:
            for at, token in enumerate(ids):
                await asyncio.sleep(self.pause)
                if self.error is not None and at == self.error_after:
                    raise self.error
                piece = detokenizer.push(token)
                pieces.append(piece)
                logprobs = None
                if count is not None:
                    logprobs = (TokenLogprob(token, -0.5, tuple((token + i, -0.5 - i) for i in range(count))),)
                    noted += logprobs
                yield CompletionChunk(piece, (token,), None, logprobs)
            finish = "length" if len(ids) == options.get("max_tokens") else self.finish
            usage = Usage(len(prompt), 2, len(ids))
            timings = Timings(0.25, 0.5, 100.0, 50.0)
            seed = options.get("seed") or 7
            whole = Completion("".join(pieces), tuple(ids), finish, usage, timings, seed, self.stop, tuple(noted))
            yield CompletionChunk(detokenizer.finish(), (), whole, () if count is not None else None)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def embed(self, inputs: Sequence[Sequence[int]], *, pooling: str = "mean") -> Embeddings:
        rows = [np.full(4, len(ids) / 10, np.float32) for ids in inputs]
        tokens = tuple(len(ids) for ids in inputs)
        return Embeddings(np.stack(rows), tokens, Usage(sum(tokens), 0, 0))

    def stats(self) -> Any:
        return SimpleNamespace(running=self.running, waiting=3, pages_used=5, pages_total=8, preempted=2)

    async def __aenter__(self) -> ScriptedEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.closed = True


class ScriptedLLM:
    """As much of an LLM as the server looks at."""

    def __init__(self, tokenizer: Tokenizer, context: int = 256) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.config = SimpleNamespace(vocab_size=tokenizer.vocab_size, context_length=2048)
        self.requests = Requests(tokenizer, tokenizer.vocab_size)
        self.parameter_count, self.weight_bytes = 15_000_000, 16_000_000
        self.detokenize = tokenizer.decode

    def close(self) -> None:
        pass


class Server:
    """The application with one scripted model, or several, and a client."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, says: Callable[[str, int], str]) -> None:
        self.settings = settings
        self.engine = ScriptedEngine(ScriptedLLM(tokenizer), says)
        self.loads: list[str] = []

        async def load(model: Model) -> Loaded:
            self.loads.append(model.name)
            return Loaded(self.engine.llm, self.engine)  # type: ignore[arg-type]

        self.hosting = Hosting(settings.models, load, settings.idle_timeout)
        self.app: FastAPI = create_app(settings, self.hosting)

    def ask(
        self, method: str, path: str, body: Any = None, *, base: str = "http://127.0.0.1:8080", **how: Any
    ) -> httpx.Response:
        """One request, from beginning to end."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.request(method, path, json=body, **how)

        return asyncio.run(run())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """What a stream sends, parsed; the end mark as a text."""
        answer = self.post(path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"] == "application/x-ndjson":
            return [json.loads(line) for line in answer.text.splitlines()]
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = []
        for block in answer.text.strip().split("\n\n"):
            data = next(line[6:] for line in block.splitlines() if line.startswith("data: "))
            name = next((line[7:] for line in block.splitlines() if line.startswith("event: ")), None)
            found.append(data if data == "[DONE]" else json.loads(data))
            assert name is None or name == found[-1]["type"]
        return found


Make = Callable[..., Server]


@pytest.fixture
def make(gguf: Path, tokenizer: Tokenizer) -> Make:
    """Makes servers: `says` is what their model says, the rest are settings."""

    def made(
        says: str | Callable[[str, int], str] = " It is blue.",
        *,
        template: str | None = None,
        names: Sequence[str] = ("tiny",),
        embeddings: bool = True,
        **settings: Any,
    ) -> Server:
        spoken = says if callable(says) else lambda prompt, choice: says
        models = tuple(Model(gguf, name, embeddings=embeddings) for name in names)
        known = tokenizer
        if template is not None:
            known = Tokenizer(
                tokenizer.vocabulary, tokenizer.added_tokens, ChatTemplate(template, bos_token="<s>", eos_token="")
            )
        return Server(replace(Settings(models), **settings), known, spoken)

    return made


@pytest.fixture
def server(make: Make) -> Server:
    return make()
