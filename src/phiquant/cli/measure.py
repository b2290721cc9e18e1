"""`phiquant measure FILE --against REFERENCE -f TEXT`: what became of a model when it was quantized."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from phiquant import hub
from phiquant.cli.conversion import ConversionBar
from phiquant.cli.failures import WrongUsage
from phiquant.cli.inspect import printable
from phiquant.cli.loaded import WINDOW
from phiquant.cli.measuring import MeasureText, measured
from phiquant.cli.models import path_of
from phiquant.cli.quality import quality_rows
from phiquant.convert.parts import plan_recorded
from phiquant.convert.run import execute
from phiquant.convert.source import GGUFSource
from phiquant.errors import OutputError
from phiquant.gguf.output import check_space
from phiquant.gguf.quality import Quality
from phiquant.hub import Reference

__all__ = ["MeasureOptions", "measure"]

_UNSEEN_WIDTH = 160  # columns when the output goes to a file or a pipe


@dataclass(frozen=True)
class MeasureOptions:
    """As they were given; `commands.measure` says what they mean."""

    model: Path | Reference
    against: Path | None = None
    file: Path | None = None
    write: bool = False
    outfile: Path | None = None
    ctx_size: int = WINDOW
    chunks: int = -1
    chunk: int = 0
    cache_type: str = "f16"
    as_json: bool = False
    threads: int = 0
    quiet: bool = False


def measure(options: MeasureOptions) -> int:
    """Measure a file beside its reference, print the figures, and record them if that is asked for."""
    if options.against is None or options.file is None:
        raise WrongUsage("give the model that the file was made from with --against, and a text with -f")
    path = path_of(options.model, quiet=options.quiet)
    if options.write and options.outfile is None and hub.is_cached(path):
        raise OutputError(f"{path} is in the cache that other programs use; name another file with --outfile.")
    recorded = options.write or options.outfile is not None
    if recorded:  # what would be refused after the measurement is refused before
        with GGUFSource(path) as source:
            check_space(options.outfile or path, sum(file.stat().st_size for file in source.files))
    text = MeasureText.read(options.file)
    quality = measured(
        path,
        options.against,
        text,
        called=options.against.stem,
        size=options.ctx_size,
        first=options.chunk,
        chunks=None if options.chunks < 0 else options.chunks,
        threads=options.threads,
        cache_type=options.cache_type,
        quiet=options.quiet,
    )
    if recorded:
        _record(path, options.outfile, quality, quiet=options.quiet)
    if options.as_json:
        document = {"file": str(path), **dataclasses.asdict(quality)}
        print(json.dumps(document, ensure_ascii=False, indent=2))
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in quality_rows(quality):
        table.add_row(name, printable(value))
    width = None if sys.stdout.isatty() else _UNSEEN_WIDTH
    Console(highlight=False, markup=False, emoji=False, width=width).print(table)
    if recorded and not options.quiet:
        print(f"{options.outfile or path}: the figures are recorded")
    return 0


def _record(path: Path, outfile: Path | None, quality: Quality, *, quiet: bool) -> None:
    """Write the file again with the figures, under a temporary name until every byte is there."""
    with GGUFSource(path) as source, ConversionBar(quiet=quiet) as bar:
        execute(plan_recorded(source, outfile, quality), progress=bar)
