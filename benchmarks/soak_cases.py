"""What the soak test asks: requests whose answers are known beforehand, and such as have none.

Everything follows from the seed and the number of a request, so that a failing one can be made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_stream import head_of

__all__ = ["CONTEXT", "Case", "Malformed", "cases", "malformed"]

TEXT = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny" / "evaluation.txt"
CONTEXT = 256  # tokens
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "old": {"type": "boolean"}},
    "required": ["age", "old"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
GRAMMAR = 'root ::= ("red" | "green" | "blue") " " [a-z] [a-z]? "."'
SYSTEM = "You are a patient storyteller who knows every animal of the forest by its name and likes short answers."
SAMPLERS: Sequence[dict[str, Any]] = (
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.1, "repeat_penalty": 1.2},
    {"temperature": 1.0, "mirostat": 2},
    {"temperature": 1.0, "dry_multiplier": 0.8},
    {"temperature": 1.1, "typical_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
)


@dataclass(frozen=True)
class Case:
    """A request that has one right answer.

    Attributes:
        name: tells it from the others.
        path, body: of the request.
        whole: what counts of the answer's JSON.
        streamed: the same of the events of a stream; None: it is never streamed.
    """

    name: str
    path: str
    body: dict[str, Any]
    whole: Callable[[Any], Any]
    streamed: Callable[[list[Any]], Any] | None = None


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused: its bytes, and with which status; None: the connection ends without an answer."""

    name: str
    request: Callable[[int], bytes]
    status: int | None


def cases(seed: int) -> list[Case]:
    """Some sixty; prompts begin alike in many of them, so that pages are shared."""
    draw = random.Random(seed)
    words = TEXT.read_text("utf-8").split()

    def prompt(least: int, most: int) -> str:
        start = draw.choice((0, 0, 150, 700, draw.randrange(len(words) // 2)))  # some begin alike
        return " ".join(words[start : start + draw.randint(least, most)])

    found = []
    for i in range(16):
        body = {"prompt": prompt(1, 90), "max_tokens": draw.randint(1, 24), "temperature": 0}
        found.append(Case(f"greedy {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(14):
        sampled = {"prompt": prompt(1, 90), "max_tokens": draw.randint(1, 24), "seed": draw.getrandbits(60)}
        body = {**sampled, **SAMPLERS[i % len(SAMPLERS)]}
        found.append(Case(f"sampled {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(3):
        body = {"prompt": prompt(3, 40), "max_tokens": 12, "n": 3, "seed": i, "temperature": 1}
        found.append(Case(f"choices {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(3):
        body = {"prompt": prompt(3, 60), "max_tokens": 8, "logprobs": 2, "temperature": 0}
        found.append(Case(f"log-probabilities {i}", "/v1/completions", body, _logprobs))
    for i in range(2):
        body = {"prompt": prompt(3, 30), "max_tokens": 24, "temperature": 0, "stop": [" the", "."]}
        found.append(Case(f"stop texts {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(2):  # as long as the context lets them: these run out of pages
        body = {"prompt": prompt(60, 100), "temperature": 0, "ignore_eos": True, "max_tokens": 80}
        found.append(Case(f"long {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(6):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt(2, 30)}]
        body = {"messages": messages, "max_tokens": draw.randint(2, 20)}
        body |= {"temperature": 0} if i % 2 else {"seed": i, "temperature": 1}
        found.append(Case(f"chat {i}", "/v1/chat/completions", body, _messages, _streamed_messages))
    for i in range(2):
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        body = {"messages": [{"role": "user", "content": prompt(2, 10)}], "seed": i, "max_tokens": 30}
        body["response_format"] = form
        found.append(Case(f"schema {i}", "/v1/chat/completions", body, _messages, _streamed_messages))
    for i in range(2):
        body = {"prompt": prompt(2, 20), "seed": i, "max_tokens": 20, "grammar": GRAMMAR}
        found.append(Case(f"grammar {i}", "/v1/completions", body, _texts, _streamed_texts))
    for i in range(3):
        body = {"messages": [{"role": "user", "content": prompt(2, 20)}], "seed": i, "max_tokens": 60}
        body |= {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
        found.append(Case(f"tool {i}", "/v1/chat/completions", body, _messages, _streamed_messages))
    for i in range(3):
        body = {"input": [prompt(1, 30) for _ in range(i + 1)]}
        found.append(Case(f"embeddings {i}", "/v1/embeddings", body, _embeddings))
    body = {"max_tokens": 10, "temperature": 0, "messages": [{"role": "user", "content": prompt(2, 30)}]}
    found.append(Case("anthropic", "/v1/messages", {"model": "tiny", **body}, lambda answer: answer["content"]))
    options = {"num_predict": 10, "temperature": 0}
    body = {"model": "tiny", "prompt": prompt(2, 30), "raw": True, "options": options, "stream": False}
    found.append(Case("ollama", "/api/generate", body, lambda answer: answer["response"]))
    body = {"prompt": prompt(2, 30), "n_predict": 10, "temperature": 0}
    found.append(Case("llama", "/completion", body, lambda answer: answer["content"], _streamed_content))
    return found


def malformed() -> list[Malformed]:
    """Requests that nobody should send."""

    def plain(path: str, data: bytes) -> Callable[[int], bytes]:
        return lambda port: head_of(port, "POST", path, len(data)) + data

    def of(**body: Any) -> Callable[[int], bytes]:
        return plain("/v1/completions", json.dumps(body).encode())

    def cut(port: int) -> bytes:
        return head_of(port, "POST", "/v1/completions", 100) + b'{"prompt": "x'

    return [
        Malformed("no JSON", plain("/v1/completions", b'{"prompt": '), 400),
        Malformed("no UTF-8", plain("/v1/completions", b'{"prompt": "\xff\xfe"}'), 400),
        Malformed("nested", plain("/v1/completions", b"[" * 5000), 400),
        Malformed("a list", plain("/v1/chat/completions", b"[1, 2]"), 400),
        Malformed("wrong type", of(prompt={"a": 1}), 400),
        Malformed("negative", of(prompt="x", max_tokens=-3), 400),
        Malformed("NaN", plain("/v1/completions", b'{"prompt": "x", "temperature": NaN}'), 400),
        Malformed("unknown field", of(prompt="x", maximum=3), 400),
        Malformed("unknown model", of(prompt="x", model="other"), 404),
        Malformed("token outside", of(prompt=[1, 1 << 30]), 400),
        Malformed("too long", of(prompt="word " * 2 * CONTEXT), 400),
        Malformed("too long, streamed", of(prompt="word " * 2 * CONTEXT, stream=True), 400),
        Malformed("empty", of(prompt=""), 400),
        Malformed("broken grammar", of(prompt="x", grammar="root ::= ("), 400),
        Malformed("broken schema", of(prompt="x", json_schema={"type": "nothing"}), 400),
        Malformed("no messages", plain("/v1/chat/completions", b'{"messages": []}'), 400),
        Malformed("nowhere", plain("/v1/nowhere", b"{}"), 404),
        Malformed("wrong method", lambda port: head_of(port, "GET", "/v1/completions", None), 405),
        Malformed("stranger", lambda port: b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        Malformed("no type", lambda port: head_of(port, "POST", "/v1/completions", None), 415),
        Malformed("no HTTP", lambda port: b"\x00\x01 \xff\r\n\r\n", 400),
        Malformed("cut body", cut, None),
        Malformed("cut head", lambda port: b"POST /v1/completions HTTP/1.1\r\nHost: loc", None),
    ]


def _texts(answer: Any) -> Any:
    return [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]


def _streamed_texts(events: list[Any]) -> Any:
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            at = choice["index"]
            texts[at] = texts.get(at, "") + choice["text"]
            if choice["finish_reason"]:
                finish[at] = choice["finish_reason"]
    return [(texts[at], finish.get(at)) for at in sorted(texts)]


def _logprobs(answer: Any) -> Any:
    return [(choice["text"], choice["logprobs"]) for choice in answer["choices"]]


def _messages(answer: Any) -> Any:
    found = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
        found.append((message["content"] or "", calls, choice["finish_reason"]))
    return found


def _streamed_messages(events: list[Any]) -> Any:
    text, calls, finish = "", list[list[str]](), None
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            text += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(calls):
                    calls.append([call["function"]["name"], ""])
                calls[call["index"]][1] += call["function"]["arguments"]
            finish = choice["finish_reason"] or finish
    return [(text, [tuple(call) for call in calls], finish)]


def _embeddings(answer: Any) -> Any:
    return [item["embedding"] for item in answer["data"]]


def _streamed_content(events: list[Any]) -> Any:
    return "".join(event["content"] for event in events)
