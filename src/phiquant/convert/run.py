"""The streaming run: rows are read, converted and written in pieces by a few threads, whatever the size of the model.

A thread holds one piece of the source and its conversion at a time, so memory is bounded by a constant. The output gets
its name only when every byte is written.
"""

import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from phiquant import hub
from phiquant.convert.entries import Entry
from phiquant.convert.filetypes import Target, parse_file_type
from phiquant.convert.memory import bounded_threads
from phiquant.convert.output import Output
from phiquant.convert.parts import WHOLE, Division, in_parts, keep_parts
from phiquant.convert.plan import Plan, plan_convert, plan_quantize
from phiquant.convert.recipes import Options, PlannedTensor
from phiquant.convert.rows import convert_rows, first_bad_row
from phiquant.convert.source import CheckpointSource, open_source
from phiquant.convert.weighing import Importance
from phiquant.errors import RequestError, WeightsError
from phiquant.gguf.checksum import Piece, pieces
from phiquant.gguf.quality import Quality

__all__ = ["Maker", "Progress", "Report", "convert", "execute", "quantize"]

_Bytes = npt.NDArray[np.uint8]
_MAX_THREADS = 512


class Progress(Protocol):
    """Told what happens; called by one thread at a time."""

    def planned(self, plan: Plan) -> None:
        """The run begins."""

    def advanced(self, source_bytes: int, tensor: str) -> None:
        """So many more bytes of the source, of that tensor, are done."""

    def preparing(self, what: str, share: float) -> None:
        """What is computed before the next tensor can be, and how much of that is done, from 0 to 1."""

    def resumed(self, source_bytes: int) -> None:
        """So many bytes of the source need not be done again; only called where an earlier run is continued."""


class Maker(Protocol):
    """Makes the tensors of a plan that are `calibrated`."""

    def make(self, plan: Plan, output: Output, done: Container[str], progress: Progress | None) -> None:
        """Write every one of them that is not `done`, once all other tensors are written."""

    def discard(self, plan: Plan) -> None:
        """The output is finished, or given up: remove what was kept for a later run."""


@dataclass(frozen=True)
class Report:
    """What was done: the plan, the seconds it took, without those of measuring, and what was measured."""

    plan: Plan
    seconds: float
    quality: Quality | None = None


def convert(
    model: str | Path,
    outfile: str | Path | None = None,
    outtype: str = "auto",
    *,
    threads: int | None = None,
    keep_nan: bool = False,
    division: Division = WHOLE,
    resume: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Report:
    """Convert a Hugging Face checkpoint (directory or repository id) to GGUF.

    `outtype`: auto (as stored), f32, f16, bf16, q8_0, or any file type of `quantize`. `division`: into parts of a split
    model. The other arguments are those of `execute`. Errors: CheckpointError,
    ArchitectureError, WeightsError (NaN or infinity without `keep_nan`), OutputError, RequestError.
    """
    path = hub.local(model)
    if path is not None and path.is_file():
        raise RequestError(
            f"{model} is a file; `convert` takes a checkpoint's directory or a repository id, `quantize` a GGUF file."
        )
    with open_source(model, quiet=quiet) as source:
        if not isinstance(source, CheckpointSource):
            raise RequestError(f"{model} is a GGUF file already; use `quantize` to change its type.")
        plan = in_parts(plan_convert(source, outtype, Path(outfile) if outfile is not None else None), division)
        return execute(
            plan, threads=threads, keep_nan=keep_nan, resume=resume, max_memory=max_memory, progress=progress
        )


def quantize(
    model: str | Path,
    outfile: str | Path | None,
    filetype: str | Target,
    options: Options | None = None,
    *,
    overrides: Iterable[Entry] = (),
    allow_requantize: bool = False,
    importance: Importance | None = None,
    prune: Sequence[int] = (),
    threads: int | None = None,
    keep_nan: bool = False,
    division: Division = WHOLE,
    keep_split: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Report:
    """Quantize a GGUF file, a checkpoint or a repository in one step; `outfile` None: a name with the type in it.

    `importance` weighs the columns of the weights, `prune` are layers to leave out; errors as `plan_quantize`.
    `division`, or with `keep_split` the source's own: into parts of a split model. The last arguments are those of
    `execute`.
    """
    target = filetype if isinstance(filetype, Target) else parse_file_type(filetype)
    with open_source(model, quiet=quiet) as source:
        plan = plan_quantize(
            source,
            target,
            Path(outfile) if outfile is not None else None,
            options or Options(),
            overrides=overrides,
            allow_requantize=allow_requantize,
            importance=importance,
            prune=prune,
        )
        plan = keep_parts(plan, division) if keep_split else in_parts(plan, division)
        return execute(
            plan, threads=threads, keep_nan=keep_nan, resume=resume, max_memory=max_memory, progress=progress
        )


def execute(
    plan: Plan,
    *,
    threads: int | None = None,
    keep_nan: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    overwrite: bool = True,
    measure: Callable[[Path], Quality] | None = None,
    progress: Progress | None = None,
    maker: Maker | None = None,
) -> Report:
    """Carry out a plan whose source is open; `maker` makes what is calibrated in it.

    `threads`: None or 0 takes one for each core. `keep_nan`: NaN and infinity in weights are no error. `resume`: keep
    what is done when the run is interrupted, and continue what such a run left; the result is the same to the byte.
    `max_memory`: bytes of resident memory at most, None for `memory.DEFAULT_LIMIT`. `measure`: for a plan with a place
    for a quality, is given a path by which the file can be read that has no name yet; if it fails, there is no file.
    """
    count = threads or os.cpu_count() or 1
    if not 0 < count <= _MAX_THREADS:
        raise RequestError(f"{count} threads were asked for; 1 to {_MAX_THREADS} are possible.")
    count = bounded_threads(count, plan.tensors, max_memory)
    started = perf_counter()
    with Output(plan, overwrite=overwrite, resume=resume, keep_nan=keep_nan) as output:
        output.begin()
        if progress is not None:
            progress.planned(plan)
        adopted = output.adopt(lambda tensor: _advance(progress, tensor))
        if adopted and progress is not None:
            progress.resumed(sum(t.source_bytes for t in plan.tensors if t.name in adopted))
        calibrated = {tensor.name for tensor in plan.tensors if tensor.calibrated}
        _Run(plan, output, adopted | calibrated, keep_nan or plan.copied, progress).join(count)
        if maker is not None:
            try:
                maker.make(plan, output, adopted, progress)
            except WeightsError:
                maker.discard(plan)
                raise
        seconds = perf_counter() - started
        quality = None
        if measure is not None:
            with output.readable() as path:
                quality = measure(path)
        output.commit(quality)
        if maker is not None:
            maker.discard(plan)
    plan = replace(plan, remarks=[*plan.remarks, *output.remarks])
    return Report(plan, seconds, quality)


def _advance(progress: Progress | None, tensor: PlannedTensor) -> None:
    if progress is not None:
        progress.advanced(tensor.source_bytes, tensor.name)


class _Run:
    """Threads that take pieces of tensors from one list until it is empty or something fails."""

    def __init__(
        self, plan: Plan, output: Output, done: Container[str], keep_nan: bool, progress: Progress | None
    ) -> None:
        self._source = plan.source
        self._output = output
        self._keep_nan = keep_nan
        self._progress = progress
        self._pieces = ((t, piece) for t in plan.tensors if t.name not in done for piece in pieces(t.shape))
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def join(self, threads: int) -> None:
        """Run to the end in `threads` threads; the first error, Ctrl-C included, stops them all and is raised."""
        with ThreadPoolExecutor(threads, "phiquant-convert") as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:
                self._stop.set()
                raise

    def _work(self) -> None:
        buffer = np.empty(0, np.uint8)
        while not self._stop.is_set():
            with self._lock:
                tensor, piece = next(self._pieces, (None, None))
            if tensor is None or piece is None:
                return
            size = piece.nbytes(tensor.source)
            if buffer.size < size:
                buffer = np.empty(size, np.uint8)
            data = buffer[:size]
            self._source.read_into(tensor.source_name, piece.start(tensor.source, tensor.shape[-1]), data)
            self._output.write(tensor, piece, self._converted(tensor, piece, data))
            if self._progress is not None:
                with self._lock:
                    self._progress.advanced(size, tensor.name)

    def _converted(self, tensor: PlannedTensor, piece: Piece, data: _Bytes) -> _Bytes:
        try:
            if tensor.importance is None:
                return convert_rows(
                    data, tensor.source, tensor.type, piece.rows, piece.columns, keep_nan=self._keep_nan
                )
            return np.concatenate([*self._weighed(tensor, piece, data, tensor.importance)])
        except WeightsError as error:
            raise _blamed(tensor, piece, data) from error

    def _weighed(
        self, tensor: PlannedTensor, piece: Piece, data: _Bytes, importance: npt.NDArray[np.float32]
    ) -> Iterator[_Bytes]:
        """The parts of a piece that lie in one matrix each, and so share a row of importance."""
        row, end = piece.row, piece.row + piece.rows
        row_bytes = tensor.source.row_bytes(piece.columns)
        columns = slice(piece.column, piece.column + piece.columns)
        while row < end:
            matrix = row // tensor.matrix_rows
            stop = min(end, (matrix + 1) * tensor.matrix_rows)
            part = data[(row - piece.row) * row_bytes : (stop - piece.row) * row_bytes]
            yield convert_rows(
                part,
                tensor.source,
                tensor.type,
                stop - row,
                piece.columns,
                importance=importance[matrix, columns],
                keep_nan=self._keep_nan,
            )
            row = stop


def _blamed(tensor: PlannedTensor, piece: Piece, data: _Bytes) -> WeightsError:
    """The sentence that names the tensor and the row for which a piece was refused."""
    row = first_bad_row(data, tensor.source, piece.rows)
    if row is not None:
        problem, remedy = "NaN or infinity", "the checkpoint is damaged; download it again"
    else:
        kept = convert_rows(data, tensor.source, tensor.type, piece.rows, piece.columns, keep_nan=True)
        row = first_bad_row(kept, tensor.type, piece.rows) or 0
        problem, remedy = f"values too large for {tensor.type.name}", "choose bf16 or f32"
    return WeightsError(
        f"Tensor {tensor.name} holds {problem} in row {piece.row + row}; {remedy}, or pass --keep-nan to go on."
    )
