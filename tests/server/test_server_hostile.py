"""Requests that mean harm: wrong types, absurd numbers, headers that contradict one another, grammars that explode."""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import Make, Server
from .process import Process

SAY = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAY},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": SAY, "max_tokens": 5},
    "/completion": {"prompt": "Hello"},
    "/api/chat": {"model": "tiny", "messages": SAY, "stream": False},
    "/api/generate": {"model": "tiny", "prompt": "Hello", "stream": False},
}


def with_option(path: str, name: str, value: object) -> dict[str, Any]:
    """A good body with an option, which Ollama has in an object of their own."""
    return {**GOOD[path], **({"options": {name: value}} if path.startswith("/api/") else {name: value})}


@pytest.mark.parametrize("path", GOOD)
def test_good_bodies_are_good(server: Server, path: str) -> None:
    assert server.post(path, **GOOD[path]).status_code == 200


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("value", ["1", True, [1], {"a": 1}, "hot"])
def test_numbers_are_numbers(server: Server, path: str, value: object) -> None:
    for name in ("temperature", "top_p"):
        answer = server.post(path, **with_option(path, name, value))
        assert answer.status_code == 400, answer.text
        assert name in answer.text
    assert not server.engine.asked


def test_how_long_a_model_stays_is_a_number_or_a_text(server: Server) -> None:
    for value, status in ((False, 400), (0, 200), ("5m", 200), ([1], 400)):
        assert server.post("/api/chat", **GOOD["/api/chat"], keep_alive=value).status_code == status


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("value", ["yes", "true", 1, 0, [True]])
def test_switches_are_true_or_false(server: Server, path: str, value: object) -> None:
    answer = server.post(path, **{**GOOD[path], "stream": value})
    assert answer.status_code == 400, answer.text
    assert "stream" in answer.text


@pytest.mark.slow
@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e308),
        ("temperature", -1e308),
        ("top_p", -0.1),
        ("top_p", 2),
        ("top_k", -(10**9)),
        ("top_k", 10**30),
        ("min_p", -1),
        ("typical_p", 7),
        ("repeat_penalty", 0),
        ("repeat_penalty", -3),
        ("repeat_last_n", -5),
        ("mirostat", 9),
        ("mirostat_tau", -1),
        ("presence_penalty", 1e300),
        ("frequency_penalty", -1e300),
        ("seed", 1 << 200),
        ("stop", ["x" * 5000]),
        ("stop", ["x"] * 500),
        ("stop", [""]),
    ],
)
def test_absurd_values_are_refused_or_no_option_at_all(server: Server, path: str, name: str, value: object) -> None:
    """What a family does not know is unknown to OpenAI's and Anthropic's, and ignored by the others."""
    answer = server.post(path, **with_option(path, name, value))
    if path == "/completion" and (name, value) == ("temperature", -1e308):
        assert answer.status_code == 200  # llama-server: below 0 is greedy
        assert server.engine.options["temperature"] == 0
        return
    assert answer.status_code == 400, answer.text
    assert not server.engine.asked


@pytest.mark.parametrize("path", GOOD)
def test_unknown_fields_are_treated_as_each_family_does(server: Server, path: str) -> None:
    answer = server.post(path, **GOOD[path], no_such_field=1)
    assert answer.status_code == (400 if path.startswith("/v1/") else 200)
    assert ("no_such_field" in answer.text) == path.startswith("/v1/")


def test_all_keys_are_compared_in_constant_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    honest = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return honest(one, other)

    monkeypatch.setattr("phiquant.server.guard.hmac.compare_digest", compare)
    server = make(api_keys=("first", "second"))
    for key, status in (("first", 200), ("second", 200), ("third", 401)):
        compared.clear()
        answer = server.ask("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == status
        assert {one for one, _ in compared} == {b"first", b"second"}
        assert sum(other == key.encode() for _, other in compared) == 2


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
    ],
)
def test_templates_from_files_can_neither_loop_nor_look_around(make: Make, source: str) -> None:
    server = make(template=source)
    begin = time.monotonic()
    answer = server.post("/v1/chat/completions", messages=SAY)
    assert answer.status_code == 400
    assert "chat template" in answer.json()["error"]["message"]
    assert time.monotonic() - begin < 20
    assert "subclasses" not in answer.text
    assert not server.engine.asked


@pytest.fixture(scope="module")
def served(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("hostile"), "-m", gguf, "--alias", "tiny", "-c", "512", "-n", "4")
    yield process
    assert process.end() == 0
    assert "Traceback" not in process.lines()


def said(served: Process, raw: bytes, *, ends: bool = True) -> bytes:
    """What the server answers to these bytes, until it closes the connection; `ends`: nothing more is sent."""
    host, port = served.address.removeprefix("http://").split(":")
    found = b""
    with (
        socket.create_connection((host, int(port)), timeout=20) as connection,
        contextlib.suppress(OSError) if ends else contextlib.nullcontext(),
    ):
        connection.sendall(raw)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            found += piece
    return found


COUNTS = ("completion_tokens", "output_tokens", "tokens_predicted", "eval_count")
LENGTHS = {
    **dict.fromkeys(GOOD, ("max_tokens",)),
    "/v1/responses": ("max_output_tokens",),
    "/completion": ("n_predict",),
    **dict.fromkeys(("/api/chat", "/api/generate"), ("options",)),
}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()


@pytest.mark.cpu
def test_a_plain_request_is_answered(served: Process) -> None:
    length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    assert said(served, POST + length + BODY, ends=False).startswith(b"HTTP/1.1 200")


@pytest.mark.cpu
def test_no_answer_is_longer_than_the_server_lets_it_be(served: Process) -> None:
    """--predict 4, whatever is asked for, in every family; and what it has at its disposal is told at the start."""
    told = next(line for line in served.lines().splitlines() if "the cache holds" in line)
    assert "tiny: 4 conversations at once, of up to 512 tokens; the cache holds 2048 tokens" in told
    for path, body in GOOD.items():
        for asked in ({}, {"max_tokens": 50, "n_predict": 50, "max_output_tokens": 50, "options": {"num_predict": 50}}):
            known = {name: value for name, value in asked.items() if name in LENGTHS[path]}
            answer = httpx.post(f"{served.address}{path}", json={**body, **known}, timeout=60).json()
            usage = answer.get("usage", answer)
            counts = [usage[name] for name in COUNTS if name in usage]
            assert len(counts) == 1, answer
            assert 1 <= counts[0] <= 4, answer


@pytest.mark.cpu
@pytest.mark.parametrize(
    "raw",
    {
        "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "host in the target": b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY,
        "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "negative length": POST + b"Content-Length: -5\r\n\r\n" + BODY,
        "length in words": POST + b"Content-Length: many\r\n\r\n" + BODY,
        "huge length": POST + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n" + BODY,
        "chunk of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "huge chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\nx",
        "two types": POST[:-2] + b"\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        "a long header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n",
        "many headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Many: 1\r\n" * 20_000 + b"\r\n",
        "a long path": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a null in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        "a folded header": b"GET /health HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n\r\n",
        "a header without a name": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
        "a path upwards": b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "an encoded path upwards": b"GET /assets/..%2f..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "an encoded null": b"GET /v1/models/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "a backslash": b"GET /assets\\..\\..\\secret HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "an upgrade": b"GET / HTTP/1.1\r\nHost: evil.example\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        "tunnels": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_tricks_of_headers_and_paths_are_refused(served: Process, raw: tuple[str, bytes]) -> None:
    found = said(served, raw[1])
    if raw[0] == "two types":  # the first counts, and that is JSON, for the guard as for the reader
        assert found.startswith(b"HTTP/1.1 400")
        assert b"prompt is missing" in found
    else:
        assert not found or found.startswith(b"HTTP/1.1 4"), found[:200]
    assert b"root:" not in found
    assert httpx.get(f"{served.address}/health").status_code == 200


@pytest.mark.cpu
def test_a_head_that_comes_byte_by_byte_is_not_waited_for(gguf: Path, tmp_path: Path) -> None:
    process = Process(tmp_path, "-m", gguf, "-c", "128", "--client-timeout", "1")
    host, port = process.address.removeprefix("http://").split(":")
    begin = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        ended = False
        for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1000:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                ended = True
                break
            time.sleep(0.05)
            assert time.monotonic() - begin < 20
    assert ended
    assert process.end() == 0


def chained(rules: int) -> str:
    lines = [f"r{i} ::= r{i + 1} r{i + 1}" for i in range(rules)]
    return "\n".join(["root ::= r0", *lines, f'r{rules} ::= "x"'])


DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
EXPLOSIVE: list[dict[str, Any]] = [
    {"grammar": chained(900)},
    {"grammar": chained(20_000)},
    {"grammar": "root ::= " + "(" * 30_000},
    {"grammar": 'root ::= "' + "a" * 60_000 + '"'},
    {"grammar": "root ::= root root | root | " + " | ".join(f'"{i}"' for i in range(3000))},
    {"grammar": 'root ::= ("a"{1,1000}){1,1000}'},
    {"json_schema": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"}},
    {"json_schema": {"type": "string", "pattern": "(a|b)*a(a|b){400}"}},
    {"json_schema": {"enum": [f"{i}" * 20 for i in range(5000)]}},
    {"json_schema": {"const": "x" * 100_000}},
    {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    {"json_schema": {"type": "array", "minItems": 10**9}},
    {"json_schema": DEEP},
    {"json_schema": {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(8)]} for i in range(12)]}},
]


def memory(served: Process) -> int:
    """Bytes that the process has in memory."""
    return int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read where Linux has it")
def test_grammars_that_explode_cost_little_and_nobody_waits_for_them(served: Process) -> None:
    waits: list[float] = []
    done = threading.Event()

    def others() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                begin = time.monotonic()
                assert client.get(f"{served.address}/health").status_code == 200
                waits.append(time.monotonic() - begin)
                time.sleep(0.02)

    other = threading.Thread(target=others)
    with httpx.Client(timeout=120) as client:
        client.post(f"{served.address}/v1/completions", json={"prompt": "x", "json_schema": {"type": "integer"}})
        before = memory(served)
        other.start()
        try:
            for field in EXPLOSIVE:
                begin = time.monotonic()
                answer = client.post(f"{served.address}/v1/completions", json={"prompt": "Once", **field})
                assert answer.status_code in (200, 400), answer.text
                assert time.monotonic() - begin < 30, field  # some seconds at most, alone on a machine
        finally:
            done.set()
            other.join()
    assert memory(served) - before < 500 << 20
    assert len(waits) > 10
    assert sorted(waits)[len(waits) // 2] < 1
