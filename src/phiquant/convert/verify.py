"""Whether a GGUF file is sound: its structure, every weight in it, and the checksum that it records."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from phiquant.convert.positioned import PositionedFile
from phiquant.errors import GGUFError
from phiquant.gguf import GGUFFile, TensorInfo, keys, open_model
from phiquant.gguf.checksum import PREFIX, Checksum, Piece, Summed, pieces, table_hash
from phiquant.gguf.quality import is_quality_key
from phiquant.quants.validity import bad_blocks

__all__ = ["Finding", "Verdict", "verify"]

Recorded = Literal["matches", "differs", "none", "of another file", "not checked"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, in a sentence; with the tensor and its first bad row where there is one."""

    sentence: str
    tensor: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found in a file: `parts`, `tensors` and bytes of tensor data that were read, and the `findings`.

    `checksum` is "of another file" where a program that does not know the key has copied it to other weights; `quality`
    says the same of recorded figures, "not checked" of those that name no weights.
    """

    path: Path
    parts: int = 0
    tensors: int = 0
    nbytes: int = 0
    checksum: Recorded = "not checked"
    quality: Recorded = "none"
    findings: list[Finding] = field(default_factory=list)


def verify(
    path: str | Path,
    *,
    threads: int | None = None,
    planned: Callable[[int], None] = lambda nbytes: None,
    advanced: Callable[[int, str], None] = lambda nbytes, tensor: None,
) -> Verdict:
    """Check a model, whole or split (its first part), and list all that is wrong; memory is bounded by a constant.

    `planned` is told the bytes that will be read, `advanced` how many more are done, and of which tensor, by one thread
    at a time. What is no GGUF file, or has a broken header, is a finding too.
    """
    path = Path(path)
    try:
        model = open_model(path)
    except GGUFError as error:
        return Verdict(path, findings=[Finding(str(error))])
    with model:
        planned(sum(info.nbytes for info in model.tensors.values()))
        run = _Run(model, advanced)
        try:
            run.join(threads or os.cpu_count() or 1)
        finally:
            run.close()
        checksum, differing = _compared(model, run.checksum)
        return Verdict(
            path,
            len(model.parts),
            len(model.tensors),
            sum(info.nbytes for info in model.tensors.values()),
            checksum,
            _quality(model, run.checksum),
            [*_lengths(model), *run.findings(), *differing],
        )


def _lengths(model: GGUFFile) -> Iterator[Finding]:
    """Bytes at the end of a file that belong to nothing: two files joined, or one written over a longer one."""
    for part in model.parts:
        own = [part.locate(name)[1] + info.nbytes for name, info in part.tensors.items()]
        end = -(-max(own, default=part.data_offset) // part.alignment) * part.alignment
        if part.size > end:
            yield Finding(
                f"{part.path} goes on for {part.size - end} bytes after its last tensor; it is not as it was written."
            )


class _Run:
    """Threads that read pieces of tensors, check them and sum them up."""

    def __init__(self, model: GGUFFile, advanced: Callable[[int, str], None]) -> None:
        self._path = model.path
        self._infos = list(model.tensors.values())
        self.checksum = Checksum([Summed(info.name, info.shape, info.type) for info in self._infos])
        self._files = {part.path: PositionedFile(part.path, GGUFError) for part in model.parts}
        self._places = {info.name: model.locate(info.name) for info in self._infos}
        self._pieces = ((info, piece) for info in self._infos for piece in pieces(info.shape))
        self._advanced = advanced
        self._bad: dict[str, set[int]] = {}  # rows
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def join(self, threads: int) -> None:
        """Run to the end; the first error, Ctrl-C included, stops all threads and is raised."""
        with ThreadPoolExecutor(threads, "phiquant-verify") as pool:
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
                info, piece = next(self._pieces, (None, None))
            if info is None or piece is None:
                return
            size = piece.nbytes(info.type)
            if buffer.size < size:
                buffer = np.empty(size, np.uint8)
            self._check(info, piece, buffer[:size])
            with self._lock:
                self._advanced(size, info.name)

    def _check(self, info: TensorInfo, piece: Piece, data: npt.NDArray[np.uint8]) -> None:
        part, offset = self._places[info.name]
        self._files[part.path].read_into(offset + piece.start(info.type, info.shape[-1] if info.shape else 1), data)
        self.checksum.add(info.name, piece, data)
        bad = bad_blocks(data, info.type)
        if bad is not None:
            rows = np.unique(bad // (piece.columns // info.type.block_elements)) + piece.row
            with self._lock:
                self._bad.setdefault(info.name, set()).update(rows.tolist())

    def findings(self) -> Iterator[Finding]:
        """A sentence for each bad tensor, in the order of the file."""
        for info in self._infos:
            rows = self._bad.get(info.name)
            if rows:
                first = min(rows)
                others = f" and {len(rows) - 1} more rows" if len(rows) > 1 else ""
                what = "in the scale of a block" if info.type.is_quantized else "among its values"
                yield Finding(
                    f"Tensor {info.name!r} of {self._path} holds NaN or infinity {what} in row {first}{others}; fetch "
                    "or make the file again.",
                    info.name,
                    first,
                )


def _quality(model: GGUFFile, checksum: Checksum) -> Recorded:
    """Whether the figures that a file records are of its weights."""
    if not any(is_quality_key(key) for key in model.fields):
        return "none"
    weights = model.fields.get(keys.QUALITY_WEIGHTS)
    if weights is None or not isinstance(weights.value, str):
        return "not checked"
    return "matches" if weights.value == checksum.text() else "of another file"


def _compared(model: GGUFFile, checksum: Checksum) -> tuple[Recorded, list[Finding]]:
    """What the recorded checksum says, and the tensors that differ from it."""
    recorded = model.get(keys.CHECKSUM, str, "")
    if not recorded:
        return "none", []
    tensors = [Summed(info.name, info.shape, info.type) for info in model.tensors.values()]
    if not recorded.startswith(f"{PREFIX}{table_hash(tensors)}:"):
        return "of another file", []
    if recorded == checksum.text():
        return "matches", []
    stored = model.fields.get(keys.TENSOR_CHECKSUMS)
    single = checksum.parts()
    if stored is None or stored.count != len(single) or not isinstance(stored.value, np.ndarray):
        sentence = f"The weights of {model.path} are not those its checksum was made of; fetch it again."
        return "differs", [Finding(sentence)]
    differing = [tensors[i].name for i in np.flatnonzero(stored.value != single)]
    if not differing:
        sentence = f"The checksum of {model.path} is damaged, though its weights are not; fetch or make it again."
        return "differs", [Finding(sentence)]
    return "differs", [
        Finding(
            f"Tensor {name!r} of {model.path} is not what its checksum was made of; fetch or make the file again.", name
        )
        for name in differing
    ]
