"""Collecting importance, as `imatrix` and `quantize --calibrate` show it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from phiquant.calibrate import Calibration
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert import Importance
from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE, ImportanceMatrix, Statistic
from phiquant.convert.plan import plan_convert
from phiquant.convert.run import execute
from phiquant.convert.source import CheckpointSource, Source
from phiquant.errors import OutputError

__all__ = ["assumed_importance", "calibrated_importance", "collected_importance", "runnable"]


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

    Errors as for `runnable`, `Calibration` and `Importance.chosen`.
    """
    read = text_of(text)
    with runnable(source, folder, threads) as model:
        return collected_importance(model, read, text, include, exclude, threads, quiet)


@contextmanager
def runnable(source: Source, folder: Path, threads: int = 0) -> Iterator[Path]:
    """A file that the engine runs: a GGUF source's own.

    A checkpoint is converted, as it is stored, to a file in `folder` that is gone afterwards. Errors as for `execute`.
    """
    if not isinstance(source, CheckpointSource):
        yield source.files[0]
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".phiquant-calibrate-", dir=folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot hold a temporary file: {error.strerror or error}.") from error
    with temporary as name:
        lossless = Path(name) / "lossless.gguf"
        execute(plan_convert(source, "auto", lossless), threads=threads)
        yield lossless


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


def collected_importance(
    model: Path, text: str, origin: Path, include: Sequence[str], exclude: Sequence[str], threads: int, quiet: bool
) -> Importance:
    """Run a GGUF file on a text, whose name is `origin`, and keep what matters to it."""
    notices = Notices(quiet=quiet)
    with (
        Calibration(
            model, text, perplexity=False, dataset=str(origin), threads=threads, tell=notices.progress
        ) as calibration,
        ReadingBar("collecting", calibration.context, quiet=quiet) as bar,
    ):
        notices.clear()
        for done in calibration.run():
            bar.advanced(done.chunks, done.total)
        return Importance.chosen(calibration.matrix(), str(origin), include, exclude)
