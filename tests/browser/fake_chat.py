"""A server for the page's tests: it serves the page as `phiquant serve` does, and streams canned answers slowly."""

import json
import mimetypes
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAGE = Path(__file__).resolve().parents[2] / "src" / "phiquant" / "server" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CONTEXT = 4096  # tokens


@dataclass
class Canned:
    """What the server answers, and what it was asked.

    Attributes:
        answers: text by the last message of the user; "" is what is answered to all others.
        pause: seconds between pieces.
        models: names.
        key: what requests must carry; None: nothing.
        refusals: (status, body as JSON or text of HTML, headers) of the next chats, in order; status 0 breaks the
            stream after some pieces.
        bodies: of the chats, parsed.
        cancelled: how many streams the browser left.
    """

    answers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.01
    models: tuple[str, ...] = ("phi-4-mini-Q4_K_M",)
    key: str | None = None
    refusals: list[tuple[int, Any, dict[str, str]]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cancelled: int = 0


class Handler(BaseHTTPRequestHandler):
    canned: Canned

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            self._json(200, {"status": "ok"})
        elif path == "/v1/models":
            if self._allowed():
                models = [{"id": name, "object": "model", "created": 0} for name in self.canned.models]
                self._json(200, {"object": "list", "data": models})
        elif path == "/props":
            if self._allowed():
                self._json(200, {"default_generation_settings": {"n_ctx": CONTEXT, "params": {"temperature": 0.7}}})
        else:
            self._file(path)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "there is nothing at this address"}})
            return
        if not self._allowed():
            return
        self.canned.bodies.append(body)
        breaks = False
        if self.canned.refusals:
            status, said, headers = self.canned.refusals.pop(0)
            if status:
                if isinstance(said, str):
                    self._send(status, "text/html", said.encode(), headers)
                else:
                    self._json(status, said, headers)
                return
            breaks = True
        self._stream(body, breaks)

    def _allowed(self) -> bool:
        key = self.canned.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._json(401, {"error": {"message": "a key is needed", "code": "invalid_api_key"}})
        return False

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(body).encode(), headers or {})

    def _send(self, status: int, media: str, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _file(self, path: str) -> None:
        file = (PAGE / (path.removeprefix("/") or "index.html")).resolve()
        if not file.is_relative_to(PAGE) or not file.is_file():
            self._json(404, {"error": {"message": "there is nothing at this address"}})
            return
        self._send(200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes(), {})

    def _stream(self, body: dict[str, Any], breaks: bool) -> None:
        question = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        answers = self.canned.answers
        answer = answers.get(question, answers.get("", "A short answer."))
        pieces = [answer[at : at + 4] for at in range(0, len(answer), 4)]
        if breaks:
            pieces = pieces[: len(pieces) // 2]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        begin = time.monotonic()
        try:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for piece in pieces:
                time.sleep(self.canned.pause)
                self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if breaks:
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            prompt = sum(len(message["content"]) for message in body["messages"]) // 4
            usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces), "total_tokens": prompt + len(pieces)}
            speed = len(pieces) / max(time.monotonic() - begin, 1e-6)
            self._event({"choices": [], "usage": usage, "timings": {"predicted_per_second": speed}})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.canned.cancelled += 1

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()


class FakeChat:
    """The server, running while the context is open, at `url`."""

    def __init__(self, canned: Canned | None = None) -> None:
        self.canned = canned or Canned()
        handler = type("CannedHandler", (Handler,), {"canned": self.canned})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FakeChat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
