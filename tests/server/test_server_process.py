"""The real process with the bundled model, asked by the official clients of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from .process import SERVE, Process

pytestmark = pytest.mark.cpu

KEY = "sk-a-secret"
SAY: Any = [{"role": "user", "content": "Once upon a time there was a little girl"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def served(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    options = ["-m", gguf, "--alias", "tiny", "-c", "512", "--parallel", "3", "--embeddings", "--metrics"]
    process = Process(
        tmp_path_factory.mktemp("serve"), *options, "--api-key", KEY, "--log-format", "json", "--client-timeout", "2"
    )
    yield process
    assert process.end() == 0


@pytest.fixture(scope="module")
def client(served: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_openai_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=SAY, max_tokens=12, temperature=0)
    text = answer.choices[0].message.content
    assert text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="tiny", messages=SAY, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens


def test_openai_is_answered_in_json_that_fits_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "old": {"type": "boolean"}},
        "required": ["age", "old"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=SAY,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found.keys() == {"age", "old"}
    assert isinstance(found["age"], int)
    assert isinstance(found["old"], bool)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_gets_calls_that_fit_their_schema(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": "tiny", "messages": SAY, "tools": TOOLS, "tool_choice": "required", "seed": 3}
    asked |= {"parallel_tool_calls": False, "max_tokens": 100}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            message = events.get_final_completion().choices[0]
    else:
        message = client.chat.completions.create(**asked).choices[0]
    assert message.finish_reason == "tool_calls"
    (call,) = message.message.tool_calls or ()
    assert call.function.name == "weather"  # type: ignore[union-attr]
    assert json.loads(call.function.arguments).keys() == {"city"}  # type: ignore[union-attr]


def test_openai_completions_are_greedy_and_batched(client: openai.OpenAI) -> None:
    prompts = [SAY[0]["content"], "The old man"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0, logprobs=2)
    assert answer.choices[0].text.startswith(" who had been a little girl, and")
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == 8
    alone = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=8, temperature=0)
    assert alone.choices[0].text == answer.choices[1].text
    streamed = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone.choices[0].text


def test_openai_choices_and_seeds(client: openai.OpenAI) -> None:
    many = client.completions.create(model="tiny", prompt="It was", max_tokens=8, n=2, seed=11, temperature=1)
    alone = client.completions.create(model="tiny", prompt="It was", max_tokens=8, seed=12, temperature=1)
    assert many.choices[1].text == alone.choices[0].text
    assert many.choices[0].text != many.choices[1].text


def test_openai_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=6, temperature=0)
    assert answer.output_text
    assert answer.status == "incomplete"
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=6, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    tool: Any = {"type": "function", **TOOLS[0]["function"], "strict": True}
    with client.responses.stream(
        model="tiny", input="Weather?", tools=[tool], tool_choice="required", max_output_tokens=100, temperature=0
    ) as stream:
        final = list(stream)[-1]
    assert final.type == "response.completed"
    assert {item.type for item in final.response.output} == {"function_call"}


def test_openai_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["a king", "a queen", "a king"])  # as base64
    plain = client.embeddings.create(model="tiny", input="a king", encoding_format="float")
    assert answer.data[0].embedding == answer.data[2].embedding == pytest.approx(plain.data[0].embedding)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-4)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_openai_models_and_errors(client: openai.OpenAI, served: Process) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="other", messages=SAY)
    with pytest.raises(openai.BadRequestError, match="context of 512"):
        client.completions.create(model="tiny", prompt="word " * 600)
    with (
        openai.OpenAI(base_url=f"{served.address}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_asynchronously(served: Process) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key=KEY) as client:

            async def one() -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="The fox", max_tokens=10, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            answer = await client.chat.completions.create(model="tiny", messages=SAY, max_tokens=3)
            assert answer.choices[0].message.content
            return await asyncio.gather(*(one() for _ in range(6)))

    assert len(set(asyncio.run(run()))) == 1


@pytest.fixture(scope="module")
def other_client(served: Process) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.address, api_key=KEY, max_retries=0) as made:
        yield made


def test_anthropic_messages(served: Process, other_client: anthropic.Anthropic) -> None:
    client = other_client
    asked: Any = {"model": "tiny", "max_tokens": 8, "messages": SAY, "extra_body": {"temperature": 0}}
    answer = client.messages.create(**asked)
    assert answer.stop_reason == "max_tokens"
    assert answer.content[0].type == "text"
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text
    assert final.usage.output_tokens == 8
    assert client.messages.count_tokens(model="tiny", messages=SAY).input_tokens == (
        answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    )
    function = TOOLS[0]["function"]
    tool: Any = {"name": function["name"], "input_schema": function["parameters"]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        with client.messages.stream(**{**asked, "max_tokens": 100}, tools=[tool], tool_choice=choice) as stream:
            called = stream.get_final_message()
        assert called.stop_reason == "tool_use"
        assert called.content[-1].type == "tool_use"
        assert called.content[-1].input.keys() == {"city"}  # type: ignore[attr-defined]
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**{**asked, "extra_body": {"temperature": 5}})
    with (
        anthropic.Anthropic(base_url=served.address, api_key="wrong") as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(**asked)


def test_anthropic_asynchronously(served: Process) -> None:
    async def run() -> str:
        async with anthropic.AsyncAnthropic(base_url=served.address, api_key=KEY) as client:
            stream = await client.messages.create(model="tiny", max_tokens=5, messages=SAY, stream=True)
            return "".join([event.delta.text async for event in stream if event.type == "content_block_delta"])  # type: ignore[union-attr]

    assert asyncio.run(run())


@pytest.fixture(scope="module")
def third_client(served: Process) -> Iterator[ollama.Client]:
    with ollama.Client(served.address, headers={"Authorization": f"Bearer {KEY}"}) as made:
        yield made


def test_ollama(third_client: ollama.Client) -> None:
    client = third_client
    options: Any = {"num_predict": 8, "temperature": 0}
    answer = client.chat("tiny", SAY, options=options)
    assert answer.done_reason == "length"
    assert answer.eval_count == 8
    streamed = list(client.chat("tiny:latest", SAY, options=options, stream=True))
    assert "".join(part.message.content or "" for part in streamed) == answer.message.content
    assert streamed[-1].done
    text = client.generate("tiny", SAY[0]["content"], raw=True, options=options).response
    assert text.startswith(" who had been a little girl")
    assert client.generate("tiny", "x", format={"enum": ["red", "blue"]}).response in ('"red"', '"blue"')
    assert len(client.embed("tiny", ["a", "b"]).embeddings) == 2
    assert [model.model for model in client.list().models] == ["tiny"]
    assert client.show("tiny").details.quantization_level == "Q8_0"  # type: ignore[union-attr]
    assert client.ps().models[0].context_length == 512
    with pytest.raises(ollama.ResponseError, match="there is no model"):
        client.generate("other", "x")


def test_ollama_asynchronously(served: Process) -> None:
    async def run() -> str:
        async with ollama.AsyncClient(served.address, headers={"Authorization": f"Bearer {KEY}"}) as client:
            parts = await client.chat("tiny", SAY, options={"num_predict": 4}, stream=True)
            return "".join([part.message.content or "" async for part in parts])

    assert asyncio.run(run())


def test_a_client_that_leaves_ends_its_work(served: Process) -> None:
    with httpx.Client(base_url=served.address, headers={"Authorization": f"Bearer {KEY}"}) as client:
        body = {"prompt": "Once", "max_tokens": 480, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 20
        while 'phiquant_running{model="tiny"} 0.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert '"finish": "disconnected"' in served.lines()


def test_a_connection_that_says_nothing_is_closed(served: Process) -> None:
    host, port = served.address.removeprefix("http://").split(":")
    for said in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(said)
            assert connection.recv(1) == b""


def test_the_log_has_a_line_of_json_for_each_request_and_no_secret(served: Process) -> None:
    entries = [json.loads(line) for line in served.lines().splitlines() if line.startswith("{")]
    paths = {entry.get("path") for entry in entries}
    assert {"/v1/chat/completions", "/v1/messages", "/api/chat"} <= paths
    assert all(entry["model"] == "tiny" for entry in entries if entry.get("completion_tokens"))
    assert KEY not in served.lines()
    assert "little girl" not in served.lines()
    assert "Traceback" not in served.lines()


def test_what_is_under_way_finishes_when_the_server_is_told_to_end(gguf: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, "-m", gguf, "-c", "256", "--log-format", "json")
    with httpx.Client(base_url=process.address, timeout=60) as client:
        body = {"prompt": "Once", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert process.end(asked=True) == 0
    assert '"completion_tokens": 200' in process.lines()


def test_what_is_under_way_is_cancelled_when_there_is_no_time_for_it(gguf: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, "-m", gguf, "-c", "2048", "--shutdown-timeout", "0", "--threads", "1")
    body = {"prompt": "Once " * 400, "max_tokens": 1200, "stream": True, "ignore_eos": True}
    with (
        httpx.Client(base_url=process.address, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        rest = "\n".join(lines)
    assert "the server is shutting down" in rest
    assert '"finish_reason":"length"' not in rest
    assert process.end(asked=True) == 0
    assert "cancelled" in process.lines()
    assert "Traceback" not in process.lines()


def test_a_port_that_is_taken_is_told_in_a_sentence(gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*SERVE, "-m", str(gguf), "--port", str(port)], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["a..b", "no.such.name.invalid"])
def test_a_host_that_is_none_is_told_in_a_sentence(gguf: Path, host: str) -> None:
    done = subprocess.run([*SERVE, "-m", str(gguf), "--host", host], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"phiquant: error: {host} is no address to listen at: ")
