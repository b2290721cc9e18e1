"""A client of HTTP that costs little beside the server it measures: one connection a request, answers in pieces.

Servers and clients share the processor here, and a general client takes as long for an event as a small model for a
token. This one knows what the servers measured here send: a length or chunks, and server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "ask", "free_port", "head_of", "post"]


@dataclass
class Answer:
    """An answer that has begun; its body is read as it comes."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body. asyncio.IncompleteReadError: the server broke it off."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))

    async def events(self) -> AsyncGenerator[Any, None]:
        """The data of server-sent events, parsed, without the mark of the end."""
        buffer = b""
        async for piece in self.pieces():
            *whole, buffer = (buffer + piece).split(b"\n\n")
            for block in whole:
                for line in block.splitlines():
                    if line.startswith(b"data: ") and line != b"data: [DONE]":
                        yield json.loads(line[6:])

    async def json(self) -> Any:
        """The whole body."""
        return json.loads(b"".join([piece async for piece in self.pieces()]))


def head_of(port: int, method: str, path: str, length: int | None) -> bytes:
    """The head of a request that asks for the connection to be closed after it."""
    body = "" if length is None else f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n{body}\r\n".encode()


@asynccontextmanager
async def ask(port: int, request: bytes) -> AsyncGenerator[Answer, None]:
    """Send the bytes of a request and read the head of the answer; leaving closes the connection, whatever comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        yield Answer(
            int(first.split(" ")[1]), {name.lower(): value.strip().lower() for name, _, value in pairs}, reader, writer
        )
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def post(port: int, path: str, body: Any) -> Any:
    """As `ask`, of JSON."""
    data = json.dumps(body).encode()
    return ask(port, head_of(port, "POST", path, len(data)) + data)


def free_port() -> int:
    """A port that nobody uses, for servers that must be told one."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port
