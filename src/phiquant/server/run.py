"""The process: opens the address, serves until it is told to end, and lets what is under way finish."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phiquant.errors import RequestError
from phiquant.server import logs
from phiquant.server.app import create_app
from phiquant.server.hosting import Hosting
from phiquant.server.settings import Settings

__all__ = ["serve"]

_log = logging.getLogger("phiquant.server")


def serve(settings: Settings, *, ready: Callable[[str], None], quiet: bool = False) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit status.

    A single model is loaded before anybody is let in, so that what is wrong with it is told at once.
    ready: is told the address, once requests are accepted.
    Raises RequestError if the address cannot be had, and what `LLM.load` raises.
    """
    logs.set_up(settings.log_format, quiet=quiet)
    with _Signals() as signals:
        return asyncio.run(_serve(settings, ready, signals))


async def _serve(settings: Settings, ready: Callable[[str], None], signals: "_Signals") -> int:
    hosting = Hosting(settings.models, idle_timeout=settings.idle_timeout)
    listening = _listen(settings)
    try:
        if len(settings.models) == 1:
            await hosting.ready(hosting.find(None))
        server = uvicorn.Server(_config(settings, hosting))
        announced = asyncio.create_task(_announce(server, settings, listening, ready))
        signals.serving = True
        try:
            await server.serve(sockets=[listening])
        finally:
            announced.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await announced
    finally:
        listening.close()
        await hosting.close()
    return 130 if signal.SIGINT in signals.seen else 0


def _config(settings: Settings, hosting: Hosting) -> uvicorn.Config:
    class Protocol(_Impatient):
        limit = settings.client_timeout

    return uvicorn.Config(
        create_app(settings, hosting),
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)) if settings.shutdown_timeout else 0,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        h11_max_incomplete_event_size=1 << 16,
    )


class _Impatient(H11Protocol):
    """Ends connections whose client takes too long to say what it wants: a head that never becomes complete."""

    limit = 30.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._timer is None:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._stop_watching()
        super().on_response_complete()

    def _watch(self) -> None:
        self._stop_watching()
        self._timer = self.loop.call_later(self.limit, self._give_up)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


def _listen(settings: Settings) -> socket.socket:
    """The open socket; RequestError names the address that cannot be had."""
    host = settings.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{host:.100} is no address to listen at: {reason}; choose another: --host") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        reason = error.strerror or str(error)
        raise RequestError(f"port {settings.port} of {host} cannot be had: {reason}; choose another: --port") from None
    return made


async def _announce(
    server: uvicorn.Server, settings: Settings, listening: socket.socket, ready: Callable[[str], None]
) -> None:
    while not server.started:
        await asyncio.sleep(0.02)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    ready(f"{'https' if settings.tls_cert else 'http'}://{shown}:{port}")


class _Signals:
    """Notes SIGTERM and SIGINT while the server runs: it has ended in order when it raises them again.

    Before, while a model is loaded, they end the process. seen: which came.
    """

    def __init__(self) -> None:
        self.serving = False
        self.seen: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(number)
        if not self.serving or len(self.seen) > 2:
            raise KeyboardInterrupt
