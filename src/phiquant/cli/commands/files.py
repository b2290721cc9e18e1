"""Files made and looked at: `convert`, `split`, `merge`, `verify`, `inspect`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import (
    GivenCheckpoint,
    HfCheckpoint,
    HfRepo,
    Json,
    KeepNan,
    MaxMemory,
    NoTensorFirstSplit,
    Quiet,
    Resume,
    SplitMaxSize,
    SplitMaxTensors,
    Threads,
)

__all__ = ["convert", "inspect", "merge", "split", "verify"]


def convert(
    model: GivenCheckpoint = None,
    hf_repo: HfCheckpoint = None,
    outfile: Annotated[
        Path | None, Option("--outfile", "-o", metavar="FILE", help="Default: named after the model and the type.")
    ] = None,
    outtype: Annotated[
        str, Option("--outtype", metavar="TYPE", help="auto, f32, f16, bf16, q8_0, or any type of quantize.")
    ] = "auto",
    threads: Threads = 0,
    keep_nan: KeepNan = False,
    split_max_tensors: SplitMaxTensors = None,
    split_max_size: SplitMaxSize = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    quiet: Quiet = False,
) -> int:
    """Convert a Hugging Face checkpoint to GGUF."""
    from .. import convert as body
    from ..models import checkpoint_of
    from ..notices import Notices
    from ..sizes import parse_size
    from ..split import division_of

    source = checkpoint_of(model, hf_repo, "phiquant convert FOLDER")
    with Notices(quiet=quiet).compiling():
        return body.convert(
            source,
            outfile,
            outtype,
            threads=threads,
            keep_nan=keep_nan,
            division=division_of(split_max_tensors, split_max_size, no_tensor_first_split),
            resume=resume,
            max_memory=None if max_memory is None else parse_size("--max-memory", max_memory),
            quiet=quiet,
        )


def split(
    arguments: Annotated[
        list[Path],
        Argument(
            metavar="[IN] OUT-PREFIX",
            help="IN: a GGUF file, or the first part of a split model; none with --hf-repo. OUT-PREFIX: what the names "
            "of the parts begin with: PREFIX-00001-of-0000M.gguf.",
        ),
    ],
    hf_repo: HfRepo = None,
    split_max_tensors: Annotated[
        int | None, Option("--split-max-tensors", metavar="N", help="Tensors in each part, at most; 128 by default.")
    ] = None,
    split_max_size: Annotated[
        str | None,
        Option("--split-max-size", metavar="N(M|G)", help="Bytes of tensors in each part, at most, instead."),
    ] = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the parts and their sizes; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Divide a GGUF file into parts, as llama-gguf-split --split does."""
    from .. import split as body
    from ..models import path_of, source_and_target

    model, prefix = source_and_target(arguments, hf_repo, "phiquant split MODEL.gguf OUT-PREFIX")
    division = body.division_of(split_max_tensors, split_max_size, no_tensor_first_split)
    return body.split(path_of(model, quiet=quiet), prefix, division, dry_run=dry_run, quiet=quiet)


def merge(
    arguments: Annotated[
        list[Path],
        Argument(
            metavar="[FIRST-PART] OUT",
            help="FIRST-PART: NAME-00001-of-0000M.gguf; none with --hf-repo. OUT: the file to write, which must not "
            "exist.",
        ),
    ],
    hf_repo: HfRepo = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the file's size; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Join the parts of a split model in one file, as llama-gguf-split --merge does."""
    from .. import split as body
    from ..models import path_of, source_and_target

    model, outfile = source_and_target(arguments, hf_repo, "phiquant merge NAME-00001-of-0000M.gguf OUT.gguf")
    return body.merge(path_of(model, quiet=quiet), outfile, dry_run=dry_run, quiet=quiet)


def verify(
    file: Annotated[
        Path | None, Argument(metavar="[FILE]", help="A GGUF file, or the first part of a split model.")
    ] = None,
    hf_repo: HfRepo = None,
    as_json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> int:
    """Check a GGUF file: header, offsets and lengths, every weight and scale, and the checksum if it has one."""
    from .. import verify as body
    from ..models import chosen, path_of

    model = chosen(file, hf_repo, "phiquant verify MODEL.gguf")
    return body.verify(path_of(model, quiet=quiet), as_json=as_json, threads=threads, quiet=quiet)


def inspect(
    file: Annotated[Path | None, Argument(metavar="[FILE]", help="A GGUF file.")] = None,
    hf_repo: HfRepo = None,
    as_json: Json = False,
) -> None:
    """Show what a GGUF file holds: header, metadata, tensors, totals."""
    from .. import inspect as body
    from ..models import chosen, path_of

    body.inspect(path_of(chosen(file, hf_repo, "phiquant inspect MODEL.gguf"), quiet=as_json), as_json)
