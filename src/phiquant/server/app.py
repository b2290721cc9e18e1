"""The application: all endpoints, behind the guard."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from phiquant import __version__
from phiquant.server import (
    anthropic,
    llama_cpp,
    logs,
    metrics,
    models,
    ollama,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    page,
)
from phiquant.server.failures import failure_of
from phiquant.server.guard import Guard
from phiquant.server.hosting import Hosting
from phiquant.server.logs import Record
from phiquant.server.service import Service
from phiquant.server.settings import Settings
from phiquant.server.shapes.document import document

__all__ = ["create_app"]

_FAMILIES = (
    openai_chat,
    openai_completions,
    openai_responses,
    openai_embeddings,
    anthropic,
    llama_cpp,
    ollama,
    models,
)


def create_app(settings: Settings, hosting: Hosting | None = None) -> FastAPI:
    """The server of `settings` as an ASGI application; `hosting` may be given to bring models of another kind."""
    hosting = hosting or Hosting(settings.models, idle_timeout=settings.idle_timeout)
    service = Service(settings, hosting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        hosting.start()
        try:
            yield
        finally:
            await hosting.close()

    app = FastAPI(
        title="phiquant",
        version=__version__,
        summary="Microsoft's Phi models at the addresses that clients of OpenAI, Anthropic, llama.cpp and Ollama know",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    public = page.mount(app)
    addresses = {*public, "/openapi.json"}
    for module in _FAMILIES:
        router = module.routes(service)
        app.include_router(router)
        addresses |= {route.path for route in router.routes if isinstance(route, Route)}
    counters = metrics.Counters(hosting, addresses)
    if settings.metrics:
        app.include_router(metrics.routes(counters))
    app.openapi_version = "3.2.0"  # the first that describes the items of a stream
    app.openapi = cache(partial(document, app, keys=bool(settings.api_keys)))  # type: ignore[method-assign]
    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _raise)
    app.add_middleware(Guard, settings=settings, public=public, done=_teller(settings, counters))
    return app


async def _raise(request: Request, error: Exception) -> Response:
    """To the guard, which answers what goes wrong, whatever it is."""
    raise failure_of(error)


def _teller(settings: Settings, counters: metrics.Counters) -> Callable[[Record], None]:
    def done(record: Record) -> None:
        counters.count(record)
        logs.log(record, settings.log_format)

    return done
