"""GET /metrics: what is counted, for Prometheus."""

from collections.abc import Set
from typing import Any, Final

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from phiquant.server.hosting import Hosting
from phiquant.server.logs import Record

__all__ = ["Counters", "routes"]

PATH: Final = "/metrics"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Counters:
    """Counts requests as they end; the engines are looked at when somebody asks.

    Args:
        hosting: the models.
        paths: addresses that are counted each by itself; all others count as one, so that strangers do not make names.
    """

    def __init__(self, hosting: Hosting, paths: Set[str]) -> None:
        self._hosting, self._paths = hosting, frozenset(paths) | {PATH}
        self.registry = CollectorRegistry()
        of: Any = {"registry": self.registry, "namespace": "phiquant"}
        self._requests = Counter("requests", "Requests, by address and status.", ["path", "status"], **of)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **of)
        self._cached = Counter("cached_tokens", "Those taken from earlier work.", ["model"], **of)
        self._generated = Counter("generated_tokens", "Tokens that were generated.", ["model"], **of)
        self._seconds = Histogram(
            "request_seconds", "From a request to the end of its answer.", ["model"], buckets=_SECONDS, **of
        )
        self._first = Histogram(
            "first_token_seconds", "From a request to its first token.", ["model"], buckets=_SECONDS, **of
        )
        self._speed = Histogram(
            "generated_tokens_per_second", "Of a request, after its first.", ["model"], buckets=_SPEEDS, **of
        )
        gauges = (
            ("running", "Sequences that have a place in the steps."),
            ("waiting", "Sequences that wait for one."),
            ("pages_used", "Pages of the cache that sequences have."),
            ("pages_total", "Pages of the cache."),
            ("preempted", "How often a sequence gave its pages up for others, since the model was loaded."),
        )
        self._gauges = {name: Gauge(name, text, ["model"], **of) for name, text in gauges}
        self._loaded = Gauge("model_loaded", "Whether a model is in memory.", ["model"], **of)

    def count(self, record: Record) -> None:
        """A request has ended."""
        path = record.path if record.path in self._paths else "other"
        self._requests.labels(path, str(record.status)).inc()
        if not record.model:
            return
        model = record.model
        self._prompt.labels(model).inc(record.prompt_tokens)
        self._cached.labels(model).inc(record.cached_tokens)
        self._generated.labels(model).inc(record.completion_tokens)
        self._seconds.labels(model).observe(record.seconds)
        first = record.first_seconds
        if first is not None:
            self._first.labels(model).observe(first)
            if record.completion_tokens > 1 and record.seconds > first:
                self._speed.labels(model).observe((record.completion_tokens - 1) / (record.seconds - first))

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        for hosted in self._hosting.hosted.values():
            name, loaded = hosted.model.name, hosted.loaded
            self._loaded.labels(name).set(loaded is not None)
            stats = None if loaded is None else loaded.engine.stats()
            for gauge, labelled in self._gauges.items():
                labelled.labels(name).set(0 if stats is None else getattr(stats, gauge))
        return generate_latest(self.registry)


def routes(counters: Counters) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["operation"])

    @router.get(PATH, summary="Counts and durations, for Prometheus")
    async def metrics() -> Response:
        return Response(counters.text(), media_type=CONTENT_TYPE_LATEST)

    return router
