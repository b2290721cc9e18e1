"""Collecting importance, as `imatrix` and `quantize --calibrate` show it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phiquant.calibrate import Calibration
from phiquant.cli.notices import Notices
from phiquant.cli.original import Original
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert import Importance
from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE, ImportanceMatrix, Statistic
from phiquant.convert.source import Source

__all__ = ["assumed_importance", "calibrated_importance"]


def calibrated_importance(
    original: Original,
    text: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tokens: int | None = None,
    threads: int = 0,
    quiet: bool = False,
) -> Importance:
    """Run the original on a text, or its first `tokens`, and keep what matters to it.

    Errors as for `Calibration`, `Importance.chosen` and `Original.path`.
    """
    read = text_of(text)
    notices = Notices(quiet=quiet)
    with (
        Calibration(
            original.path(),
            read,
            chunks=None if tokens is None else max(1, tokens // DEFAULT_CHUNK_SIZE),
            perplexity=False,
            dataset=str(text),
            threads=threads,
            tell=notices.progress,
        ) as calibration,
        ReadingBar("collecting", calibration.context, quiet=quiet) as bar,
    ):
        notices.clear()
        for done in calibration.run():
            bar.advanced(done.chunks, done.total)
        return Importance.chosen(calibration.matrix(), str(text), include, exclude)


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
