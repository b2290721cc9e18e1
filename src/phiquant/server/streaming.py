"""Answers: JSON at once, or in pieces as they come, for as long as the client stays."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from phiquant.server.failures import ENDING, Failure, failure_of
from phiquant.server.guard import RECORD
from phiquant.server.logs import Record

__all__ = ["DONE", "Json", "Stream", "attended", "event", "line", "record_of"]

PATIENCE: Final = 5.0
"""Seconds to the first piece within which a refusal still gets a status of its own."""
HEARTBEAT: Final = 15.0
"""Seconds between signs of life while there is nothing to say."""

T = TypeVar("T")


def _dumped(value: Any) -> bytes:
    # Half a surrogate pair becomes the escape that JSON has for it, and so never fails.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Json(Response):
    """JSON, also of texts that are not valid Unicode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return _dumped(content)


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event; `name` is its type, where a family has one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _dumped(data) + b"\n\n"


def line(data: Any) -> bytes:
    """A line of JSON, as Ollama streams."""
    return _dumped(data) + b"\n"


DONE: Final = b"data: [DONE]\n\n"


def record_of(request: Request) -> Record:
    """The line of the log that a request will become."""
    record: Record = request.scope[RECORD]
    return record


async def attended(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        record_of(request).finish = "disconnected"
        raise Failure(400, "the client left")
    finally:
        await _end(task, watch)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Stream(Response):
    """An answer in pieces.

    The first piece is waited for before the status is sent, so that what is refused at once has its own; if it takes
    long, the answer begins with a sign of life. The pieces' generator is closed when the client leaves or takes none
    of them for too long, which ends the work behind it.

    Args:
        pieces: encoded.
        failed: what to send for an error that comes in the midst of it.
        media_type: of the answer.
        heartbeat: what to send while there is nothing to say; nothing if empty.
        limit: most seconds that the client may take for a piece.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        failed: Callable[[Failure], bytes],
        *,
        media_type: str = "text/event-stream",
        heartbeat: bytes = b": still here\n\n",
        limit: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", **(headers or {})}, media_type)
        del self.headers["content-length"]
        self._pieces, self._failed, self._heartbeat, self._limit = pieces, failed, heartbeat, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        record: Record = scope[RECORD]
        producing = asyncio.ensure_future(self._produce(send, record))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({producing, watch}, return_when=asyncio.FIRST_COMPLETED)
            if producing.done():
                producing.result()
            else:
                record.finish = "disconnected"
        except asyncio.CancelledError:
            await _end(producing, watch)
            if record.status:
                await self._piece(send, self._failed(ENDING))
                await self._piece(send, b"", more=False)
            raise
        finally:
            await _end(producing, watch)

    async def _produce(self, send: Send, record: Record) -> None:
        async with aclosing(self._pieces) as pieces:
            first = asyncio.ensure_future(anext(pieces))
            try:
                await asyncio.wait({first}, timeout=PATIENCE)
                if first.done():
                    first.result()  # refusals leave here
                await self._start(send)
                while not first.done():
                    await self._piece(send, self._heartbeat)
                    await asyncio.wait({first}, timeout=HEARTBEAT)
            finally:
                await _end(first)
            try:
                await self._piece(send, first.result())
                async for piece in pieces:
                    await self._piece(send, piece)
            except (asyncio.CancelledError, _TooSlow):
                raise
            except Exception as error:
                failure = failure_of(error)
                record.error = failure.message
                await self._piece(send, self._failed(failure))
                if failure.status >= 500:
                    await self._piece(send, b"", more=False)
                    raise
            await self._piece(send, b"", more=False)

    async def _start(self, send: Send) -> None:
        await self._timed(
            send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )

    async def _piece(self, send: Send, piece: bytes, more: bool = True) -> None:
        await self._timed(send, {"type": "http.response.body", "body": piece, "more_body": more})

    async def _timed(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._limit):
                await send(message)
        except TimeoutError:
            raise _TooSlow(408, f"the client took nothing for {self._limit:g} s") from None


class _TooSlow(Failure):
    """The client does not read: there is nobody to be told."""
