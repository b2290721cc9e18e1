"""The Hub as far as models are concerned, on 127.0.0.1, with ways to misbehave; and programs that use it.

Large files are answered as the Hub does: a redirect with the SHA-256 to another host, which gives out ranges.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
Request = http.server.BaseHTTPRequestHandler


@dataclass
class Seen:
    """A request for a file."""

    method: str
    name: str
    range: str | None
    authorization: str | None
    store: bool  # of the host that large files are redirected to


class Hub:
    """Repositories of files in memory."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.seen: list[Seen] = []
        self.status: dict[str, tuple[int, str]] = {}  # beginning of a path -> status and X-Error-Code
        self.cut: dict[str, list[int]] = {}  # file -> bytes sent before the connection breaks, once each
        self.pause: dict[str, float] = {}  # file -> seconds between pieces
        self.damaged: set[str] = set()  # these arrive with other bytes than were announced
        self.gated: dict[str, str] = {}  # repository -> the token that opens it
        self.no_ranges = False  # the whole file, whatever was asked for
        self.commit = COMMIT
        self.sha256: str | None = None  # instead of the true ones, in listings
        self.endpoint = ""
        self.store = ""

    def gets(self, name: str) -> list[str | None]:
        """The ranges in which a file's content was asked for."""
        return [seen.range for seen in self.seen if seen.name == name and seen.method == "GET"]

    def answer(self, request: Request) -> None:
        path = urllib.parse.unquote(request.path.split("?")[0])
        for prefix, (status, code) in self.status.items():
            if path.startswith(prefix):
                _send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
                return
        if path == "/api/models":
            self._search(request)
        elif path.startswith("/api/models/"):
            self._api(request, path.removeprefix("/api/models/"))
        elif path.startswith("/store/"):
            repository, _, name = path.removeprefix("/store/").partition("//")
            self._content(request, repository, name, {})
        else:
            self._resolve(request, path)

    def _search(self, request: Request) -> None:
        query = urllib.parse.parse_qs(request.path.partition("?")[2])
        author, search = query.get("author", [""])[0], query.get("search", [""])[0]
        names = [n for n in self.repositories if n.startswith(author) and search.lower() in n.lower()]
        _json(request, [{"id": name, "modelId": name, "tags": [], "downloads": 0, "private": False} for name in names])

    def _api(self, request: Request, path: str) -> None:
        repository = "/".join(path.split("/")[:2])
        files = self.repositories.get(repository)
        if files is None:
            _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        revision = path.partition("/revision/")[2]
        if revision and revision not in ("main", "v1", self.commit):
            _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            _json(request, [{"type": "file", "path": name, **self._stored(data, name)} for name, data in files.items()])
        else:
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": _git_oid(data), "lfs": self._stored(data, name)["lfs"]}
                for name, data in files.items()
            ]
            info = {"id": repository, "sha": self.commit, "private": False, "tags": [], "downloads": 0}
            _json(request, {**info, "siblings": siblings})

    def _stored(self, data: bytes, name: str) -> dict[str, Any]:
        digest = self.sha256 or sha256(data)
        pointer = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 130}
        return {"size": len(data), "oid": _git_oid(data), "lfs": pointer if _is_large(name) else None}

    def _resolve(self, request: Request, path: str) -> None:
        repository = "/".join(path.split("/")[1:3])
        name = path.partition("/resolve/")[2].partition("/")[2]
        if repository not in self.repositories or name not in self.repositories[repository]:
            code = "EntryNotFound" if repository in self.repositories else "RepoNotFound"
            _send(request, 404, b"{}", {"X-Error-Code": code})
            return
        self._saw(request, name, store=False)
        token = self.gated.get(repository)
        if token is not None and request.headers.get("Authorization") != f"Bearer {token}":
            _send(request, 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            return
        data = self.repositories[repository][name]
        headers = {"X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if not _is_large(name):
            self._content(request, repository, name, {**headers, "ETag": f'"{_git_oid(data)}"'}, seen=True)
            return
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        place = f"{self.store}/store/{repository}//{urllib.parse.quote(name)}?signature=x"
        _send(request, 302, b"", {**headers, "Location": place})

    def _content(
        self, request: Request, repository: str, name: str, headers: dict[str, str], *, seen: bool = False
    ) -> None:
        if not seen:
            self._saw(request, name, store=True)
        data = self.repositories[repository][name]
        begin = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.no_ranges:
            begin = 0
        if begin >= len(data) > 0:
            _send(request, 416, b"", {})
            return
        if name in self.damaged:
            data = bytes(byte ^ 1 for byte in data)
        if begin:
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        cuts = self.cut.get(name) if request.command == "GET" else None
        _send(
            request,
            206 if begin else 200,
            data[begin:],
            headers,
            cut=cuts.pop(0) if cuts else None,
            pause=self.pause.get(name, 0.0),
        )

    def _saw(self, request: Request, name: str, *, store: bool) -> None:
        headers = request.headers
        self.seen.append(Seen(request.command, name, headers.get("Range"), headers.get("Authorization"), store))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(name: str) -> bool:
    return name.lower().endswith((".gguf", ".safetensors", ".bin"))


def _json(request: Request, value: object) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(
    request: Request,
    status: int,
    body: bytes,
    headers: Mapping[str, str],
    *,
    cut: int | None = None,
    pause: float = 0.0,
) -> None:
    request.send_response(status)
    for key, value in headers.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "GET":
        return
    sent = body if cut is None else body[:cut]
    try:
        for begin in range(0, len(sent), 1 << 19):
            request.wfile.write(sent[begin : begin + (1 << 19)])
            if pause:
                request.wfile.flush()
                time.sleep(pause)
        if cut is not None:
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
    except OSError:  # the client went away
        request.close_connection = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The Hub answers while inside; `hub.endpoint` is its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.store = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Of a process that takes `endpoint` for the Hub and keeps its cache in `home`."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()
    }
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**clean, **settings, "HF_HUB_DISABLE_XET": "1", **more}


def run(*arguments: str, endpoint: str, home: Path, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the library reads its environment when it is imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(endpoint, home, **more),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def interrupted(
    *arguments: str, endpoint: str, home: Path, when: Callable[[], bool], **more: str
) -> subprocess.CompletedProcess[str]:
    """Run Python and press Ctrl-C as soon as `when` says so."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(endpoint, home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not when() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
