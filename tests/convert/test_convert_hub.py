"""Fetching from the Hub, against a server of our own on 127.0.0.1 that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phiquant.convert.hub import resolve
from phiquant.errors import RequestError

COMMIT = "a" * 40
REPOSITORY = "org/Phi-3-test"


class Hub:
    """One repository of files in memory, with ways to misbehave."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.status: dict[str, tuple[int, str]] = {}  # path -> status and X-Error-Code
        self.cut: dict[str, int] = {}  # file -> bytes sent before the connection breaks, once

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        for prefix, (status, code) in self.status.items():
            if path.startswith(prefix):
                self.send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
                return
        if path.startswith(f"/api/models/{REPOSITORY}"):
            revision = path.rpartition("/revision/")[2]
            if "/revision/" in path and revision not in ("main", "v1", COMMIT):
                self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.files.items()
                ]
                self.send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
                return
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": REPOSITORY, "sha": COMMIT, "private": False, "siblings": siblings, "tags": [], "downloads": 0}
            self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
        if not path.startswith(f"/{REPOSITORY}/") or name not in self.files:
            code = "EntryNotFound" if path.startswith(f"/{REPOSITORY}/") else "RepoNotFound"
            self.send(request, 404, b"{}", {"X-Error-Code": code})
            return
        self.requests.append((request.command, name, request.headers.get("Range")))
        self.send_file(request, name)

    def send_file(self, request: http.server.BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        asked = (request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start = int(asked[0] or 0)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.cut.pop(name, None) if request.command == "GET" else None
        self.send(request, 206 if start else 200, data[start:], headers, cut=cut)

    def send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        *,
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True


@pytest.fixture
def hub(checkpoint: Callable[..., Path]) -> Iterator[tuple[Hub, str]]:
    directory = checkpoint(shards=2, hidden_size=32)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files |= {
        "README.md": b"---\nlicense: mit\n---\n",
        "original/model.bin": b"x" * 100,
        "pytorch_model.bin": b"y" * 100,
    }
    files |= {"adapter.safetensors": b"z" * 100, "weights.gguf": b"GGUF" + bytes(60)}
    served = Hub(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def run(program: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its environment when it is imported."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, **settings, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fetch(model: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        "from phiquant.convert.hub import resolve\nfrom phiquant.errors import RequestError\n"
        f"try: print(resolve({model!r}, quiet=True))\nexcept RequestError as error: print('ERROR', error)"
    )
    return run(program, endpoint, home, **environment)


def test_only_what_is_needed_is_fetched(hub: tuple[Hub, str], tmp_path: Path) -> None:
    served, endpoint = hub
    done = fetch(REPOSITORY, endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    unneeded = {"original/model.bin", "pytorch_model.bin", "adapter.safetensors", "weights.gguf"}
    assert {name for _, name, _ in served.requests} == set(served.files) - unneeded
    for name in set(served.files) - unneeded:
        assert (path / name).read_bytes() == served.files[name]
    assert path.parent.parent.name == "models--org--Phi-3-test"


@pytest.mark.cpu
def test_a_repository_becomes_gguf_in_one_step(hub: tuple[Hub, str], tmp_path: Path) -> None:
    _, endpoint = hub
    out = tmp_path / "out"
    out.mkdir()
    program = f"from phiquant.convert import quantize\nquantize({REPOSITORY!r}, {str(out)!r}, 'Q8_0', quiet=True)"
    done = run(program, endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["Phi-3-test-Q8_0.gguf"]


def test_an_interrupted_download_is_resumed(hub: tuple[Hub, str], tmp_path: Path) -> None:
    served, endpoint = hub
    shard = "model-00001-of-00002.safetensors"
    served.files[shard] = served.files[shard] * 12  # the library keeps whole chunks of 10 MB
    assert len(served.files[shard]) > 15e6
    half = 12_000_000
    served.cut[shard] = half
    first = fetch(REPOSITORY, endpoint, tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="5")
    if "ERROR" in first.stdout:
        assert "run again to resume" in first.stdout
        second = fetch(REPOSITORY, endpoint, tmp_path / "home")
    else:
        second = first  # the library tried again by itself
    assert (Path(second.stdout.strip()) / shard).read_bytes() == served.files[shard]
    ranges = [asked for method, name, asked in served.requests if (method, name) == ("GET", shard)]
    assert any(asked and 0 < int(asked.removeprefix("bytes=").split("-")[0]) <= half for asked in ranges), ranges


def test_revisions_and_single_files(hub: tuple[Hub, str], tmp_path: Path) -> None:
    served, endpoint = hub
    assert "ERROR" not in fetch(f"{REPOSITORY}@v1", endpoint, tmp_path / "home").stdout
    path = Path(fetch(f"{REPOSITORY}/weights.gguf", endpoint, tmp_path / "home").stdout.strip())
    assert path.read_bytes() == served.files["weights.gguf"]
    done = fetch(f"{REPOSITORY}@nope", endpoint, tmp_path / "home")
    assert "ERROR org/Phi-3-test has no revision 'nope'" in done.stdout
    done = fetch(f"{REPOSITORY}/nope.gguf", endpoint, tmp_path / "home")
    assert "ERROR org/Phi-3-test has no file nope.gguf" in done.stdout


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "RepoNotFound", "the Hub has no repository org/Phi-3-test"),
        (401, "RepoNotFound", "the Hub has no repository org/Phi-3-test"),
        (403, "GatedRepo", "org/Phi-3-test is gated: accept its terms"),
        (403, "", "The Hub does not give out org/Phi-3-test: 403 Forbidden"),
    ],
)
def test_refusals_are_one_sentence(hub: tuple[Hub, str], tmp_path: Path, status: int, code: str, sentence: str) -> None:
    served, endpoint = hub
    served.status["/"] = (status, code)
    done = fetch(REPOSITORY, endpoint, tmp_path / "home")
    assert done.stdout.startswith("ERROR"), done.stderr
    assert sentence in done.stdout
    assert done.stdout.count("\n") == 1


def test_without_a_network(hub: tuple[Hub, str], tmp_path: Path) -> None:
    _, endpoint = hub
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = fetch(REPOSITORY, nobody, tmp_path / "empty")
    assert "the Hub cannot be reached" in done.stdout, done.stdout + done.stderr
    done = fetch(REPOSITORY, endpoint, tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert "the Hub cannot be reached" in done.stdout, done.stdout + done.stderr
    path = fetch(REPOSITORY, endpoint, tmp_path / "home").stdout
    assert fetch(REPOSITORY, endpoint, tmp_path / "home", HF_HUB_OFFLINE="1").stdout == path
    assert fetch(REPOSITORY, nobody, tmp_path / "home").stdout == path


@pytest.mark.parametrize(
    "model",
    ["a b/c", "one", "a/b/c", "../x/y", "org/..", "", "org/name@", "\0", "https://huggingface.co/org/name", "x" * 5000],
)
def test_what_is_no_repository(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="neither a file, a directory nor a repository id"):
        resolve(model or "nothing")


def test_what_exists_is_not_fetched(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
