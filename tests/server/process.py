"""`phiquant serve` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SERVE = [sys.executable, "-m", "phiquant", "serve"]


class Process:
    """A server process: its address, and its log."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.log = folder / f"{time.monotonic_ns()}.log"
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            [*SERVE, "--port", "0", *map(str, arguments)],
            stderr=self._file,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        deadline = time.monotonic() + 120
        while "serving" not in self.lines():
            assert self.process.poll() is None, self.lines()
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.05)
        self.address = next(line for line in self.lines().splitlines() if "serving" in line).split(" at ")[-1].strip()

    def lines(self) -> str:
        return self.log.read_text()

    def end(self, *, asked: bool = False) -> int:
        """Its exit status, once it has ended; it was `asked` to end already, and is not asked again on its way out."""
        if not asked and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._file.close()
