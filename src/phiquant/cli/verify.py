"""`phiquant verify F`: whether a GGUF file is sound, with a bar while it is read; status 1 if it is not."""

import dataclasses
import json
import sys
from pathlib import Path

from phiquant.cli.bars import byte_bar
from phiquant.cli.inspect import printable
from phiquant.convert.verify import Verdict
from phiquant.convert.verify import verify as find
from phiquant.errors import GGUFError

__all__ = ["verify"]

_QUALITIES = {
    "none": "",
    "matches": "; the quality recorded is of these weights",
    "of another file": "; the quality recorded is of other weights, copied by the program that wrote the file",
    "not checked": "; the quality recorded does not tell of which weights it is",
}

_CHECKSUMS = {
    "matches": "the checksum matches",
    "none": "no checksum is recorded",
    "of another file": "the checksum recorded is of other weights, copied by the program that wrote the file",
}


def verify(path: Path, *, as_json: bool = False, threads: int = 0, quiet: bool = False) -> int:
    """Check a file; GGUFError with the first finding, after all were printed."""
    bar = byte_bar(quiet=quiet or as_json)
    with bar:
        task = bar.add_task(path.name, total=None)
        verdict = find(
            path,
            threads=threads,
            planned=lambda nbytes: bar.update(task, total=nbytes),
            advanced=lambda nbytes, tensor: bar.update(task, advance=nbytes, description=printable(tensor)),
        )
    if as_json:
        json.dump(_document(verdict), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif verdict.findings:
        for finding in verdict.findings:
            print(printable(finding.sentence))
    elif not quiet:
        parts = f" in {verdict.parts} parts" if verdict.parts > 1 else ""
        print(
            f"{path}: {verdict.tensors} tensors{parts}, {verdict.nbytes:,} bytes, are sound; "
            f"{_CHECKSUMS.get(verdict.checksum, verdict.checksum)}{_QUALITIES.get(verdict.quality, '')}"
        )
    if verdict.findings:
        raise GGUFError(printable(verdict.findings[0].sentence))
    return 0


def _document(verdict: Verdict) -> dict[str, object]:
    return {
        **{key: value for key, value in dataclasses.asdict(verdict).items() if key != "path"},
        "path": str(verdict.path),
        "sound": not verdict.findings,
    }
