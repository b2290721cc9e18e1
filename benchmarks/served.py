"""Processes of servers: started on a free port, waited for, looked at (Linux), and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from http_stream import free_port

__all__ = ["Served", "Usage", "llama_server", "phiquant"]

START = 120.0  # most seconds until a server answers


@dataclass(frozen=True)
class Usage:
    """What a process and its children have: bytes in memory, threads, open descriptors."""

    resident: int
    threads: int
    descriptors: int


class Served:
    """A server that runs while the `with` lasts. `log`: what it writes to stderr and stdout."""

    def __init__(self, command: Callable[[int], Sequence[str]], log: Path) -> None:
        self.port, self.log = free_port(), log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            command(self.port), stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START
        try:
            while not self._answers():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    text = self.log.read_text(errors="replace")
                    sys.exit(f"the server did not start: {' '.join(map(str, self.process.args))}\n{text[-3000:]}")
                time.sleep(0.05)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def end(self) -> int:
        """SIGTERM, and its exit status; SIGKILL if it takes longer than half a minute."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._file.close()

    def usage(self) -> Usage:
        """What it has now, children included."""
        found = [_usage(pid) for pid in _family(self.process.pid)]
        return Usage(*(sum(values) for values in zip(*found, strict=True)))


def phiquant(model: Path, *options: str) -> Callable[[int], list[str]]:
    """The command of `phiquant serve`."""
    return lambda port: [sys.executable, "-m", "phiquant", "serve", "-m", str(model), "--port", str(port), *options]


def llama_server(binary: Path, model: Path, *options: str) -> Callable[[int], list[str]]:
    """The command of `llama-server`."""
    return lambda port: [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *options]


def _family(pid: int) -> list[int]:
    """A process and all that come from it."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text("ascii").split()
    ]
    return [pid, *(member for child in children for member in _family(child))]


def _usage(pid: int) -> tuple[int, int, int]:
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    folder = Path(f"/proc/{pid}")
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(list((folder / "task").iterdir())),
        len(list((folder / "fd").iterdir())),
    )
