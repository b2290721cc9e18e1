"""Collecting importance, as `imatrix` and `quantize --calibrate` show it."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from phiquant.calibrate import Calibration, Done
from phiquant.cli.notices import Notices
from phiquant.convert import Importance
from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE, ImportanceMatrix, Statistic
from phiquant.convert.plan import plan_convert
from phiquant.convert.run import execute
from phiquant.convert.source import CheckpointSource, Source
from phiquant.errors import OutputError, RequestError

__all__ = ["CalibrationBar", "assumed_importance", "calibrated_importance", "calibration_text"]


class CalibrationBar:
    """A bar on stderr with chunks, tokens per second, the time left and the running perplexity.

    A context manager; silent if `quiet`, and without the bar if stderr is no terminal.
    """

    def __init__(self, context: int, *, quiet: bool) -> None:
        self._context = context
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._begin = time.perf_counter()

    def advanced(self, done: Done) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._bar.add_task("collecting", total=done.total, rate="")
        rate = done.chunks * self._context / (time.perf_counter() - self._begin)
        measured = "" if done.perplexity is None else f"perplexity {done.perplexity:.2f}, "
        self._bar.update(self._task, completed=done.chunks, rate=f"{measured}{rate:.0f} tokens/s")

    def __enter__(self) -> "CalibrationBar":
        self._begin = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def calibration_text(path: Path) -> str:
    """The text of a file as llama.cpp reads it, without the last newline; RequestError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except ValueError:
        raise RequestError(f"{path} is not text in UTF-8; convert it first") from None


def calibrated_importance(
    source: Source,
    text: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    folder: Path,
    threads: int = 0,
    quiet: bool = False,
) -> Importance:
    """Run the model of `source` on a text and keep what matters to it.

    A checkpoint is converted first, as it is stored, to a file in `folder` that is gone afterwards. Errors as for
    `Calibration`, `Importance.chosen` and `execute`.
    """
    read = calibration_text(text)
    if not isinstance(source, CheckpointSource):
        return _collected(source.files[0], read, text, include, exclude, threads, quiet)
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".phiquant-calibrate-", dir=folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot hold a temporary file: {error.strerror or error}.") from error
    with temporary as name:
        lossless = Path(name) / "lossless.gguf"
        execute(plan_convert(source, "auto", lossless), threads=threads)
        return _collected(lossless, read, text, include, exclude, threads, quiet)


def assumed_importance(
    source: Source, text: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Importance:
    """For a dry run: every column matters as much; the plan and its size are those with a matrix from that text."""
    tokens = np.array([DEFAULT_CHUNK_SIZE])
    entries = {
        tensor.name: Statistic(
            np.full((tensor.matrices, tensor.shape[-1]), tokens[0], np.float32), tokens.repeat(tensor.matrices)
        )
        for tensor in source.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    }
    matrix = ImportanceMatrix(entries, 1, DEFAULT_CHUNK_SIZE, (str(text),))
    return Importance.chosen(matrix, str(text), include, exclude)


def _collected(
    model: Path, text: str, origin: Path, include: Sequence[str], exclude: Sequence[str], threads: int, quiet: bool
) -> Importance:
    notices = Notices(quiet=quiet)
    with (
        Calibration(
            model, text, perplexity=False, dataset=str(origin), threads=threads, tell=notices.progress
        ) as calibration,
        CalibrationBar(calibration.context, quiet=quiet) as bar,
    ):
        notices.clear()
        for done in calibration.run():
            bar.advanced(done)
        return Importance.chosen(calibration.matrix(), str(origin), include, exclude)
