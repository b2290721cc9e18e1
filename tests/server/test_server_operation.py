"""What whoever runs the server sees: metrics, the log, the page, the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from phiquant.server import page
from phiquant.server.logs import Record, line_of

from .conftest import Make, Server

SAY = {"messages": [{"role": "user", "content": "Hello"}]}


def samples(server: Server) -> dict[tuple[str, str], float]:
    """Values by name and by the labels, joined."""
    families = text_string_to_metric_families(server.ask("GET", "/metrics").text)
    return {(s.name, " ".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_metrics_count_requests_and_tokens(make: Make) -> None:
    server = make(metrics=True)
    before = samples(server)
    assert before["phiquant_model_loaded", "tiny"] == 0
    tokens = server.post("/v1/chat/completions", **SAY).json()["usage"]
    server.post("/v1/chat/completions", **SAY, stream=True)
    server.post("/v1/chat/completions", messages=[])
    for attempt in range(3):
        server.ask("GET", f"/nobody/{attempt}")
        server.ask("GET", f"/stranger/{attempt}", headers={"host": "evil.example"})
        server.ask("OPTIONS", f"/before/{attempt}")
    found = samples(server)
    assert found["phiquant_requests_total", "/v1/chat/completions 200"] == 2
    assert found["phiquant_requests_total", "/v1/chat/completions 400"] == 1
    assert found["phiquant_requests_total", "other 404"] == 3
    assert found["phiquant_requests_total", "other 403"] == found["phiquant_requests_total", "other 204"] == 3
    assert found["phiquant_requests_total", "/metrics 200"] == 1
    assert not any(path in labels for _, labels in found for path in ("nobody", "stranger", "before"))
    assert found["phiquant_prompt_tokens_total", "tiny"] == 2 * tokens["prompt_tokens"]
    assert found["phiquant_generated_tokens_total", "tiny"] == 8
    assert found["phiquant_cached_tokens_total", "tiny"] == 4
    assert found["phiquant_first_token_seconds_count", "tiny"] == 2
    assert found["phiquant_waiting", "tiny"] == 3
    assert found["phiquant_pages_total", "tiny"] == 8
    assert found["phiquant_preempted", "tiny"] == 2
    assert found["phiquant_model_loaded", "tiny"] == 1


def test_a_line_of_the_log_cannot_be_forged() -> None:
    record = Record("GET", "/a\n2026 fake\x1b[31m", "127.0.0.1", status=404)
    line = line_of(record, "text")
    assert line.isprintable()
    assert json.loads(line_of(record, "json"))["path"] == record.path
    assert "\n" not in line_of(record, "json")


def test_the_log_has_counts_and_no_words(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "phiquant.server")
    server = make(" It is blue.", api_keys=("sk-secret",), log_format="json")
    server.ask("POST", "/v1/chat/completions", SAY, headers={"authorization": "Bearer sk-secret"})
    (entry,) = (json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("access"))
    assert entry["completion_tokens"] == 4
    assert entry["finish"] == "stop"
    assert entry["status"] == 200
    assert entry["first_token_seconds"] <= entry["seconds"]
    assert not any(secret in caplog.text for secret in ("sk-secret", "Hello", "blue"))


def test_models_are_listed_without_being_loaded(make: Make) -> None:
    server = make(names=("one", "two"))
    listed = server.ask("GET", "/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["one", "two"]
    assert server.loads == []
    assert server.post("/v1/chat/completions", **SAY, model="two").json()["model"] == "two"
    assert server.loads == ["two"]
    assert server.ask("GET", "/v1/models/two").json()["meta"]["n_ctx"] == 256
    assert server.ask("GET", "/v1/models/a/b").status_code == 404


def test_the_document_describes_every_endpoint(server: Server) -> None:
    document = server.ask("GET", "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/messages", "/completion", "/api/chat"} <= document["paths"].keys()
    fields = document["components"]["schemas"]["ChatBody"]
    assert "messages" in json.dumps(fields)


def test_the_page_is_served_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<h1>")
    (tmp_path / "assets" / "main.js").write_text("1")
    app = FastAPI()
    assert page.mount(app, tmp_path) == {"/", "/assets/main.js"}
    import asyncio

    import httpx

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            answer = await client.get("/")
            assert answer.headers["content-type"].startswith("text/html")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "unsafe" not in policy
            script = await client.get("/assets/main.js")
            assert script.headers["content-type"].startswith("text/javascript")
            (tmp_path / "secret").write_text("x")
            assert (await client.get("/secret")).status_code == 404
            assert (await client.get("/assets/../secret")).status_code == 404

    asyncio.run(run())
    assert page.mount(FastAPI(), tmp_path / "nowhere") == frozenset()


def test_the_page_needs_no_key(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<h1>")
    monkeypatch.setattr(page.mount, "__defaults__", (tmp_path,))
    server = make(api_keys=("one",))
    assert server.ask("GET", "/").status_code == 200
    assert server.ask("GET", "/v1/models").status_code == 401
