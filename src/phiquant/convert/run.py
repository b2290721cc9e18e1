"""The streaming run: rows are read, converted and written in chunks by a few threads, whatever the size of the model.

A thread holds one chunk of the source and its conversion at a time, so memory is bounded by a constant. The output gets
its name only when every byte is written.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from phiquant.convert import hub
from phiquant.convert.entries import Entry
from phiquant.convert.filetypes import Target, parse_file_type
from phiquant.convert.plan import Plan, plan_convert, plan_quantize
from phiquant.convert.recipes import Options, PlannedTensor
from phiquant.convert.rows import convert_rows, first_bad_row
from phiquant.convert.source import CheckpointSource, open_source
from phiquant.convert.weighing import Importance
from phiquant.errors import RequestError, WeightsError
from phiquant.gguf import GGUFWriter

__all__ = ["Progress", "Report", "convert", "execute", "quantize"]

_CHUNK_BYTES = 2 << 20  # of the source, at least one row: stays in the second-level cache with its conversion
_MAX_THREADS = 512


class Progress(Protocol):
    """Told what happens; called by one thread at a time."""

    def planned(self, plan: Plan) -> None:
        """The run begins."""

    def advanced(self, source_bytes: int, tensor: str) -> None:
        """So many more bytes of the source, of that tensor, are done."""


@dataclass(frozen=True)
class Report:
    """What was done: the plan and the seconds it took."""

    plan: Plan
    seconds: float


@dataclass(frozen=True)
class _Chunk:
    tensor: PlannedTensor
    row: int
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.tensor.shape[-1]

    @property
    def importance(self) -> npt.NDArray[np.float32] | None:
        """Of the matrix that the rows are in."""
        importance = self.tensor.importance
        return None if importance is None else importance[self.row // self.tensor.matrix_rows]


def convert(
    model: str | Path,
    outfile: str | Path | None = None,
    outtype: str = "auto",
    *,
    threads: int | None = None,
    keep_nan: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Report:
    """Convert a Hugging Face checkpoint (directory or repository id) to GGUF.

    `outtype`: auto (as stored), f32, f16, bf16, q8_0, or any file type of `quantize`. Errors: CheckpointError,
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
        plan = plan_convert(source, outtype, Path(outfile) if outfile is not None else None)
        return execute(plan, threads=threads, keep_nan=keep_nan, progress=progress)


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
    progress: Progress | None = None,
    quiet: bool = False,
) -> Report:
    """Quantize a GGUF file, a checkpoint or a repository in one step; `outfile` None: a name with the type in it.

    `importance` weighs the columns of the weights, `prune` are layers to leave out; errors as `plan_quantize`.
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
        return execute(plan, threads=threads, keep_nan=keep_nan, progress=progress)


def execute(
    plan: Plan, *, threads: int | None = None, keep_nan: bool = False, progress: Progress | None = None
) -> Report:
    """Carry out a plan whose source is open. `threads`: None or 0 takes one for each core."""
    count = threads or os.cpu_count() or 1
    if not 0 < count <= _MAX_THREADS:
        raise RequestError(f"{count} threads were asked for; 1 to {_MAX_THREADS} are possible.")
    started = perf_counter()
    with GGUFWriter(plan.path, protect=plan.source.files) as writer:
        for entry in plan.entries:
            writer.add(entry.key, entry.value, entry.type, entry.item_type)
        for tensor in plan.tensors:
            writer.add_tensor(tensor.name, tensor.shape, tensor.type)
        writer.begin()
        if progress is not None:
            progress.planned(plan)
        _Run(plan, writer, keep_nan, progress).join(count)
        writer.commit()
    return Report(plan, perf_counter() - started)


class _Run:
    """Threads that take chunks from one list until it is empty or something fails."""

    def __init__(self, plan: Plan, writer: GGUFWriter, keep_nan: bool, progress: Progress | None) -> None:
        self._source = plan.source
        self._writer = writer
        self._keep_nan = keep_nan
        self._progress = progress
        self._chunks = _chunks(plan.tensors)
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
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            tensor = chunk.tensor
            row_bytes = tensor.source.row_bytes(tensor.shape[-1])
            size = chunk.rows * row_bytes
            if buffer.size < size:
                buffer = np.empty(size, np.uint8)
            data = buffer[:size]
            self._source.read_into(tensor.source_name, chunk.row * row_bytes, data)
            try:
                converted = convert_rows(
                    data,
                    tensor.source,
                    tensor.type,
                    *chunk.shape,
                    importance=chunk.importance,
                    keep_nan=self._keep_nan,
                )
            except WeightsError as error:
                raise _blamed(chunk, data) from error
            self._writer.write(tensor.name, converted, chunk.row * tensor.type.row_bytes(tensor.shape[-1]))
            if self._progress is not None:
                with self._lock:
                    self._progress.advanced(size, tensor.name)


def _blamed(chunk: _Chunk, data: npt.NDArray[np.uint8]) -> WeightsError:
    """The sentence that names the tensor and the row for which a chunk was refused."""
    tensor = chunk.tensor
    row = first_bad_row(data, tensor.source, chunk.rows)
    if row is not None:
        problem, remedy = "NaN or infinity", "the checkpoint is damaged; download it again"
    else:
        kept = convert_rows(data, tensor.source, tensor.type, *chunk.shape, keep_nan=True)
        row = first_bad_row(kept, tensor.type, chunk.rows) or 0
        problem, remedy = f"values too large for {tensor.type.name}", "choose bf16 or f32"
    return WeightsError(
        f"Tensor {tensor.name} holds {problem} in row {chunk.row + row}; {remedy}, or pass --keep-nan to go on."
    )


def _chunks(tensors: Iterable[PlannedTensor]) -> Iterator[_Chunk]:
    """Every row of every tensor, in order, in pieces of about _CHUNK_BYTES of the source, of one matrix each."""
    for tensor in tensors:
        if not tensor.nbytes:
            continue
        step = max(1, _CHUNK_BYTES // tensor.source.row_bytes(tensor.shape[-1]))
        for first in range(0, tensor.rows, tensor.matrix_rows):
            for row in range(first, first + tensor.matrix_rows, step):
                yield _Chunk(tensor, row, min(step, first + tensor.matrix_rows - row))
