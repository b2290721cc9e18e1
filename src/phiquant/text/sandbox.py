"""Runs templates from files in a process of their own, within 2 seconds and 64 MiB.

A template is a program of whoever wrote the file. Jinja's sandbox keeps it from Python's objects, but not from looping
or from filling memory, and neither can be stopped from within a process. So a worker renders (`template_worker.py`); it
is started on first use, serves one render after another, and is killed when one takes too long.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from phiquant.errors import TemplateError
from phiquant.text import template_worker
from phiquant.text.template_worker import receive, send

SECONDS = 2.0
START_SECONDS = 20.0  # for the worker's own start, which no template can prolong
LONGEST_REPLY = 64 << 20  # bytes of JSON


class Sandbox:
    """One worker process, replaced after any failure that leaves its state unknown."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(self, source: str, context: dict[str, Any]) -> str:
        """The rendered text. Raises TemplateError when the template fails or exceeds its limits."""
        with self._lock:
            worker = self._running()
            try:
                reply = self._exchange(worker, {"source": source, "context": context}, SECONDS)
            except EOFError:
                raise TemplateError(
                    f"the chat template was stopped: it took longer than {SECONDS:g} s or more than "
                    f"{template_worker.MEMORY >> 20} MiB; use another template"
                ) from None
        if reply is None or "text" not in reply:
            raise TemplateError(f"the chat template failed: {(reply or {}).get('error', 'no reply')}")
        return str(reply["text"])

    def close(self) -> None:
        """End the worker; the next render starts another."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if self._owner == os.getpid():  # after a fork it is the parent's, and only our ends of the pipes are closed
            worker.kill()
            worker.wait()
        else:
            worker.returncode = 0
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._owner == os.getpid() and self._worker.poll() is None:
            return self._worker
        self.close()
        folders = {str(Path(str(spec.origin)).parents[1]) for spec in map(find_spec, ("jinja2", "markupsafe")) if spec}
        # The worker gets no environment but what the dynamic loaders of Windows and Linux need.
        environment = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
        try:
            worker = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", template_worker.__file__, *sorted(folders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise TemplateError(f"the process that renders chat templates cannot be started: {error}") from error
        self._worker, self._owner = worker, os.getpid()
        try:
            self._exchange(worker, None, START_SECONDS)
        except EOFError:
            raise TemplateError("the process that renders chat templates did not start; is jinja2 installed?") from None
        return worker

    def _exchange(
        self, worker: subprocess.Popen[bytes], request: dict[str, Any] | None, seconds: float
    ) -> dict[str, Any] | None:
        """Send a request (None: only wait) and read the reply; EOFError when the worker died or had to be killed."""
        timer = threading.Timer(seconds, worker.kill)
        timer.daemon = True
        timer.start()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            if request is not None:
                send(worker.stdin, request)  # type: ignore[arg-type]
            return receive(cast(Any, worker.stdout), LONGEST_REPLY)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | ValueError):  # a broken pipe, or half a reply
                raise EOFError from error
            raise
        finally:
            timer.cancel()


shared = Sandbox()
