"""A model that needs no weights: it answers with what it was asked."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from phiquant.errors import ContextError
from phiquant.llm import Completion, CompletionChunk, Timings, Usage


class FakeTokenizer:
    chat_template: object | None = object()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@dataclass
class FakeLLM:
    """Says `answer(messages or prompt)` word by word; remembers what it was asked and with which options."""

    context: int = 100
    notes: list[str] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    interrupt_after: int | None = None
    overflow: bool = False
    finish_reason: str = "stop"
    answer: Callable[[Any], str] = lambda asked: f"echo {asked[-1]['content'] if isinstance(asked, list) else asked}"
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Sequence[dict[str, str]], *, stream: bool, **options: Any) -> Iterator[CompletionChunk]:
        assert stream
        if self.overflow:
            raise ContextError("the conversation does not fit")
        self.asked.append([dict(m) for m in messages])
        self.options.append(options)
        return self._chunks(self.asked[-1])

    def generate(self, prompt: str, *, stream: bool, **options: Any) -> Iterator[CompletionChunk]:
        assert stream
        self.asked.append(prompt)
        self.options.append(options)
        return self._chunks(prompt)

    def _chunks(self, asked: Any) -> Iterator[CompletionChunk]:
        text = self.answer(asked)
        words = text.split(" ")
        for i, word in enumerate(words):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            piece = word if i == 0 else " " + word
            if i < len(words) - 1:
                yield CompletionChunk(piece, (i,))
        usage, timings = Usage(5, 2, len(words)), Timings(0.5, 1.0, 10.0, 20.0)
        whole = Completion(text, tuple(range(len(words))), self.finish_reason, usage, timings, 1)  # type: ignore[arg-type]
        yield CompletionChunk(piece, (len(words) - 1,), whole)


class Terminal(io.StringIO):
    """Text output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()
