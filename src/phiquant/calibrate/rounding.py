"""From a matrix and the moments of its inputs to blocks of a type: by error feedback where the type has it."""

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.moments import Moments
from phiquant.calibrate.search import Search
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels.coupled import Coupling, coupled_rows
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.feedback import SUPPORTED, Factor, check_rows, factorize, feedback_rows
from phiquant.kernels.ops import Weight
from phiquant.kernels.quantize import quantize_rows

__all__ = ["made_of"]

_FLOATS: Final = 1 << 24  # weights that are widened at a time


Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def made_of(
    weights: Mapping[str, Weight],
    tensors: Mapping[str, PlannedTensor],
    moments: Moments,
    threads: int,
    search: Search,
    couplings: Mapping[str, Coupling] = MappingProxyType({}),
) -> dict[str, Weight]:
    """Weights that read the same rows, of which there are these moments, in the types that a plan has for them.

    All are by the source's names; `couplings` are of rows, where it is known what errors in the products cost.
    WeightsError names the tensor that holds NaN, infinity or too large values.
    """
    data = {name: np.empty(tensors[name].nbytes, np.uint8) for name in weights}
    matrices = len(moments.counts)
    feedback = any(tensors[name].type in SUPPORTED for name in weights)
    for index in range(matrices):
        factor = _factor(moments.of(index), search) if feedback else None
        for name, weight in weights.items():
            type, matrix = tensors[name].type, weight.matrix(index) if matrices > 1 else weight
            importance = moments.importance(index) if type not in SUPPORTED else None
            coupling = couplings.get(name)
            out = data[name].reshape(matrices, weight.rows, -1)[index]
            whole = coupling is not None and importance is None
            for first, rows in _widened(matrix, weight.rows if whole else None):
                try:
                    if importance is None:
                        assert factor is not None
                        made = _fed_back(rows, type, factor, coupling, threads, search)
                    else:
                        made = quantize_rows(rows, GGMLType.F32, type, importance)
                except WeightsError as error:
                    raise WeightsError(f"Tensor {name}, rows from {first} on: {error}") from error
                out[first : first + len(rows)] = made
    return {name: Weight(name, tensors[name].type, weight.shape, data[name]) for name, weight in weights.items()}


def _factor(moments: Floats, search: Search) -> Factor:
    return factorize(moments, damping=search.damping, by_activation=search.by_activation)


def _fed_back(
    rows: Floats, type: GGMLType, factor: Factor, coupling: Coupling | None, threads: int, search: Search
) -> Bytes:
    rounded_rows = partial(
        feedback_rows, type=type, factor=factor, threads=threads, rounds=search.rounds, sweeps=search.sweeps
    )
    if coupling is None:
        return rounded_rows(rows)

    def rounded(part: Floats) -> tuple[Bytes, Floats]:
        made = rounded_rows(np.ascontiguousarray(part))
        return made, dequantize_rows(made, type, *part.shape)

    check_rows(rows)  # names the row; those that are rounded stand in another order
    return coupled_rows(rows, coupling, rounded)


def _widened(weight: Weight, step: int | None = None) -> Iterator[tuple[int, Floats]]:
    """First row and float32 rows of parts of a matrix, of `step` rows each if that is a number."""
    data: Bytes = weight.data.reshape(weight.rows, -1)
    step = max(1, _FLOATS // weight.columns) if step is None else step
    for first in range(0, weight.rows, step):
        part = data[first : first + step]
        yield first, dequantize_rows(part, weight.type, len(part), weight.columns)
