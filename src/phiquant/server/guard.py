"""What every request passes before a model hears of it: who asks, from where, and with how much.

In this order, each with a status of its own: the Host header (403), the Origin (403), the key (401), the type (415) and
the size (413) of the body, and the time that it takes (408). The body is read here, whole, so that nothing behind it
waits for a slow client. A page of another site that a user has open cannot reach the server: a browser tells the
Origin, or at least, where an attacker's name was made to point to this machine, the Host.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phiquant.server.failures import ENDING, Failure, body_of, failure_of, family_of
from phiquant.server.logs import Record
from phiquant.server.settings import LOCAL, Settings

__all__ = ["RECORD", "Guard"]

RECORD: Final = "phiquant.record"
"""Key of a request's `Record` in its scope."""

OPEN: Final = ("/health", "/v1/health")
"""What needs no key, besides the page: it holds nothing, and asks for the key itself."""

_METHODS: Final = b"GET, POST, OPTIONS"
_log = logging.getLogger("phiquant.server")


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        settings: see there.
        public: further paths that need no key.
        done: is told the record of every request, once it has been answered.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, public: frozenset[str], done: Callable[[Record], None]
    ) -> None:
        self._app, self._settings, self._done = app, settings, done
        self._public = public | set(OPEN)
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = Record(scope["method"], scope["path"], client[0] if client else "")
        scope[RECORD] = record
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        extra: list[tuple[bytes, bytes]] = [(b"x-content-type-options", b"nosniff")]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            self._check_host(headers)
            extra += self._cross_origin(headers)
            if scope["method"] == "OPTIONS":
                await _respond(answer, 204, None, {})
                return
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                receive = await self._body(headers, receive)
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:  # the server ends, and has no more time for this; nobody waits for the task
            record.finish = "cancelled"
            if not record.status:
                ending = failure_of(ENDING)
                await _respond(answer, ending.status, body_of(ending, family_of(scope["path"])), ending.headers)
        except Exception as error:
            failure = failure_of(error)
            record.error = failure.message
            if failure.status >= 500:
                _log.error("%s %s failed", record.method, ascii(record.path)[:200], exc_info=error)
            if record.status:  # the answer has begun; all that is left is to break it off, if it is not complete
                return
            await _respond(answer, failure.status, body_of(failure, family_of(scope["path"])), failure.headers)
        finally:
            record.seconds = time.perf_counter() - record.begin
            self._done(record)

    def _check_host(self, headers: dict[str, str]) -> None:
        allowed = self._settings.allowed_hosts
        if "*" in allowed:
            return
        name = _name(headers.get("host", ""))
        own = self._settings.host.strip("[]").lower()
        if name in LOCAL or name == own or name in (host.lower() for host in allowed):
            return
        # Reached from other machines it has addresses that nobody listed; no attacker's name is among them.
        if own in ("0.0.0.0", "::") and _is_address(name):
            return
        raise Failure(403, f"this server is not called {name[:100]!r}; --allowed-hosts gives it further names")

    def _cross_origin(self, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        """Headers that let a page of another origin read the answer; Failure if it must not even ask."""
        origin = headers.get("origin")
        if origin is None:
            return []
        listed = [known.rstrip("/") for known in self._settings.cors]
        if origin not in listed and "*" not in listed:
            parts = urlsplit(origin) if origin.isprintable() and "[" not in origin else None
            if parts is None or parts.scheme not in ("http", "https") or parts.netloc != headers.get("host"):
                raise Failure(403, f"pages of {origin[:100]!r} may not ask; --cors lets them")
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", headers.get("access-control-request-headers", "*").encode("latin-1")),
            (b"access-control-max-age", b"600"),
            (b"vary", b"Origin"),
        ]

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        """The key of OpenAI's clients (Authorization) or of Anthropic's (x-api-key)."""
        if not self._keys or path in self._public:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        candidates = [given.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        right = [hmac.compare_digest(key, found.encode("latin-1")) for key in self._keys for found in candidates]
        if not any(right):
            said = "a key is needed: Authorization: Bearer KEY" if not any(candidates) else "the key is not known here"
            raise Failure(401, said, code="invalid_api_key")

    async def _body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the whole body; what is received from then on begins with it."""
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
            raise Failure(415, "the body must be JSON, with the header Content-Type: application/json")
        most = self._settings.max_body
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise Failure(413, f"the body has {length[:20]} bytes; {most} are the most (--max-body)")
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._settings.client_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Failure(400, "the client left before its request was complete")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > most:
                        raise Failure(413, f"the body has more than {most} bytes, which are the most (--max-body)")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Failure(408, f"the body took longer than {self._settings.client_timeout:g} s") from None
        whole: Message | None = {"type": "http.request", "body": b"".join(pieces), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        return replay


async def _respond(send: Callable[[Message], Awaitable[None]], status: int, body: Any, headers: dict[str, str]) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    if body is not None:
        pairs += [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": data})


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
