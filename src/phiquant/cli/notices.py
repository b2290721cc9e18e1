"""Lines on stderr that are not errors: notes, progress of the first start, speeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["COMPILING", "Notices"]

COMPILING = "compiling kernels for this processor, once"
"""What the CPU backend says too, when a model is loaded and kernels are missing."""


class Notices:
    """Writes them, or nothing if `quiet`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._passing = False
        self._announced = False

    def line(self, text: str) -> None:
        """A line as it is."""
        self.clear()
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """What is going on: on a terminal a line that the next one replaces, elsewhere only the first start's."""
        if self._terminal and not self._quiet:
            print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)
            self._passing = True
        elif text == COMPILING:
            self._announce()

    def clear(self) -> None:
        """Removes what `progress` left on the terminal."""
        if self._passing:
            self._passing = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.line(f"phiquant: note: {text}")

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """While inside, the first kernel that has to be compiled is announced: it happens once for each processor."""
        from ..kernels.cpu import library

        def announce(kernel: str) -> None:
            self._announce()

        library.on_compile.append(announce)
        try:
            yield
        finally:
            library.on_compile.remove(announce)

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            self.line(f"phiquant: {COMPILING}")
