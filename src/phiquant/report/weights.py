"""How far the weights of a file are from those of its reference, tensor by tensor, in bounded memory.

    relative squared error = Σ w (file - reference)² / Σ w reference²

w is the importance of a column, the mean square of what it is multiplied by, or 1 without a matrix. With it the sums
are those of the squared error and the squared result of the matrix, as far as its inputs are independent.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import ImportanceError
from ..gguf import GGUFFile, TensorInfo
from ..gguf.checksum import Piece, pieces
from ..gguf.types import GGMLType
from ..kernels.dequantize import dequantize_rows
from ..quants import READABLE
from .figures import TensorError

__all__ = ["weight_errors"]

Weights = Mapping[str, NDArray[np.float32]]
"""Importance by tensor, [matrices, columns]."""


def weight_errors(
    file: GGUFFile,
    reference: GGUFFile,
    importance: Weights,
    advanced: Callable[[int], None] = lambda nbytes: None,
    threads: int = 0,
) -> list[TensorError]:
    """The errors of all tensors of a file, in its order.

    A tensor that the reference lacks, has in another shape, or in a type that is not read has none. `advanced` is told,
    by this thread, the bytes of the file that are done. ImportanceError if the importance is of another model.
    """
    found: list[TensorError] = []
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "phiquant-report") as pool:
        for info in file.tensors.values():
            other = reference.tensors.get(info.name)
            matrix, rows = len(info.shape) > 1, None
            if other is not None and other.shape == info.shape and {info.type, other.type} <= READABLE | _FLOATS:
                rows = other
            if rows is None:
                found.append(TensorError(info.name, info.type.name, matrix, info.nbytes, None))
            else:
                weights = importance.get(info.name)
                if weights is not None and weights.shape != (math.prod(info.shape[:-2]), info.shape[-1]):
                    raise ImportanceError(
                        f"the importance matrix was made with another model: it has {weights.size} values for "
                        f"{info.name} of {file.path}; collect one with this model"
                    )
                error, norm = _sums(pool, file, reference, info, rows, weights)
                found.append(
                    TensorError(info.name, info.type.name, matrix, info.nbytes, error, norm, weights is not None)
                )
            advanced(info.nbytes)
    return found


_FLOATS = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}


def _sums(
    pool: ThreadPoolExecutor,
    file: GGUFFile,
    reference: GGUFFile,
    info: TensorInfo,
    other: TensorInfo,
    importance: NDArray[np.float32] | None,
) -> tuple[float, float]:
    mine, theirs = file.data(info.name), reference.data(info.name)
    columns = info.shape[-1] if info.shape else 1
    matrix_rows = info.shape[-2] if len(info.shape) > 1 else 1

    def of(piece: Piece) -> tuple[float, float]:
        a, b = (
            dequantize_rows(_bytes(data, one.type, columns, piece), one.type, piece.rows, piece.columns)
            for data, one in ((mine, info), (theirs, other))
        )
        a -= b
        np.square(a, out=a)
        np.square(b, out=b)
        if importance is not None:
            matrices = (piece.row + np.arange(piece.rows)) // matrix_rows
            weights = importance[matrices, piece.column : piece.column + piece.columns]
            a *= weights
            b *= weights
        return float(a.sum(dtype=np.float64)), float(b.sum(dtype=np.float64))

    error = norm = 0.0
    # A few pieces at a time: a tensor may have thousands, each of which is widened to 2 MB twice.
    waiting = []
    for piece in pieces(info.shape):
        waiting.append(pool.submit(of, piece))
        if len(waiting) == _AHEAD:
            part = waiting.pop(0).result()
            error, norm = error + part[0], norm + part[1]
    for future in waiting:
        part = future.result()
        error, norm = error + part[0], norm + part[1]
    return error, norm


_AHEAD = 16


def _bytes(data: NDArray[np.uint8], kind: GGMLType, columns: int, piece: Piece) -> NDArray[np.uint8]:
    start = piece.start(kind, columns)
    return data[start : start + piece.nbytes(kind)]
