"""`phiquant report FILES... --reference F16 -f TEXT -o report.html`: all files of a model on one page."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phiquant.cli.bars import byte_bar
from phiquant.cli.failures import WrongUsage
from phiquant.cli.inspect import printable
from phiquant.cli.loaded import WINDOW, reading_model
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert import imatrix
from phiquant.gguf.output import OutputFile
from phiquant.llm import LLM
from phiquant.report import Gathering, Report, gather, page
from phiquant.report.png import check_matplotlib, png
from phiquant.report.scales import short

__all__ = ["ReportOptions", "report"]

_ROOM = 256  # tokens of a prompt, besides its continuation
_FORMS = (".html", ".png")


@dataclass(frozen=True)
class ReportOptions:
    """As they were given; `commands.report` says what they mean."""

    files: Sequence[Path]
    reference: Path | None = None
    file: Path | None = None
    output: Sequence[Path] = (Path("report.html"),)
    imatrix: Path | None = None
    prompts: Sequence[str] = ()
    chat: bool = False
    n_predict: int = 64
    ctx_size: int = WINDOW
    chunks: int = -1
    cache_type: str = "f16"
    threads: int = 0
    quiet: bool = False


def report(options: ReportOptions) -> int:
    """Measure all files, and write what was found."""
    if options.reference is None or options.file is None:
        raise WrongUsage("give the model that the files were made from with --reference, and a text with -f")
    if options.n_predict < 1:
        raise WrongUsage("at least one token must be generated; give -n 1 or more")
    for output in options.output:
        _check_output(output, options)
    notices = Notices(quiet=options.quiet)
    wanted = Gathering(
        reference=options.reference,
        files=options.files,
        text=text_of(options.file),
        text_name=options.file.name,
        text_sha256=hashlib.sha256(options.file.read_bytes()).hexdigest(),
        folder=options.output[0].absolute().parent,
        size=options.ctx_size,
        chunks=None if options.chunks < 0 else options.chunks,
        prompts=options.prompts,
        chat=options.chat,
        tokens=options.n_predict,
        importance={} if options.imatrix is None else _importance(options.imatrix),
        weighted_by=None if options.imatrix is None else options.imatrix.name,
        threads=options.threads,
    )

    def load(path: Path) -> AbstractContextManager[LLM]:
        return reading_model(
            path,
            options.ctx_size,
            notices,
            room=options.n_predict + _ROOM,
            threads=options.threads,
            cache_type=options.cache_type,
        )

    found = gather(wanted, load, _Shown(options.ctx_size, quiet=options.quiet))
    for output in options.output:
        _write(output, png(found) if output.suffix == ".png" else page(found).encode())
        if not options.quiet:
            print(f"{output}: {_summary(found)}")
    return 0


class _Shown:
    """Bars on stderr."""

    def __init__(self, window: int, *, quiet: bool) -> None:
        self._window, self._quiet = window, quiet

    @contextmanager
    def reading(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        """See `report.gather.Progress`."""
        with ReadingBar(printable(what), self._window, quiet=self._quiet) as bar:
            yield bar.advanced

    @contextmanager
    def weighing(self, what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """See `report.gather.Progress`."""
        with byte_bar(quiet=self._quiet) as bar:
            task = bar.add_task(printable(what), total=nbytes)
            yield lambda done: bar.update(task, advance=done)


def _check_output(output: Path, options: ReportOptions) -> None:
    """Before an hour of work: the output has a place, and a form that is known."""
    if output.suffix not in _FORMS:
        raise WrongUsage(f"a report is written as .html or .png, and {output} ends otherwise")
    if output.suffix == ".png":
        check_matplotlib()
    protected = [*options.files, *(path for path in (options.reference, options.file, options.imatrix) if path)]
    OutputFile(output, overwrite=True, protect=protected)


def _importance(path: Path) -> dict[str, NDArray[np.float32]]:
    """Importance by tensor, [matrices, columns]; as for `imatrix.read`."""
    matrix = imatrix.read(path)
    return {
        name: np.asarray(entry.importance, np.float32).reshape(len(entry.counts), -1)
        for name, entry in matrix.entries.items()
        if entry.counts.any()
    }


def _write(path: Path, data: bytes) -> None:
    """Under a temporary name until every byte is there."""
    output = OutputFile(path, overwrite=True)
    output.begin(len(data))
    try:
        output.put(memoryview(data), 0)
        output.commit()
    finally:
        output.abort()


def _summary(found: Report) -> str:
    best = min(found.files, key=lambda file: file.divergence)
    nearest = f"the nearest is {printable(best.label)} with a KL divergence of {short(best.divergence)}"
    return f"{len(found.files)} files, {nearest}"
