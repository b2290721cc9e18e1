"""`phiquant split IN PREFIX` and `phiquant merge FIRST OUT`: one file in parts, and parts in one file."""

from pathlib import Path

from phiquant.cli.conversion import ConversionBar, print_parts, print_report
from phiquant.cli.sizes import parse_size
from phiquant.convert.parts import Division, plan_merge, plan_split
from phiquant.convert.run import execute
from phiquant.convert.source import GGUFSource

__all__ = ["DEFAULT_TENSORS", "division_of", "merge", "split"]

DEFAULT_TENSORS = 128
"""Tensors of a part if nothing is said, as llama-gguf-split has it."""


def division_of(max_tensors: int | None, max_size: str | None, no_tensor_first: bool) -> Division:
    """The division that the options ask for."""
    limit = None if max_size is None else parse_size("--split-max-size", max_size)
    return Division(max_tensors, limit, no_tensor_first)


def split(source: Path, prefix: Path, division: Division, *, dry_run: bool = False, quiet: bool = False) -> int:
    """Divide a GGUF model into parts; tensors, metadata and checksum stay as they are."""
    if not division.wanted:
        division = Division(DEFAULT_TENSORS, None, division.first_empty)
    with GGUFSource(source) as opened:
        plan = plan_split(opened, prefix, division)
        if dry_run:
            print_parts(plan)
            return 0
        with ConversionBar(quiet=quiet) as bar:
            report = execute(plan, progress=bar)
    if not quiet:
        print_parts(report.plan)
    return 0


def merge(first: Path, outfile: Path, *, dry_run: bool = False, quiet: bool = False) -> int:
    """Join all parts of a model in one file, which must not exist yet."""
    with GGUFSource(first) as opened:
        plan = plan_merge(opened, outfile)
        if dry_run:
            print_parts(plan)
            return 0
        with ConversionBar(quiet=quiet) as bar:
            report = execute(plan, overwrite=False, progress=bar)
    if not quiet:
        print_report(report)
    return 0
