"""`phiquant certify`: a checkpoint's predictions by transformers beside ours, position by position."""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from phiquant import __version__
from phiquant.cli.failures import WrongUsage
from phiquant.cli.models import path_of, source_of
from phiquant.cli.notices import Notices
from phiquant.cli.reading import text_of
from phiquant.convert import convert
from phiquant.convert.metadata import model_name
from phiquant.errors import OutputError, RequestError
from phiquant.eval.certify import Borders, Certificate, certify, compared, default_text, lengths
from phiquant.eval.measure import RowsBase
from phiquant.eval.oracle import Transformers
from phiquant.gguf import open_model
from phiquant.hub import Reference
from phiquant.llm import LLM
from phiquant.text import Tokenizer

__all__ = ["CertifyOptions", "certify_checkpoint"]

_SUFFIXES = (".json", ".md")
_UNSEEN_WIDTH = 100  # columns when the output goes to a file or a pipe


@dataclass(frozen=True)
class CertifyOptions:
    """As they are written; `ctx_size` 0 is what the model's borders ask for."""

    checkpoint: str | Path
    gguf: Path | Reference | None = None
    file: Path | None = None
    ctx_size: int = 0
    outtype: str = "f32"
    cache_type: str = "f32"
    python: Path | None = None
    report: Sequence[Path] = ()
    as_json: bool = False
    fail_above: float | None = None
    threads: int = 0
    quiet: bool = False


def certify_checkpoint(options: CertifyOptions) -> int:
    """Do what the options ask for; 1 if the mean divergence is above `fail_above`."""
    for report in options.report:
        if report.suffix not in _SUFFIXES:
            raise WrongUsage(f"a report is Markdown or JSON, by its name: {report} ends in neither .md nor .json")
        if not report.absolute().parent.is_dir():
            raise OutputError(f"{report} cannot be written: there is no such folder; create it first.")
    notices = Notices(quiet=options.quiet)
    checkpoint = Path(source_of(str(options.checkpoint), quiet=options.quiet))
    borders = Borders.of_checkpoint(checkpoint)
    tokens = lengths(borders, options.ctx_size or None)
    text = default_text() if options.file is None else text_of(options.file)
    with _file(options, checkpoint, notices) as gguf:
        with open_model(gguf) as opened:
            ids = Tokenizer.from_gguf(opened).encode(text, special=False)
        if len(ids) < tokens[-1]:
            raise RequestError(
                f"the text has {len(ids)} tokens and {tokens[-1]} are wanted; give a longer one with -f, "
                "or a smaller --ctx-size"
            )
        sequences = [ids[:count] for count in tokens]
        notices.progress("transformers computes")
        with Transformers(checkpoint, sequences, options.python or sys.executable) as oracle:
            notices.clear()
            with LLM.load(
                gguf,
                context=tokens[-1],
                threads=options.threads,
                cache_type=options.cache_type,
                speculate=False,
                progress=notices.progress,
            ) as llm:
                notices.progress("phiquant computes")
                if llm.context < tokens[-1]:
                    raise RequestError(f"{gguf} has a context of {llm.context} and the checkpoint {borders.context}")
                found = compared(RowsBase(oracle.blocks()), llm.stream_logits(sequences), tokens)
                notices.clear()
                about = {
                    "checkpoint": model_name(checkpoint),
                    "architecture": llm.config.architecture,
                    "file": options.outtype.upper() + ", converted" if options.gguf is None else str(gguf.name),
                    "cache": options.cache_type,
                    "text": "of phiquant" if options.file is None else options.file.name,
                    "phiquant": __version__,
                    "transformers": f"{oracle.versions['transformers']} ({oracle.model_class})",
                    "torch": oracle.versions["torch"],
                }
    certificate = certify(about, borders, found)
    for report in options.report:
        _write(report, certificate)
    _print(certificate, options)
    if options.fail_above is not None and certificate.divergence.mean > options.fail_above:
        notices.note(f"the mean divergence {certificate.divergence.mean:.1e} is above {options.fail_above:.1e}")
        return 1
    return 0


@contextmanager
def _file(options: CertifyOptions, checkpoint: Path, notices: Notices) -> Iterator[Path]:
    """The GGUF file, converted for the time being if none is given."""
    if options.gguf is not None:
        yield path_of(options.gguf, quiet=options.quiet)
        return
    with tempfile.TemporaryDirectory(prefix="phiquant-certify-") as folder:
        path = Path(folder) / "model.gguf"
        with notices.compiling():
            convert(checkpoint, path, options.outtype, threads=options.threads, quiet=True)
        yield path


def _write(path: Path, certificate: Certificate) -> None:
    try:
        path.write_text(certificate.json() if path.suffix == ".json" else certificate.markdown(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _print(certificate: Certificate, options: CertifyOptions) -> None:
    if options.as_json:
        print(json.dumps(json.loads(certificate.json()), ensure_ascii=False, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNSEEN_WIDTH)
    if not options.quiet:
        about = certificate.about
        console.print(f"{about['checkpoint']}: {about['file']}, beside transformers {about['transformers']}")
    table = Table("sequence", "positions", "mean KL", "largest", "same top", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for sequence, positions, found in certificate.rows():
        table.add_row(sequence, positions, f"{found.mean:.2e}", f"{found.maximum:.2e}", f"{100 * found.top1:.2f} %")
    console.print(table)
