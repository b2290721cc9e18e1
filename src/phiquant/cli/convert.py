"""`phiquant convert`: a Hugging Face checkpoint or repository to GGUF."""

from pathlib import Path

from phiquant.cli.conversion import ConversionBar, print_report
from phiquant.cli.models import source_of
from phiquant.convert import convert as convert_checkpoint
from phiquant.convert.parts import WHOLE, Division
from phiquant.hub import Reference

__all__ = ["convert"]


def convert(
    model: str | Reference,
    outfile: Path | None = None,
    outtype: str = "auto",
    *,
    threads: int = 0,
    keep_nan: bool = False,
    division: Division = WHOLE,
    resume: bool = False,
    max_memory: int | None = None,
    quiet: bool = False,
) -> int:
    """Convert `model` (a directory, owner/name[@revision], or one of the Hub); `threads` 0: one for each core."""
    source = source_of(model, quiet=quiet)
    with ConversionBar(quiet=quiet) as bar:
        report = convert_checkpoint(
            source,
            outfile,
            outtype,
            threads=threads,
            keep_nan=keep_nan,
            division=division,
            resume=resume,
            max_memory=max_memory,
            progress=bar,
            quiet=quiet,
        )
    if not quiet:
        print_report(report)
    return 0
