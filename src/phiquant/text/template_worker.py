"""Renders one chat template after another, as a process of its own that a hostile template may exhaust.

Started by `sandbox.py` as a script (`python -I -S template_worker.py FOLDER…`), so nothing of phiquant is imported
here; the folders are where jinja2 and markupsafe are installed. `environment` is also used in-process, for known
templates.

A request or reply is eight bytes of length (little-endian) and UTF-8 JSON. Request: {"source", "context"}. Reply:
{"text"} or {"error"}. An empty reply says that the process is ready.

Limits on Linux: while a template is compiled and rendered, the address space may grow by `MEMORY` bytes, and the
processor time by `SECONDS`, so that a worker whose parent was killed ends as well. Without /proc (macOS) only the
processor time is bounded here, without the `resource` module (Windows) nothing is: the parent's wall clock alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 64 << 20
SECONDS = 3


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: the settings, filters and functions that transformers gives them."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks an assistant's words, for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return made


def explain(error: BaseException) -> str:
    """One clause about why a template failed."""
    if isinstance(error, MemoryError | OverflowError):
        return f"it needs more than {MEMORY >> 20} MiB of memory or a range beyond the sandbox's limit"
    if isinstance(error, RecursionError):
        return "it is nested or recursive beyond the limit"
    name = type(error).__name__
    line = getattr(error, "lineno", None)
    where = f" (line {line})" if line else ""
    return f"{name}{where}: {str(error)[:500]}" if str(error) else name


def send(stream: BinaryIO, message: dict[str, Any] | None) -> None:
    """Write one message; None writes an empty one."""
    data = b"" if message is None else json.dumps(message).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: BinaryIO, limit: int = sys.maxsize) -> dict[str, Any] | None:
    """Read one message, None for an empty one. EOFError at the end of the stream or above `limit` bytes."""
    header = stream.read(8)
    size = int.from_bytes(header, "little")
    if len(header) < 8 or size > limit:
        raise EOFError
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


class Limits:
    """Bounds on this process while it works for a template; without effect where the system has none."""

    def __enter__(self) -> None:
        try:
            import resource
        except ImportError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + SECONDS + 1
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds if most < 0 else min(seconds, most), most))
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except OSError:
            return
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        bytes_ = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (bytes_ if most < 0 else min(bytes_, most), most))

    def __exit__(self, *exception: object) -> None:
        try:
            import resource
        except ImportError:
            return
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Serve requests from standard input until it ends."""
    sys.path[:0] = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then kills this process
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    jinja = environment()
    try:  # imports what only errors need, before memory is bounded
        jinja.from_string("{{ 1 + missing.name }}").render()
    except Exception as error:
        explain(error)
    send(replies, None)
    source, template = None, None
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        assert request is not None
        reply: dict[str, Any]
        try:
            with Limits():
                if template is None or request["source"] != source:
                    source, template = None, jinja.from_string(request["source"])
                    source = request["source"]
                reply = {"text": template.render(**request["context"])}
        except Exception as error:
            source, template = None, None
            reply = {"error": explain(error)}
        send(replies, reply)


if __name__ == "__main__":
    main()
