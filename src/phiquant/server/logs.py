"""One line per request, for people or as JSON; never what was said, and no key."""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

__all__ = ["Record", "line_of", "log", "set_up"]

_log = logging.getLogger("phiquant.server.access")


@dataclass
class Record:
    """A request and what became of it; those who serve it fill it in.

    Attributes:
        method, path, client: as the request has them.
        status: of the answer; 0 before there is one.
        model: which one answered.
        prompt_tokens, cached_tokens, completion_tokens: of all its choices.
        first: time.perf_counter() when the first text came.
        finish: how it ended; "disconnected" if the client left.
        error: what was answered instead.
        begin: time.perf_counter() when it came.
        seconds: how long it took.
    """

    method: str
    path: str
    client: str = ""
    status: int = 0
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first: float | None = None
    finish: str = ""
    error: str = ""
    begin: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    @property
    def first_seconds(self) -> float | None:
        """Seconds to the first text."""
        return None if self.first is None else self.first - self.begin


def line_of(record: Record, form: str) -> str:
    """A line without line breaks, whatever the path holds."""
    values: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": record.client,
        "method": record.method,
        "path": record.path[:500],
        "status": record.status,
        "seconds": round(record.seconds, 4),
    }
    if record.model:
        values["model"] = record.model
    if record.prompt_tokens or record.completion_tokens:
        values |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
        }
    if record.first_seconds is not None:
        values["first_token_seconds"] = round(record.first_seconds, 4)
    if record.finish:
        values["finish"] = record.finish
    if record.error:
        values["error"] = record.error[:500]
    if form == "json":
        return json.dumps(values)
    parts = [f"{values['time']} {record.client} {record.method} {record.path[:500]} {record.status}"]
    parts.append(f"{record.seconds:.3f} s")
    if record.model:
        parts.append(record.model)
    if "prompt_tokens" in values:
        parts.append(f"{record.prompt_tokens} + {record.completion_tokens} tokens")
    parts += [part for part in (record.finish, record.error[:500]) if part]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in ", ".join(parts))


def log(record: Record, form: str) -> None:
    """Write the record."""
    _log.info("%s", line_of(record, form))


class _Lines(logging.Formatter):
    """What is no record: warnings and failures."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form

    def format(self, entry: logging.LogRecord) -> str:
        if entry.name == _log.name:
            return entry.getMessage()
        message = super().format(entry)  # with the traceback, if there is one
        if self._form == "json":
            moment = datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="milliseconds")
            return json.dumps({"time": moment, "level": entry.levelname.lower(), "message": message})
        stamp = time.strftime("%H:%M:%S", time.localtime(entry.created))
        return f"{stamp} {entry.levelname.lower()}: {message}"


def set_up(form: str, *, quiet: bool = False) -> None:
    """Send all of it to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form))
    for name, level in (("phiquant.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet else level)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that leave in the midst of an answer
