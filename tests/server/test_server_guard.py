"""Who may ask, from where, and with how much."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from .conftest import Make, Server

SAY = {"messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080"])
def test_the_names_of_this_machine_are_known(server: Server, host: str) -> None:
    assert server.ask("GET", "/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "10.0.0.1"]
)
def test_a_host_that_is_not_ours_is_refused(server: Server, host: str) -> None:
    answer = server.ask("GET", "/health", headers={"host": host})
    assert answer.status_code == 403
    assert "--allowed-hosts" in answer.text


def test_further_hosts_may_be_allowed(make: Make) -> None:
    server = make(allowed_hosts=("Box.example",))
    assert server.ask("GET", "/health", headers={"host": "box.example:8080"}).status_code == 200
    assert server.ask("GET", "/health", headers={"host": "other.example"}).status_code == 403
    assert make(allowed_hosts=("*",)).ask("GET", "/health", headers={"host": "any"}).status_code == 200


def test_a_server_for_all_addresses_is_reached_by_addresses_but_not_by_names(make: Make) -> None:
    server = make(host="0.0.0.0")
    assert server.ask("GET", "/health", headers={"host": "192.168.1.7:8080"}).status_code == 200
    assert server.ask("GET", "/health", headers={"host": "evil.example"}).status_code == 403


def test_pages_of_other_origins_may_not_ask(server: Server) -> None:
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "http://[::1",
        "file://",
        "http://localhost:8080",
    ):
        answer = server.ask("POST", CHAT, SAY, headers={"origin": origin})
        assert answer.status_code == 403, origin
        assert "access-control-allow-origin" not in answer.headers
    assert not server.engine.asked
    assert server.ask("POST", CHAT, SAY, headers={"origin": "http://127.0.0.1:8080"}).status_code == 200


def test_origins_may_be_allowed(make: Make) -> None:
    server = make(cors=("https://good.example/",))
    asked = {"origin": "https://good.example", "access-control-request-headers": "content-type,authorization"}
    before = server.ask("OPTIONS", CHAT, headers=asked)
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == "https://good.example"
    assert before.headers["access-control-allow-headers"] == "content-type,authorization"
    assert server.ask("POST", CHAT, SAY, headers=asked).headers["access-control-allow-origin"] == "https://good.example"
    assert server.ask("OPTIONS", CHAT, headers={"origin": "https://evil.example"}).status_code == 403
    everybody = make(cors=("*",))
    assert everybody.ask("POST", CHAT, SAY, headers={"origin": "https://any.example"}).status_code == 200


def test_a_refusal_is_readable_for_allowed_origins(make: Make) -> None:
    answer = make(cors=("https://good.example",)).ask("POST", CHAT, {}, headers={"origin": "https://good.example"})
    assert answer.status_code == 400
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_keys(make: Make) -> None:
    server = make(api_keys=("one", "two"))
    for headers in ({"authorization": "Bearer two"}, {"authorization": "bearer one"}, {"x-api-key": "one"}):
        assert server.ask("POST", CHAT, SAY, headers=headers).status_code == 200
    wrong: list[dict[str, Any]] = [{}, {"authorization": "Bearer"}, {"authorization": "Basic one"}, {"x-api-key": "on"}]
    wrong += [{"authorization": "Bearer onetwo"}, {"authorization": "one"}, {"authorization": b"Bearer \xff\xfe"}]
    for headers in wrong:
        answer = server.ask("POST", CHAT, SAY, headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/openapi.json", "/props", "/api/tags", "/nothing"):
        assert server.ask("GET", path).status_code == 401
    assert server.ask("GET", "/health").status_code == 200


def test_errors_have_the_shape_of_their_family(make: Make) -> None:
    server = make(api_keys=("one",))
    assert server.ask("GET", "/v1/models").json()["error"]["code"] == "invalid_api_key"
    anthropic = server.ask("POST", "/v1/messages", {}).json()
    assert anthropic["type"] == "error"
    assert anthropic["error"]["type"] == "authentication_error"
    assert isinstance(server.ask("GET", "/api/tags").json()["error"], str)
    assert server.ask("GET", "/props").json()["error"]["code"] == 401


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_bodies_must_be_json_and_say_so(server: Server, media: str | None) -> None:
    headers = {} if media is None else {"content-type": media}
    assert server.ask("POST", CHAT, content=json.dumps(SAY), headers=headers).status_code == 415


@pytest.mark.parametrize("media", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
def test_types_of_json_are_accepted(server: Server, media: str) -> None:
    assert server.ask("POST", CHAT, content=json.dumps(SAY), headers={"content-type": media}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [], "n": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=range(12),
)
def test_broken_bodies_are_refused(server: Server, body: bytes) -> None:
    for path in (CHAT, "/v1/messages", "/completion", "/api/chat"):
        answer = server.ask("POST", path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert "error" in answer.json()


def test_a_body_that_is_too_large_is_refused(make: Make) -> None:
    server = make(max_body=1000)
    assert server.ask("POST", CHAT, {"messages": [{"role": "user", "content": "x" * 1000}]}).status_code == 413

    async def unannounced() -> Any:
        yield b'{"messages": ['
        for _ in range(100):
            yield b" " * 100

    import httpx

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://localhost") as client:
            return await client.post(CHAT, content=unannounced(), headers={"content-type": "application/json"})

    answer = asyncio.run(run())
    assert answer.status_code == 413
    assert "1000" in answer.json()["error"]["message"]


def test_paths_that_nobody_serves(server: Server) -> None:
    for path in (
        "/nothing",
        "/v1/chat/completions/",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1//models",
        "/index.html",
    ):
        assert server.ask("GET", path).status_code in (404, 405), path
    assert server.ask("GET", CHAT).status_code == 405
    assert server.ask("DELETE", "/v1/models").status_code == 405
    assert server.ask("GET", "/metrics").status_code == 404
    assert server.ask("GET", "/slots").status_code == 404


class Asgi:
    """A client that does what a good one does not: sends slowly, leaves, does not read."""

    def __init__(self, server: Server, path: str, body: bytes, *, headers: dict[str, str] | None = None) -> None:
        self.server, self.sent = server, list[dict[str, Any]]()
        named = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080),
        }
        self.body, self.left, self.stalled = body, asyncio.Event(), asyncio.Event()
        self.asked = 0

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 1:
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if self.stalled.is_set():
            await asyncio.Event().wait()

    async def run(self) -> None:
        await self.server.app(self.scope, self.receive, self.send)  # type: ignore[arg-type]

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_work(make: Make, stream: bool) -> None:
    async def run() -> None:
        server = make("word " * 50)
        server.engine.pause = 0.02
        client = Asgi(server, CHAT, json.dumps({**SAY, "stream": stream, "n": 2}).encode())
        task = asyncio.create_task(client.run())
        while server.engine.running < 2:
            await asyncio.sleep(0.01)
        client.left.set()
        await asyncio.wait_for(task, 5)
        assert server.engine.running == 0
        assert server.engine.cancelled == 2
        assert server.hosting.find(None).leases == 0

    asyncio.run(run())


def test_a_client_that_does_not_read_loses_its_place(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "phiquant.server")

    async def run() -> None:
        server = make("word " * 50, client_timeout=0.1)
        server.engine.pause = 0.01
        client = Asgi(server, CHAT, json.dumps({**SAY, "stream": True}).encode())
        task = asyncio.create_task(client.run())
        while server.engine.running < 1:
            await asyncio.sleep(0.005)
        client.stalled.set()
        await asyncio.wait_for(task, 5)
        assert server.engine.running == 0
        assert not any(message.get("more_body") is False for message in client.sent[1:])

    asyncio.run(run())
    (entry,) = caplog.records
    assert entry.name.endswith("access")  # no failure of the server
    assert "the client took nothing for 0.1 s" in entry.getMessage()


def test_a_client_that_sends_slowly_is_not_waited_for(make: Make) -> None:
    async def run() -> None:
        client = Asgi(make(client_timeout=0.1), CHAT, b"")

        async def slow() -> dict[str, Any]:
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": b" ", "more_body": True}

        client.receive = slow  # type: ignore[method-assign]
        await asyncio.wait_for(client.run(), 5)
        assert client.status == 408

    asyncio.run(run())


def test_while_a_long_prompt_is_computed_the_stream_shows_signs_of_life(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phiquant.server.streaming.PATIENCE", 0.05)
    monkeypatch.setattr("phiquant.server.streaming.HEARTBEAT", 0.02)
    server = make(" Yes.")
    server.engine.pause = 0.15
    text = server.post(CHAT, **SAY, stream=True).text
    assert text.startswith(": still here\n\n")
    assert text.endswith("data: [DONE]\n\n")
    server.engine.error, server.engine.error_after = ValueError("a secret"), 0
    text = server.post(CHAT, **SAY, stream=True).text
    assert "the server failed" in text
    assert "secret" not in text
