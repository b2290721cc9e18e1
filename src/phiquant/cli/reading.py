"""What the verbs that read a text with a model share: its text, and the bar that shows how far they are."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from phiquant.errors import RequestError

__all__ = ["ReadingBar", "reading_progress", "text_of"]


def reading_progress(*, quiet: bool) -> Progress:
    """A bar on stderr, not started: what is going on, how far it is, the task's field `rate`, the time left.

    Nothing is shown if `quiet`, or if stderr is no terminal.
    """
    console = Console(stderr=True, highlight=False)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


class ReadingBar:
    """A bar on stderr with windows, tokens per second, the time left and what was found so far.

    A context manager; silent if `quiet`, and without the bar if stderr is no terminal.

    Args:
        what: a word for what is going on.
        window: tokens of a window.
    """

    def __init__(self, what: str, window: int, *, quiet: bool) -> None:
        self._what, self._window = what, window
        self._bar = reading_progress(quiet=quiet)
        self._task: TaskID | None = None
        self._begin = time.perf_counter()

    def advanced(self, windows: int, total: int, found: str = "") -> None:
        """Move the bar; `found` in a few words."""
        if self._task is None:
            self._task = self._bar.add_task(self._what, total=total, rate="")
        rate = windows * self._window / (time.perf_counter() - self._begin)
        self._bar.update(
            self._task, completed=windows, total=total, rate=", ".join(filter(None, [found, f"{rate:.0f} tokens/s"]))
        )

    def __enter__(self) -> Self:
        self._begin = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def text_of(path: Path) -> str:
    """The text of a file as llama.cpp reads it, without the last newline; RequestError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except ValueError:
        raise RequestError(f"{path} is not text in UTF-8; convert it first") from None
