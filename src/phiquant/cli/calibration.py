"""What `quantize --calibrate` does before it writes: importance collected, or a model made ready for error feedback."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from phiquant.calibrate import Calibration, Feedback, MomentsFile, Search, feedback_entries
from phiquant.calibrate.chunks import DEFAULT_TOKENS
from phiquant.cli.notices import Notices
from phiquant.cli.original import Original
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert import Importance
from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE, ImportanceMatrix, Statistic
from phiquant.convert.source import Source
from phiquant.convert.weighing import Calibrated
from phiquant.errors import RequestError
from phiquant.gguf import parameter_count

__all__ = [
    "DEFAULT_TOKENS",
    "Search",
    "assumed_calibration",
    "assumed_importance",
    "calibrated_importance",
    "feedback",
]


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
    read, notices = text_of(text), Notices(quiet=quiet)
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


def assumed_calibration(
    source: Source,
    text: Path | None,
    statistics: Path | None,
    search: Search,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Calibrated:
    """For a dry run: the plan and its size are those with error feedback from that text, or those statistics."""
    search = search.settled(parameter_count(source.tensors))
    dataset = str(text)
    if statistics is not None and statistics.exists():
        with MomentsFile.open(statistics) as file:
            dataset = file.dataset
    named = None if statistics is None else str(statistics)
    entries = feedback_entries(0, dataset, "0" * 64, search, named)
    embedding = statistics is None and search.curvature_tokens != 0
    return Calibrated(str(text or statistics), entries, include, exclude, embedding=embedding)


@contextmanager
def feedback(
    original: Original,
    text: Path | None,
    *,
    tokens: int,
    search: Search,
    statistics: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int = 0,
    quiet: bool = False,
) -> Iterator[tuple[Calibrated, Feedback]]:
    """The original ready to be rounded for what it computes on a text, and what to plan with.

    With `statistics`, a path: by what the file says, which is made of the text first if there is none. Errors as for
    `Feedback`, `MomentsFile` and `Original.path`; RequestError if there is neither text nor file.
    """
    notices = Notices(quiet=quiet)
    with ExitStack() as stack:
        known = statistics is not None and statistics.exists()
        found = stack.enter_context(MomentsFile.open(statistics)) if statistics is not None and known else None
        if found is None and text is None:
            raise RequestError(f"there is no file {statistics} yet; give the text to collect it from with --calibrate.")
        read = text_of(text) if text is not None and found is None else ""
        model = original.path()
        made_ready = partial(
            Feedback,
            model,
            read,
            dataset=str(text),
            tokens=tokens,
            search=search,
            threads=threads,
            tell=notices.progress,
        )
        if statistics is not None and found is None:
            with made_ready() as made, ReadingBar("collecting", 1, quiet=quiet) as bar:
                notices.clear()
                made.collect(statistics, bar.advanced)
            found = stack.enter_context(MomentsFile.open(statistics))
        made = stack.enter_context(made_ready(statistics=found))
        notices.clear()
        calibrated = Calibrated(
            str(text or statistics), made.entries, include, exclude, made.remarks, embedding=made.embedding
        )
        yield calibrated, made
