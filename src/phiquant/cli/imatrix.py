"""`phiquant imatrix`: collect an importance matrix, combine several, or show what one holds."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from phiquant.calibrate import (
    Calibration,
    Done,
    MomentsFile,
    TensorFigures,
    check_same_model,
    combine,
    is_moments_file,
    layer_figures,
    tensor_figures,
)
from phiquant.cli.failures import WrongUsage
from phiquant.cli.models import path_of
from phiquant.cli.notices import Notices
from phiquant.cli.reading import ReadingBar, text_of
from phiquant.convert.imatrix import ImportanceMatrix, read
from phiquant.errors import OutputError
from phiquant.hub import Reference

__all__ = ["ImatrixOptions", "imatrix"]

_UNSEEN_WIDTH = 160  # columns when the output goes to a file or a pipe
_FORMATS = ("gguf", "dat")

Parts = list[tuple[str, ImportanceMatrix]]


@dataclass(frozen=True)
class ImatrixOptions:
    """llama-imatrix's options as they are written."""

    model: Path | Reference | None = None
    file: Path | None = None
    output: Path = Path("imatrix.gguf")
    output_format: str | None = None
    in_file: Sequence[Path] = ()
    chunks: int = -1
    chunk: int = 0
    ctx_size: int = 512
    output_frequency: int = 10
    save_frequency: int = 0
    process_output: bool = False
    parse_special: bool = False
    ppl: bool = True
    show_statistics: bool = False
    threads: int = 0
    quiet: bool = False


def imatrix(options: ImatrixOptions) -> int:
    """Do what the options ask for."""
    if options.output_format not in (None, *_FORMATS):
        raise WrongUsage(f"the output format is gguf or dat, not {options.output_format!r}")
    notices = Notices(quiet=options.quiet)
    if options.show_statistics:
        if len(options.in_file) != 1:
            raise WrongUsage("--show-statistics takes one matrix, given with --in-file")
        show(_read(options.in_file[0]))
        return 0
    if options.file is None and not options.in_file:
        raise WrongUsage("give a text with -f to collect from, or matrices with --in-file to combine")
    if options.file is not None and options.model is None:
        raise WrongUsage("give the model that reads the text with -m or -hf")
    if options.output_format is None and options.output.suffix != ".gguf":
        notices.note(f"{options.output} will be a GGUF file; the older format is written with --output-format dat")
    _check_output(options)
    parts = [(str(path), _read(path)) for path in options.in_file]
    if options.file is None:
        whole = combine(parts)
        _write(whole, options.output, options)
        if not options.quiet:
            print(f"{options.output}: {_described(whole)}")
        return 0
    return _collect(options, parts, notices)


def _read(path: Path) -> ImportanceMatrix:
    """An importance matrix, or the diagonals of second moments."""
    if is_moments_file(path):
        with MomentsFile.open(path) as file:
            return file.matrix()
    return read(path)


def _collect(options: ImatrixOptions, parts: Parts, notices: Notices) -> int:
    assert options.model is not None
    assert options.file is not None
    model = path_of(options.model, quiet=options.quiet)
    dataset, begin = str(options.file), time.perf_counter()
    with Calibration(
        model,
        text_of(options.file),
        context=options.ctx_size,
        skip=options.chunk,
        chunks=None if options.chunks == -1 else options.chunks,
        process_output=options.process_output,
        parse_special=options.parse_special,
        perplexity=options.ppl,
        dataset=dataset,
        threads=options.threads,
        tell=notices.progress,
    ) as calibration:
        notices.clear()
        shapes = calibration.shapes
        if options.process_output and "output.weight" not in shapes:
            notices.note("the model has no output.weight, its embedding is used instead, which is not observed")
        sizes = {name: matrices * columns for name, (matrices, columns) in shapes.items()}
        for origin, matrix in parts:
            check_same_model(origin, matrix, sizes, str(model))
        saved = 0

        def save() -> ImportanceMatrix:
            nonlocal saved
            whole = combine([*parts, (dataset, calibration.matrix())], options.ctx_size)
            _write(whole, options.output, options)
            saved = done.chunks
            return whole

        try:
            with ReadingBar("collecting", options.ctx_size, quiet=options.quiet) as bar:
                for done in calibration.run():
                    measured = "" if done.perplexity is None else f"perplexity {done.perplexity:.2f}"
                    bar.advanced(done.chunks, done.total, measured)
                    if options.output_frequency > 0 and done.chunks % options.output_frequency == 0:
                        whole = save()
                    if options.save_frequency > 0 and done.chunks % options.save_frequency == 0:
                        whole = combine([*parts, (dataset, calibration.matrix())], options.ctx_size)
                        _write(whole, Path(f"{options.output}.at_{done.chunks}"), options)
        except KeyboardInterrupt:
            kept = f"{options.output} holds the first {saved} chunks" if saved else "nothing was written"
            notices.note(f"interrupted; {kept}")
            raise
        if saved != done.chunks:
            whole = save()
    if not options.quiet:
        print(f"{options.output}: {_described(whole)}{_measured(done)}, {time.perf_counter() - begin:.1f} s")
    return 0


def show(matrix: ImportanceMatrix) -> None:
    """The figures of a matrix as tables on stdout: by tensor, by layer."""
    tensors = tensor_figures(matrix)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNSEEN_WIDTH)
    names = (
        "layer",
        "tensor",
        "Σ(act²)",
        "min",
        "max",
        "μ",
        "σ",
        "active",
        "N",
        "entropy",
        "E (norm)",
        "ZD",
        "cos sim",
    )
    table = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in [table.columns[0], *table.columns[2:]]:
        column.justify = "right"
    for figures in tensors:
        table.add_row(*_row(figures))
    console.print(table)
    layers = Table("layer", "mean Σ(act²)", "mean ZD", "mean cos sim", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in layers.columns:
        column.justify = "right"
    for layer in layer_figures(tensors):
        layers.add_row(str(layer.layer), f"{layer.total:.2f}", f"{layer.density:.2%}", f"{layer.similarity:.4f}")
    console.print(layers)
    console.print(f"{_described(matrix)}; weights that no token reached: {len(matrix.entries) - len(tensors)}")


def _row(f: TensorFigures) -> list[str]:
    return [
        "-" if f.layer is None else str(f.layer),
        f.kind,
        f"{f.total:.2f}",
        f"{f.minimum:.4f}",
        f"{f.maximum:.4f}",
        f"{f.mean:.4f}",
        f"{f.deviation:.4f}",
        f"{f.active:.2%}",
        str(f.elements),
        f"{f.entropy:.4f}",
        f"{f.normalized_entropy:.2%}",
        f"{f.density:.2%}",
        "-" if f.similarity is None else f"{f.similarity:.4f}",
    ]


def _described(matrix: ImportanceMatrix) -> str:
    size = f" of {matrix.chunk_size} tokens" if matrix.chunk_size else ""
    return f"{len(matrix.entries)} weights, {matrix.chunk_count} chunks{size}"


def _measured(done: Done) -> str:
    return "" if done.perplexity is None else f", perplexity {done.perplexity:.4f} ± {done.error:.4f}"


def _check_output(options: ImatrixOptions) -> None:
    """Before an hour of work: the output has a place, and does not replace what is read."""
    output = options.output
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise OutputError(f"{output} cannot be written: there is no such folder, or it is one; choose another -o.")
    for read_from in (options.model, options.file):
        if isinstance(read_from, Path) and output.exists() and read_from.exists() and output.samefile(read_from):
            raise OutputError(f"{output} would be replaced by the matrix that is made from it; choose another -o.")


def _write(matrix: ImportanceMatrix, path: Path, options: ImatrixOptions) -> None:
    """Under a temporary name until every byte is there."""
    if options.output_format == "dat":
        matrix.write_dat(path)
    else:
        matrix.write_gguf(path)
