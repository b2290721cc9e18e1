"""What is continuous in a quantized model, while it is tuned: scales of blocks, and vectors of norms and biases.

Everything is a relative change, 0 at the start:

    scale = float16(scale of the file * (1 + change))       a matrix, [fields, blocks]
    value = value of the file + change * unit               a vector [n]; unit |value|, of biases their root mean square

Matrices are widened some rows at a time, from blocks that hold the scales as a file would.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.scale_fields import scale_fields, scales_of, values_of_field, with_scales
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.ops import Weight

__all__ = ["Tuned"]

Floats = NDArray[np.float32]
Array = NDArray[Any]

PART: Final = 1 << 22
"""Weights that are widened at a time."""
LARGEST: Final = 0.5
"""Most that anything is changed, as a part of itself: no scale changes its sign."""


class Tuned:
    """Weights and the changes to them; what a pass through the model reads, and where it adds its derivatives up.

    Attributes:
        changes: float32 of the shapes above, by name; of the weights that are tuned.
        gradients: of the loss by them, alike.

    Args:
        weights: of the model as its file holds them, by name.
        tune: whether anything is; else the weights are only read.
    """

    def __init__(self, weights: Mapping[str, Weight], *, tune: bool = True) -> None:
        self.changes: dict[str, Floats] = {}
        for name, weight in weights.items() if tune else ():
            if len(weight.shape) == 1 and weight.type is GGMLType.F32:
                self.changes[name] = np.zeros(weight.shape, np.float32)
            elif fields := scale_fields(weight.type):
                self.changes[name] = np.zeros((len(fields), _blocks(weight)), np.float32)
        self.gradients = {name: np.zeros_like(change) for name, change in self.changes.items()}
        self._weights = weights

    @property
    def count(self) -> int:
        """How many numbers are tuned."""
        return sum(change.size for change in self.changes.values())

    @property
    def sizes(self) -> dict[str, float]:
        """How far off values are as they were rounded, as a part of themselves: 2^-b of b bits each; by name.

        Vectors, which are exact, make up for the matrices: theirs is the geometric mean.
        """
        sizes = {name: 2.0 ** -_bits(self._weights[name]) for name in self.changes if self._is_matrix(name)}
        numbers = [self.changes[name].size for name in sizes]
        mean = float(np.exp(np.average(np.log(list(sizes.values())), weights=numbers))) if sizes else 1.0
        return {name: sizes.get(name, mean) for name in self.changes}

    @property
    def matrices(self) -> int:
        """How many matrices have scales that are tuned."""
        return sum(self._is_matrix(name) for name in self.changes)

    def _is_matrix(self, name: str) -> bool:
        return len(self._weights[name].shape) > 1

    def rows(self, weight: Weight, matrix: int = 0) -> Iterator[tuple[slice, Array]]:
        """Parts of a matrix (of one expert's), widened: which rows they are, and the values [rows, columns]."""
        for part, data, blocks in _parts(weight, matrix):
            yield part, self._widened(weight, data, blocks)

    def some_rows(self, weight: Weight, which: NDArray[np.integer[Any]]) -> Array:
        """Rows of a matrix, widened: [len(which), columns]."""
        data = weight.data.reshape(weight.rows, -1)[which]
        return self._widened(weight, data, _blocks_of_rows(weight, which))

    def vector(self, weight: Weight) -> Array:
        """The values of a vector [n]."""
        values = _vector(weight)
        change = self.changes.get(weight.name)
        return values if change is None else values + change * _unit(weight, values)

    def add_vector(self, weight: Weight, gradient: Array) -> None:
        """Take in the derivative of the loss by the values of a vector."""
        if weight.name in self.changes:
            self.gradients[weight.name] += gradient * _unit(weight, _vector(weight))

    def add_product(self, weight: Weight, by_out: Array, x: Array, matrix: int = 0) -> None:
        """Take in what follows from out = x W^T and the derivative of the loss by `out`, both [n, ...]."""
        if weight.name not in self.changes:
            return
        for part, data, blocks in _parts(weight, matrix):
            self._add(weight, data, blocks, by_out[:, part].T @ x)

    def add_some_rows(self, weight: Weight, which: NDArray[np.integer[Any]], by_rows: Array) -> None:
        """Take in the derivative of the loss by some rows of a matrix, each at most once."""
        if weight.name in self.changes:
            data = weight.data.reshape(weight.rows, -1)[which]
            self._add(weight, data, _blocks_of_rows(weight, which), by_rows)

    def weight(self, name: str) -> Weight:
        """A weight as it is now, in its type."""
        weight = self._weights[name]
        change = self.changes.get(name)
        if change is None:
            return weight
        if len(weight.shape) == 1:
            return Weight(name, weight.type, weight.shape, self.vector(weight).astype(np.float32).view(np.uint8))
        return Weight(name, weight.type, weight.shape, _changed(weight.data, weight.type, change))

    def _widened(self, weight: Weight, data: NDArray[np.uint8], blocks: Any) -> Array:
        change = self.changes.get(weight.name)
        if change is not None:
            data = _changed(data, weight.type, change[:, blocks])
        return dequantize_rows(data, weight.type, len(data), weight.columns)

    def _add(self, weight: Weight, data: NDArray[np.uint8], blocks: Any, by_rows: Array) -> None:
        """The derivative by the rows' values [rows, columns], taken to that by the changes of their scales."""
        type, gradient = weight.type, self.gradients[weight.name]
        scales = scales_of(data, type)
        for index, field in enumerate(scale_fields(type)):
            values = values_of_field(data, type, field, len(data), weight.columns)
            shape = (-1, type.block_elements)
            by_scale = np.einsum("be,be->b", by_rows.reshape(shape), values.reshape(shape))
            gradient[index, blocks] += by_scale * scales[index]


def _changed(data: NDArray[np.uint8], type: GGMLType, change: Floats) -> NDArray[np.uint8]:
    return with_scales(data, type, scales_of(data, type) * (1 + np.clip(change, -LARGEST, LARGEST)))


def _parts(weight: Weight, matrix: int) -> Iterator[tuple[slice, NDArray[np.uint8], slice]]:
    """Rows of a matrix, their bytes [rows, bytes], and which blocks of the tensor they are."""
    data = (weight.matrix(matrix) if weight.matrices > 1 else weight).data.reshape(weight.rows, -1)
    step, per_row = max(1, PART // weight.columns), weight.columns // weight.type.block_elements
    first = matrix * weight.rows
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        yield slice(start, stop), data[start:stop], slice((first + start) * per_row, (first + stop) * per_row)


def _bits(weight: Weight) -> float:
    return 8 * weight.type.block_bytes / weight.type.block_elements


def _blocks(weight: Weight) -> int:
    return int(np.prod(weight.shape, dtype=np.int64)) // weight.type.block_elements


def _blocks_of_rows(weight: Weight, which: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    per_row = weight.columns // weight.type.block_elements
    blocks: NDArray[np.int64] = (which[:, None] * per_row + np.arange(per_row)).reshape(-1)
    return blocks


def _vector(weight: Weight) -> Floats:
    values: Floats = dequantize_rows(weight.data, weight.type, 1, weight.columns)[0]
    return values


def _unit(weight: Weight, values: Array) -> Array:
    """What a change of 1 of a vector is."""
    if weight.name.endswith(".bias"):
        return np.full_like(values, np.sqrt(np.mean(np.square(values))))
    return np.abs(values)
