"""How far the weights of a file are from those of its reference, tensor by tensor, in bounded memory.

Files are read, not mapped: what is mapped would count until others need the memory.

    relative squared error = Σ w (file - reference)² / Σ w reference²

w is the importance of a column, the mean square of what it is multiplied by, or 1 without a matrix. With it the sums
are those of the squared error and the squared result of the matrix, as far as its inputs are independent.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ..convert.positioned import PositionedFile
from ..errors import GGUFError, ImportanceError
from ..gguf import GGUFFile, TensorInfo
from ..gguf.checksum import Piece, pieces
from ..gguf.types import GGMLType
from ..kernels.dequantize import dequantize_rows
from ..quants import READABLE
from .figures import TensorError

__all__ = ["weight_errors"]

Weights = Mapping[str, NDArray[np.float32]]
"""Importance by tensor, [matrices, columns]."""

_FLOATS: Final = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}
_AHEAD: Final = 16  # pieces on their way: a tensor may have thousands, each of which is widened to 2 MB twice


def weight_errors(
    file: GGUFFile,
    reference: GGUFFile,
    importance: Weights,
    advanced: Callable[[int], None] = lambda nbytes: None,
    threads: int = 0,
) -> list[TensorError]:
    """The errors of all tensors of a file, in its order.

    A tensor that the reference lacks, has in another shape, or in a type that is not read has none. `advanced` is
    told, by this thread, the bytes of the file that are done. ImportanceError if the importance is of another model,
    GGUFError if a file cannot be read.
    """
    found: list[TensorError] = []
    with ExitStack() as stack:
        mine, theirs = (stack.enter_context(_Reader(gguf)) for gguf in (file, reference))
        pool = stack.enter_context(ThreadPoolExecutor(threads or os.cpu_count() or 1, "phiquant-report"))
        for info in file.tensors.values():
            other = reference.tensors.get(info.name)
            matrix = len(info.shape) > 1
            if other is None or other.shape != info.shape or not {info.type, other.type} <= READABLE | _FLOATS:
                found.append(TensorError(info.name, info.type.name, matrix, info.nbytes, None))
            else:
                weights = importance.get(info.name)
                if weights is not None and weights.shape != (math.prod(info.shape[:-2]), info.shape[-1]):
                    raise ImportanceError(
                        f"the importance matrix was made with another model: it has {weights.size} values for "
                        f"{info.name} of {file.path}; collect one with this model"
                    )
                error, norm = _sums(pool, mine, theirs, info, other, weights)
                found.append(
                    TensorError(info.name, info.type.name, matrix, info.nbytes, error, norm, weights is not None)
                )
            advanced(info.nbytes)
    return found


class _Reader:
    """The tensors of a model, read in pieces from any thread; a context manager."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf
        self._files = {part.path: PositionedFile(part.path, GGUFError) for part in gguf.parts}

    def values(self, info: TensorInfo, piece: Piece) -> NDArray[np.float32]:
        """Of a piece, float32 [rows, columns]."""
        part, offset = self._gguf.locate(info.name)
        data = np.empty(piece.nbytes(info.type), np.uint8)
        columns = info.shape[-1] if info.shape else 1
        self._files[part.path].read_into(offset + piece.start(info.type, columns), data)
        return dequantize_rows(data, info.type, piece.rows, piece.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()


def _sums(
    pool: ThreadPoolExecutor,
    mine: _Reader,
    theirs: _Reader,
    info: TensorInfo,
    other: TensorInfo,
    importance: NDArray[np.float32] | None,
) -> tuple[float, float]:
    matrix_rows = info.shape[-2] if len(info.shape) > 1 else 1

    def of(piece: Piece) -> tuple[float, float]:
        difference, values = mine.values(info, piece), theirs.values(other, piece)
        difference -= values
        if importance is None:
            return _squares(difference, difference), _squares(values, values)
        matrices = (piece.row + np.arange(piece.rows)) // matrix_rows
        weights = importance[matrices, piece.column : piece.column + piece.columns]
        return _squares(difference, difference * weights), _squares(values, values * weights)

    error = norm = 0.0
    waiting: list[Future[tuple[float, float]]] = []
    try:
        for piece in pieces(info.shape):
            waiting.append(pool.submit(of, piece))
            if len(waiting) == _AHEAD:
                part = waiting.pop(0).result()
                error, norm = error + part[0], norm + part[1]
        for future in waiting:
            part = future.result()
            error, norm = error + part[0], norm + part[1]
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
    return error, norm


def _squares(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of all products: rows in float32, their sums in float64."""
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))
