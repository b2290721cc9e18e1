"""Second moments of a model's inputs in a file, to make several types of one reading of a text.

A GGUF file. For weights that read the same rows, the tensor `NAME.moments`, F32 [matrices, columns (columns + 1) / 2],
holds the lower triangles of H = sum of x x^T row by row, and `NAME.counts`, F32 [matrices], the rows; NAME is the first
of the weights. That takes 2 bytes columns² for each matrix: 6 GB for a model of 3.8 G parameters.

    general.type                    "statistics"
    phiquant.statistics.model       SHA-256 of what tells one model from another (`identity`)
    phiquant.statistics.weights     array of strings: the names of weights that share an entry, separated by commas
    phiquant.statistics.tokens, .context, .dataset, .dataset_hash
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from phiquant.arch import names
from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.moments import Moments
from phiquant.calibrate.stages import Group
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.errors import ImportanceError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, keys
from phiquant.gguf.closing import Closing

__all__ = ["MomentsFile", "identity", "is_moments_file", "write_moments"]

_TYPE: Final = "statistics"
_MOMENTS, _COUNTS = ".moments", ".counts"


def identity(model: GGUFFile) -> str:
    """What tells a model from another, whatever types its matrices are stored as: hexadecimal SHA-256.

    Of its architecture, the names and shapes of its tensors, its vocabulary, and the values of its vectors in F32,
    which no conversion changes.
    """
    found = hashlib.sha256(model.get(keys.ARCHITECTURE, str, "").encode())
    for name in sorted(model.tensors):
        info = model.tensors[name]
        found.update(f"\0{name}\0{info.shape}".encode())
        if len(info.shape) < 2 and info.type is GGMLType.F32:
            found.update(np.ascontiguousarray(model.data(name)).data)
    for token in model.get(keys.TOKENS, list, []):
        found.update(token.encode() + b"\0")
    return found.hexdigest()


def is_moments_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a GGUF file of this kind."""
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != b"GGUF":
                return False
    except (OSError, ValueError):
        return False
    with GGUFFile.open(path) as opened:
        return bool(opened.get(keys.TYPE, str, "") == _TYPE)


def write_moments(
    path: str | os.PathLike[str], model: str, chunks: Chunks, groups: Sequence[Group], found: Iterator[list[Moments]]
) -> None:
    """Write the moments of groups as they come, in their order; `model` is its `identity`. OutputError."""
    with GGUFWriter(path) as writer:
        writer.add(keys.TYPE, _TYPE, ValueType.STRING)
        writer.add(keys.STATISTICS_MODEL, model, ValueType.STRING)
        writer.add(keys.STATISTICS_TOKENS, chunks.tokens, ValueType.UINT32)
        writer.add(keys.STATISTICS_CONTEXT, chunks.context, ValueType.UINT32)
        writer.add(keys.STATISTICS_DATASET, chunks.dataset, ValueType.STRING)
        writer.add(keys.STATISTICS_DATASET_HASH, chunks.digest, ValueType.STRING)
        names = [",".join(group.names) for group in groups]
        writer.add(keys.STATISTICS_WEIGHTS, names, ValueType.ARRAY, ValueType.STRING)
        for group in groups:
            n = group.x.width
            writer.add_tensor(group.names[0] + _MOMENTS, (group.matrices, n * (n + 1) // 2), GGMLType.F32)
            writer.add_tensor(group.names[0] + _COUNTS, (group.matrices,), GGMLType.F32)
        writer.begin()
        left = iter(groups)
        for several in found:
            for moments in several:
                name, n = next(left).names[0], moments.sums.shape[1]
                for matrix, sums in enumerate(moments.sums):
                    packed = _packed(sums)
                    writer.write(name + _MOMENTS, packed, matrix * packed.nbytes)
                writer.write(name + _COUNTS, moments.counts.astype("<f4"))
        writer.commit()


@dataclass(frozen=True, eq=False)
class MomentsFile(Closing):
    """Such a file, open; a context manager.

    Attributes:
        path: its own.
        model: the identity of the model that was observed.
        tokens: that it read.
        context: tokens of a chunk.
        dataset, digest: of the text.
    """

    path: Path
    model: str
    tokens: int
    context: int
    dataset: str
    digest: str
    _file: GGUFFile
    _entries: dict[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "MomentsFile":
        """GGUFError: it is damaged. ImportanceError: it is something else, or contradicts itself."""
        path = Path(path)
        if not is_moments_file(path):
            _fail(path, "it is a file of another kind")
        file = GGUFFile.open(path)
        try:
            entries: dict[str, str] = {}
            for names in file.require(keys.STATISTICS_WEIGHTS, list):
                first, *others = names.split(",")
                for part in (_MOMENTS, _COUNTS):
                    info = file.tensors.get(first + part)
                    if info is None or info.type is not GGMLType.F32:
                        _fail(path, f"it lacks the tensor {first + part} in F32")
                entries |= dict.fromkeys([first, *others], first)
            return cls(
                path,
                file.require(keys.STATISTICS_MODEL, str),
                file.require(keys.STATISTICS_TOKENS, int),
                file.require(keys.STATISTICS_CONTEXT, int),
                file.require(keys.STATISTICS_DATASET, str),
                file.require(keys.STATISTICS_DATASET_HASH, str),
                file,
                entries,
            )
        except BaseException:
            file.close()
            raise

    def check(self, model: GGUFFile, name: str) -> None:
        """ImportanceError if it is of another model than the one that is open and called `name`."""
        if self.model != identity(model):
            raise ImportanceError(
                f"{self.path} holds statistics of another model than {name}, or of the same with another vocabulary; "
                "collect them again with --calibrate TEXT and another name for --statistics."
            )

    def moments(self, name: str, matrices: int, columns: int) -> Moments:
        """Of the inputs of a weight; ImportanceError if there are none, or of other sizes, or no numbers."""
        if name not in self._entries:
            _fail(self.path, f"it has no entry for {name}")
        first = self._entries[name]
        counts = np.rint(self._file.data(first + _COUNTS).view("<f4").astype(np.float64))
        data = self._file.data(first + _MOMENTS).view("<f4")
        size = columns * (columns + 1) // 2
        if counts.size != matrices or data.size != matrices * size:
            _fail(self.path, f"its entry for {name} is not of {matrices} matrices of {columns} columns")
        if not ((counts >= 0) & (counts < 1 << 53)).all() or not np.isfinite(data).all():
            _fail(self.path, f"its entry for {name} holds what is no moment or no count")
        sums = np.stack([_unpacked(data[i * size : (i + 1) * size], columns) for i in range(matrices)])
        return Moments(sums, counts.astype(np.int64))

    def matrix(self) -> ImportanceMatrix:
        """The diagonals as an importance matrix; not of an embedding that is the output too, as llama-imatrix."""
        entries: dict[str, Statistic] = {}
        for name, first in self._entries.items():
            if name == names.TOKEN_EMBD:
                continue
            counts = np.rint(self._file.data(first + _COUNTS).view("<f4")).astype(np.int64)
            data = self._file.data(first + _MOMENTS).view("<f4").reshape(len(counts), -1)
            columns = (int(np.sqrt(8 * data.shape[1] + 1)) - 1) // 2
            places = np.arange(columns) * (np.arange(columns) + 3) // 2
            sums = data[:, places].astype(np.float32)
            if columns * (columns + 1) // 2 != data.shape[1] or not (np.isfinite(sums) & (sums >= 0)).all():
                _fail(self.path, f"its entry for {name} holds no sums of squares")
            entries[name] = Statistic(sums, counts)
        return ImportanceMatrix(entries, self.tokens // self.context, self.context, (self.dataset,))

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def _packed(square: NDArray[np.float32]) -> NDArray[np.float32]:
    """The lower triangle, row by row."""
    n = len(square)
    out = np.empty(n * (n + 1) // 2, "<f4")
    for i in range(n):
        out[i * (i + 1) // 2 :][: i + 1] = square[i, : i + 1]
    return out


def _unpacked(triangle: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    square = np.zeros((n, n), np.float32)
    for i in range(n):
        row = triangle[i * (i + 1) // 2 :][: i + 1]
        square[i, : i + 1] = row
        square[: i + 1, i] = row
    return square


def _fail(path: Path, reason: str) -> NoReturn:
    raise ImportanceError(f"{path} is not a usable file of statistics: {reason}; collect them again.")
