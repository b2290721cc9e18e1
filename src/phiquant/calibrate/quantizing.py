"""Weights quantized in memory, and how far that moves them.

Which quantizer is used is the caller's choice: a function from a planned tensor and its bytes as stored to its bytes as
planned. `quantized` is the one that `phiquant quantize` has: rows, weighted by importance.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.rows import convert_rows
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows

__all__ = ["Quantizer", "distortions", "quantized"]

Bytes = NDArray[np.uint8]

Quantizer = Callable[[PlannedTensor, Bytes], Bytes]
"""Of a tensor with its type, importance and shape, and its bytes in the source: its bytes in the output, uint8 [n].

The tensor may be a sample of some rows of a larger one of the same name.
"""

_PIECE: Final = 1 << 19  # elements that a thread converts at a time
_SAMPLE: Final = 1 << 18  # elements of each matrix by which types are compared


def quantized(tensor: PlannedTensor, data: Bytes, *, threads: int = 0) -> Bytes:
    """The bytes that a quantization writes for a tensor, from those of the source. WeightsError as `convert_rows`."""
    if tensor.type is tensor.source:
        return data
    columns = tensor.shape[-1]
    rows = data.reshape(tensor.rows, -1)
    step = max(1, _PIECE // columns)
    parts = [
        (matrix, begin, min(begin + step, (matrix + 1) * tensor.matrix_rows))
        for matrix in range(tensor.rows // tensor.matrix_rows)
        for begin in range(matrix * tensor.matrix_rows, (matrix + 1) * tensor.matrix_rows, step)
    ]
    out = np.empty((tensor.rows, tensor.type.row_bytes(columns)), np.uint8)

    def convert(part: tuple[int, int, int]) -> None:
        matrix, begin, end = part
        weights = None if tensor.importance is None else tensor.importance[matrix]
        part_rows = rows[begin:end].reshape(-1)
        try:
            done = convert_rows(part_rows, tensor.source, tensor.type, end - begin, columns, importance=weights)
        except WeightsError as error:
            raise WeightsError(f"Tensor {tensor.name}: {error}") from error
        out[begin:end] = done.reshape(end - begin, -1)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        list(pool.map(convert, parts))
    return out.reshape(-1)


def distortions(
    tensor: PlannedTensor, data: Bytes, types: list[GGMLType], quantizer: Quantizer
) -> dict[GGMLType, float]:
    """The squared error of a weight at each of some types, every column's weighted by its importance: tr(E diag(H) Eᵀ).

    Of some rows, spread evenly, scaled to all of them; 0 for the type that it has.
    """
    columns = tensor.shape[-1]
    matrices = tensor.rows // tensor.matrix_rows
    count = min(tensor.matrix_rows, max(8, _SAMPLE // (columns * matrices)))
    picked = np.arange(count) * tensor.matrix_rows // count
    rows = (np.arange(matrices)[:, None] * tensor.matrix_rows + picked).reshape(-1)
    sample = np.ascontiguousarray(data.reshape(tensor.rows, -1)[rows])
    shape = (count, columns) if matrices == 1 else (matrices, count, columns)
    exact = dequantize_rows(sample, tensor.source, len(rows), columns)
    weights = np.ones((1, columns), np.float32) if tensor.importance is None else tensor.importance
    scale = tensor.rows / len(rows)
    found = {}
    for kind in types:
        if kind is tensor.source:
            found[kind] = 0.0
            continue
        made = quantizer(replace(tensor, shape=shape, type=kind), sample.reshape(-1))
        error = dequantize_rows(made, kind, len(rows), columns) - exact
        by_matrix = np.square(error, out=error).reshape(len(weights), -1, columns)
        found[kind] = scale * float(np.einsum("mrc,mc->", by_matrix, weights, dtype=np.float64))
    return found
