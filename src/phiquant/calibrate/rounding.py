"""From a matrix and the moments of its inputs to blocks of a type: by error feedback where the type has it."""

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.moments import Moments
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.feedback import SUPPORTED, factorize, feedback_rows
from phiquant.kernels.ops import Weight
from phiquant.kernels.quantize import quantize_rows

__all__ = ["made_of"]

_FLOATS: Final = 1 << 24  # weights that are widened at a time


def made_of(
    weights: Mapping[str, Weight], tensors: Mapping[str, PlannedTensor], moments: Moments, threads: int
) -> dict[str, Weight]:
    """Weights that read the same rows, of which there are these moments, in the types that a plan has for them.

    Both are by the source's names. WeightsError names the tensor that holds NaN, infinity or too large values.
    """
    data = {name: np.empty(tensors[name].nbytes, np.uint8) for name in weights}
    matrices = len(moments.counts)
    feedback = any(tensors[name].type in SUPPORTED for name in weights)
    for index in range(matrices):
        factor = factorize(moments.of(index)) if feedback else None
        for name, weight in weights.items():
            type, matrix = tensors[name].type, weight.matrix(index) if matrices > 1 else weight
            importance = moments.importance(index) if type not in SUPPORTED else None
            out = data[name].reshape(matrices, weight.rows, -1)[index]
            for first, rows in _widened(matrix):
                try:
                    if importance is None:
                        assert factor is not None
                        made = feedback_rows(rows, type, factor, threads=threads)
                    else:
                        made = quantize_rows(rows, GGMLType.F32, type, importance)
                except WeightsError as error:
                    raise WeightsError(f"Tensor {name}, rows from {first} on: {error}") from error
                out[first : first + len(rows)] = made
    return {name: Weight(name, tensors[name].type, weight.shape, data[name]) for name, weight in weights.items()}


def _widened(weight: Weight) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """First row and float32 rows of parts of a matrix."""
    data: NDArray[np.uint8] = weight.data.reshape(weight.rows, -1)
    step = max(1, _FLOATS // weight.columns)
    for first in range(0, weight.rows, step):
        part = data[first : first + step]
        yield first, dequantize_rows(part, weight.type, len(part), weight.columns)
