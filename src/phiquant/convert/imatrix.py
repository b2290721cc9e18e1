"""Importance matrices: how much each column of a weight is used, as sums of squared activations over a text.

Two files hold them, both llama.cpp's. The current one is GGUF: for every weight `NAME` the tensors `NAME.in_sum2`, F32
[matrices, columns], sums of squares over the tokens, and `NAME.counts`, F32 [matrices, 1], the tokens; a mixture of
experts has a matrix for each expert. The older one (.dat) is

    entries i32
    entry:    length i32, name, calls i32, count i32, f32[count]     values = sums / tokens * calls
    trailer:  chunks i32, length i32, name of the text               may be missing

and knows neither tokens nor matrices: read from it, an entry is one matrix, and its unit of counting is the chunk.
"""

import contextlib
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import numpy as np
import numpy.typing as npt

from phiquant.errors import ImportanceError, OutputError, RequestError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, keys

__all__ = ["DEFAULT_CHUNK_SIZE", "ImportanceMatrix", "Statistic", "merge", "read"]

DEFAULT_CHUNK_SIZE: Final = 512
"""Tokens of a chunk, where nothing else is known."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 256  # bytes of a weight's name in a .dat file
_MAX_DATASET = 1 << 16
_MAX_ENTRIES = 1 << 16
_MAX_COUNT = 1 << 53
_I32 = struct.Struct("<i")
_AGAIN = "make it again with `phiquant imatrix`"

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Statistic:
    """What was seen of one weight: `sums` float32 [matrices, columns] of squared inputs, `counts` int64 [matrices].

    `counts` are tokens, or chunks in a matrix whose `chunk_size` is 0.
    """

    sums: Floats
    counts: Counts

    @property
    def importance(self) -> Floats:
        """Mean squares, float32 [matrices, columns]; 1 for a matrix that no token reached, as llama-quantize has it."""
        counts = self.counts.astype(np.float32)[:, None]
        ones = np.ones_like(self.sums)
        return np.divide(self.sums, counts, out=ones, where=counts > 0)


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """The statistics of a model's weights, by the weights' GGUF names.

    `chunk_count`: chunks of text that were evaluated; `chunk_size`: tokens of one, 0 if read from a .dat file, which
    does not say; `datasets`: names of the texts.
    """

    entries: Mapping[str, Statistic]
    chunk_count: int
    chunk_size: int
    datasets: Sequence[str] = ()

    def importance(self, tensor: str) -> Floats | None:
        """`Statistic.importance` of a weight, None if there is no entry of that name."""
        entry = self.entries.get(tensor)
        return None if entry is None else entry.importance

    def chosen(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> "ImportanceMatrix":
        """The entries whose names contain any of `include` (if given) and none of `exclude`."""
        kept = {
            name: entry
            for name, entry in self.entries.items()
            if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)
        }
        return replace(self, entries=kept)

    def in_tokens(self, chunk_size: int = DEFAULT_CHUNK_SIZE) -> "ImportanceMatrix":
        """The same with counts in tokens: a matrix from a .dat file is taken to have chunks of `chunk_size`."""
        if self.chunk_size:
            return self
        scale = np.float32(chunk_size)
        entries = {
            name: Statistic(entry.sums * scale, entry.counts * chunk_size) for name, entry in self.entries.items()
        }
        return replace(self, entries=entries, chunk_size=chunk_size)

    def write_gguf(self, path: str | os.PathLike[str]) -> None:
        """Write llama.cpp's current format; OutputError if the path refuses, RequestError without entries."""
        self._check_writable(path)
        matrix = self.in_tokens()
        tensors: dict[str, Floats] = {}
        for name in sorted(matrix.entries, key=str.encode):
            entry = matrix.entries[name]
            tensors[name + _SUMS] = entry.sums
            tensors[name + _COUNTS] = entry.counts.astype(np.float32)[:, None]
        with GGUFWriter(path) as writer:
            writer.add(keys.TYPE, "imatrix", ValueType.STRING)
            writer.add(keys.IMATRIX_DATASETS, list(matrix.datasets), ValueType.ARRAY, ValueType.STRING)
            writer.add(keys.IMATRIX_CHUNK_COUNT, matrix.chunk_count, ValueType.UINT32)
            writer.add(keys.IMATRIX_CHUNK_SIZE, matrix.chunk_size, ValueType.UINT32)
            for name, values in tensors.items():
                writer.add_tensor(name, values.shape if len(values) > 1 else values.shape[1:], GGMLType.F32)
            writer.begin()
            for name, values in tensors.items():
                writer.write(name, np.ascontiguousarray(values, "<f4"))
            writer.commit()

    def write_dat(self, path: str | os.PathLike[str]) -> None:
        """Write llama.cpp's older format, which leaves out weights that no token reached; errors as `write_gguf`."""
        self._check_writable(path)
        chunk_size = self.chunk_size or 1  # counted in chunks already
        kept = [name for name in sorted(self.entries, key=str.encode) if self.entries[name].counts.any()]
        parts = [_I32.pack(len(kept))]
        for name in kept:
            entry = self.entries[name]
            calls = -(-int(entry.counts.max()) // chunk_size)
            values = (entry.importance * np.float32(calls)).astype("<f4")
            encoded = name.encode()
            parts += [_I32.pack(len(encoded)), encoded, struct.pack("<ii", calls, values.size), values.tobytes()]
        dataset = self.datasets[-1].encode() if self.datasets else b""
        parts += [struct.pack("<ii", self.chunk_count, len(dataset)), dataset]
        _write_whole(Path(path), b"".join(parts))

    def _check_writable(self, path: str | os.PathLike[str]) -> None:
        if not self.entries:
            raise RequestError(f"{path} is not written: there is nothing in the importance matrix.")


def read(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Read either format, told apart by content.

    ImportanceError: the file is neither, truncated, contradictory or empty, or holds values that no sum of squares has
    (NaN, infinity, less than 0). GGUFError: it is GGUF and its header is wrong.
    """
    path = Path(path)
    try:
        # Not opened before it is known to be a file: opening a pipe waits for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            _fail(path, "it is not a file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return _read_dat(_Cursor(path, file))
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImportanceError(f"{path} cannot be read: {reason}.") from error
    return _read_gguf(path)


def merge(matrices: Iterable[ImportanceMatrix], chunk_size: int = 0) -> ImportanceMatrix:
    """Add up several matrices of one model, as llama-imatrix's --in-file does.

    `chunk_size`: tokens of a chunk, for the number of chunks and for matrices from .dat files; 0: that of the first
    matrix that has one, else 512. ImportanceError if two entries of a name differ in size.
    """
    matrices = list(matrices)
    chunk_size = chunk_size or next((m.chunk_size for m in matrices if m.chunk_size), DEFAULT_CHUNK_SIZE)
    entries: dict[str, Statistic] = {}
    for matrix in matrices:
        for name, entry in matrix.in_tokens(chunk_size).entries.items():
            entries[name] = _added(name, entries[name], entry) if name in entries else entry
    tokens = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    datasets = [dataset for matrix in matrices for dataset in matrix.datasets]
    return ImportanceMatrix(entries, tokens // chunk_size, chunk_size, tuple(datasets))


def _added(name: str, a: Statistic, b: Statistic) -> Statistic:
    if a.sums.size != b.sums.size:
        raise ImportanceError(
            f"The importance matrices do not fit one another: {name} has {a.sums.size} values in one and "
            f"{b.sums.size} in another; merge only matrices of one model."
        )
    matrices = max(len(a.counts), len(b.counts))  # one count stands for all matrices
    if {len(a.counts), len(b.counts)} - {1, matrices} or a.sums.size % matrices:
        raise ImportanceError(
            f"The importance matrices do not fit one another: {name} has {len(a.counts)} matrices in one and "
            f"{len(b.counts)} in another; merge only matrices of one model."
        )
    shape = matrices, a.sums.size // matrices
    return Statistic(a.sums.reshape(shape) + b.sums.reshape(shape), np.broadcast_to(a.counts, matrices) + b.counts)


def _fail(path: Path, reason: str) -> NoReturn:
    raise ImportanceError(f"{path} is not a usable importance matrix: {reason}; {_AGAIN}.")


def _read_gguf(path: Path) -> ImportanceMatrix:
    with GGUFFile.open(path) as file:
        if file.get(keys.TYPE, str, "imatrix") != "imatrix" or keys.ARCHITECTURE in file.fields:
            _fail(path, "it is a GGUF file of another kind")
        for key in (keys.IMATRIX_DATASETS, keys.IMATRIX_CHUNK_COUNT, keys.IMATRIX_CHUNK_SIZE):
            if key not in file.fields:
                _fail(path, f"it lacks the key {key}")
        chunk_count, chunk_size = file.get(keys.IMATRIX_CHUNK_COUNT, int), file.get(keys.IMATRIX_CHUNK_SIZE, int)
        if not 0 <= chunk_count < 1 << 31 or not 0 < chunk_size < 1 << 31:
            _fail(path, f"it counts {chunk_count} chunks of {chunk_size} tokens")
        names = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
        names |= {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}
        entries = {name: _gguf_entry(path, file, name) for name in sorted(names, key=str.encode)}
        datasets = tuple(file.get(keys.IMATRIX_DATASETS, list))
    if not entries:
        _fail(path, "it has no entries")
    return ImportanceMatrix(entries, chunk_count, chunk_size, datasets)


def _gguf_entry(path: Path, file: GGUFFile, name: str) -> Statistic:
    for part in (_SUMS, _COUNTS):
        info = file.tensors.get(name + part)
        if info is None:
            _fail(path, f"it lacks the tensor {name + part}")
        if info.type is not GGMLType.F32:
            _fail(path, f"the tensor {name + part} is {info.type.name} and must be F32")
    sums = file.data(name + _SUMS).view("<f4").astype(np.float32)
    counts = file.data(name + _COUNTS).view("<f4").astype(np.float64)
    if not counts.size or not sums.size or sums.size % counts.size:
        _fail(path, f"{name} has {sums.size} sums and {counts.size} counts")
    _check_values(path, name, sums)
    if not ((counts >= 0) & (counts <= _MAX_COUNT)).all():
        _fail(path, f"{name} has counts that are no numbers of tokens")
    return Statistic(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64))


def _check_values(path: Path, name: str, values: Floats) -> None:
    if not np.isfinite(values).all():
        _fail(path, f"{name} holds NaN or infinity")
    if values.min() < 0:
        _fail(path, f"{name} holds values below 0, which no sum of squares has")


class _Cursor:
    """A .dat file and a place in it that only moves over bytes that exist."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.left = os.fstat(file.fileno()).st_size
        file.seek(0)

    def bytes(self, count: int, what: str) -> bytes:
        data = self._file.read(count) if count <= self.left else b""
        if len(data) < count:
            _fail(self.path, f"it ends within {what}")
        self.left -= count
        return data

    def number(self, what: str) -> int:
        return int(_I32.unpack(self.bytes(4, what))[0])

    def text(self, limit: int, what: str) -> str:
        length = self.number(what)
        if not 0 <= length <= limit:
            _fail(self.path, f"{what} has a length of {length} bytes")
        try:
            return self.bytes(length, what).decode()
        except UnicodeDecodeError:
            _fail(self.path, f"{what} is not valid UTF-8")


def _read_dat(cursor: _Cursor) -> ImportanceMatrix:
    path = cursor.path
    count = cursor.number("its first number")
    if not 1 <= count <= min(_MAX_ENTRIES, cursor.left // 17):  # an entry's least bytes: a name of one, one value
        _fail(path, "it is neither GGUF nor a .dat file, or has no entries")
    entries: dict[str, Statistic] = {}
    for index in range(count):
        what = f"entry {index + 1} of {count}"
        name = cursor.text(_MAX_NAME, f"the name of {what}")
        calls, size = cursor.number(what), cursor.number(what)
        if not name or name in entries:
            _fail(path, f"{what} has no name or one that was there already")
        if calls < 0 or size < 1:
            _fail(path, f"{what} announces {size} values of {calls} calls")
        values = np.frombuffer(cursor.bytes(4 * size, what), "<f4").astype(np.float32)
        _check_values(path, name, values)
        entries[name] = Statistic(values[None], np.array([calls]))
    chunk_count, dataset = 0, ""
    if cursor.left:
        chunk_count = cursor.number("its number of chunks")
        if cursor.left:
            dataset = cursor.text(_MAX_DATASET, "the name of its text")
        if cursor.left or chunk_count < 0:
            _fail(path, f"{cursor.left} bytes follow its end, and it counts {chunk_count} chunks")
    return ImportanceMatrix(entries, chunk_count, 0, (dataset,) if dataset else ())


def _write_whole(path: Path, data: bytes) -> None:
    """Give a file its name when all its bytes are there."""
    temporary = path.parent / f".phiquant-{secrets.token_hex(8)}.part"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} cannot be written: {reason}.") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)
