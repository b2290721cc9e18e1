"""One slab of rows on its way to blocks with error feedback: its arrays, and the kernels that work on them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu.feedback_descend import DESCEND, emit_descend
from phiquant.kernels.cpu.feedback_product import ROWS, emit_product
from phiquant.kernels.cpu.feedback_refit import REFIT, emit_refit
from phiquant.kernels.dequantize import native
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.block import join
from phiquant.quants.feedback import STEPPED, Grid, Stepped
from phiquant.quants.feedback_points import POINTED, Pointed

__all__ = ["FED", "PANELS", "Corner", "Inner", "Slab"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PANELS = 4
"""Panels of a slab: enough that what NumPy does for a block is little beside the kernels."""

FED: dict[GGMLType, Stepped | Pointed] = {**STEPPED, **POINTED}
"""What is known of the formats that are rounded with feedback."""

_WIDTH = 256


@cache
def _product() -> Any:
    return native("feedback.product", 9, emit_product)


@cache
def _descend(type: GGMLType) -> Any:
    how = FED[type]
    return native(_name("descend", type), len(DESCEND), lambda e, *values: emit_descend(e, how, *values))


@cache
def _refit(type: GGMLType) -> Any:
    how = FED[type]
    return native(_name("refit", type), len(REFIT), lambda e, *values: emit_refit(e, how, *values))


def _name(what: str, type: GGMLType) -> str:
    """Of a kernel; what it takes from the format is part of it."""
    facts = [repr(getattr(FED[type], name.name)) for name in fields(FED[type]) if name.name not in ("read", "write")]
    return f"feedback.{what}.{type.name}.{zlib.crc32(' '.join(facts).encode()):08x}"


@dataclass(frozen=True)
class Corner:
    """The part of a matrix that couples the columns of a block to one another.

    Attributes:
        matrix: float32 [width, width], rows of any stride.
        diagonal, inverse: its diagonal, and the inverses of that.
        sums: of its rows over each 16 of them, [width / 16, width].
    """

    matrix: Floats
    diagonal: Floats
    inverse: Floats
    sums: Floats

    @classmethod
    def of(cls, matrix: Floats) -> Corner:
        """With all that follows from the matrix."""
        width = len(matrix)
        sums = np.add.reduce(matrix.reshape(-1, 16, width), axis=1) if width else matrix
        diagonal = np.ascontiguousarray(np.diagonal(matrix))
        return cls(matrix, diagonal, np.reciprocal(diagonal), np.ascontiguousarray(sums))

    def sums_over(self, unit: int) -> Floats:
        """`sums` over each `unit` rows."""
        width = self.sums.shape[1]
        return np.ascontiguousarray(self.sums.reshape(-1, unit // 16, width).sum(axis=1))


@dataclass(frozen=True)
class Inner:
    """A block of columns by itself: its part of the factors, and what follows from that.

    Attributes:
        unit, variances: float32 [width, width] and [width].
        corner: of unit diag(variances) unit^T, what errors cost if all later columns make up for them.
        mixed: what is pulled from the columns before, times this, is its part of the gradient.
        unmixed: times this, it is what moves the columns' optimum: the inverse of `unit`.
    """

    unit: Floats
    variances: Floats
    corner: Corner
    mixed: Floats
    unmixed: Floats

    @classmethod
    def of(cls, unit: Floats, variances: Floats) -> Inner:
        """With all that follows from the factors."""
        weighted: Floats = unit * variances
        inverse = np.linalg.inv(unit.astype(np.float64)).astype(np.float32)
        return cls(
            unit,
            np.ascontiguousarray(variances),
            Corner.of((weighted @ unit.T).astype(np.float32, copy=False)),
            np.ascontiguousarray(weighted.T),
            inverse,
        )


class Slab:
    """Some rows of weights, at most 64 * `PANELS`, being quantized.

    Arrays are [panels][columns][64 rows]: `now` (values, at first the weights), `entries` (of the levels), `errors`
    (weights - now), all in the order given; scales and their parts, as in `quants.feedback.Grid`,
    [panels][sub-blocks or blocks][64].
    """

    def __init__(self, x: Floats, type: GGMLType, order: npt.NDArray[np.int64]) -> None:
        self.rows, self.columns = x.shape
        self.type, self.how, self.format = type, FED[type], quants.format_of(type)
        self.panels = -(-self.rows // ROWS)
        self.order, self.now = order, self._panels(x[:, order])
        self.entries, self.errors = np.zeros_like(self.now), np.zeros_like(self.now)
        subs, blocks = self.columns // self.how.unit, self.columns // type.block_elements
        self.scale, self.offset, self.steps, self.drops = (self._empty(subs) for _ in range(4))
        self.unit, self.least = self._empty(blocks), self._empty(blocks)
        self.gradient, self.moves, self.image, self.total = (self._empty(_WIDTH) for _ in range(4))

    def _empty(self, count: int) -> Floats:
        return np.zeros((self.panels, count, ROWS), np.float32)

    def _panels(self, x: Floats) -> Floats:
        """[rows, n] as [panels][n][64], with zeros for rows that are not there."""
        out = self._empty(x.shape[1])
        for panel in range(self.panels):
            part = x[panel * ROWS : (panel + 1) * ROWS]
            out[panel, :, : len(part)] = part.T
        return out

    def _rows(self, panels: Floats) -> Floats:
        """The inverse of `_panels`."""
        n = panels.shape[1]
        return np.ascontiguousarray(panels.transpose(0, 2, 1)).reshape(-1, n)[: self.rows]

    def begin(self, start: int, unit: Floats, inner: Inner, rounds: int) -> None:
        """Choose scales and levels for columns from `start` on, from what the columns before leave for them.

        Scales are sought for what the columns would be put to if they were not rounded. Then scales and levels are
        fitted to one another in so many rounds, as if all later columns made up for these as well as they can.
        """
        corner = inner.corner
        width = len(corner.matrix)
        stop = start + width
        self._pull(start, width, unit, start)
        pulled = self.gradient[:, :width].copy()
        weights = self.now[:, start:stop].copy()
        wanted = weights.copy()
        self._multiply(wanted, pulled, inner.unmixed)
        data = quantize_rows(self._rows(wanted), GGMLType.F32, self.type, inner.variances)
        self._take(start, data)
        self._descend(start, inner.unit, np.ones(width, np.float32), inner.variances, first=True)
        self.gradient[:] = 0
        self._multiply(self.gradient, pulled, inner.mixed)
        before = self.gradient.copy()
        for _ in range(rounds):
            self.gradient[:] = before
            self._multiply(self.gradient, weights - self.now[:, start:stop], corner.matrix)
            self._refit(start, corner)
            self._descend(start, corner.matrix, corner.inverse, corner.diagonal)

    def again(self, start: int, moments: Floats, corner: Corner) -> None:
        """Choose scales and levels from `start` on once more, for the moments, with all other columns as they are."""
        self._pull(start, len(corner.matrix), moments, self.columns)
        self._refit(start, corner)
        self._descend(start, corner.matrix, corner.inverse, corner.diagonal)

    def _take(self, start: int, data: Bytes) -> None:
        """The scales out of blocks."""
        blocks = data.reshape(-1).view(self.format.dtype)
        grid, first = self.how.read(blocks), start // self.type.block_elements
        count = len(blocks) // self.rows
        for name, values in vars(grid).items():
            if values is not None:
                wide = values.reshape(self.rows, -1)
                at = first * (wide.shape[1] // count)
                getattr(self, name)[:, at : at + wide.shape[1]] = self._panels(wide)

    def _pull(self, start: int, width: int, matrix: Floats, count: int) -> None:
        """gradient = the errors of the first `count` columns times the matrix, for some of its columns."""
        self.gradient[:] = 0
        _product()(
            self.gradient.ctypes.data, self.gradient.strides[0], self.errors.ctypes.data, self.errors.strides[0],
            matrix[0, start:].ctypes.data, matrix.strides[0], count, width, self.panels,
        )  # fmt: skip

    def _multiply(self, out: Floats, left: Floats, matrix: Floats) -> None:
        """out [panels, >= width, 64] += left [panels, width, 64] times the matrix [width, width]."""
        _product()(
            out.ctypes.data, out.strides[0], left.ctypes.data, left.strides[0],
            matrix.ctypes.data, matrix.strides[0], len(matrix), len(matrix), self.panels,
        )  # fmt: skip

    def _descend(self, start: int, matrix: Floats, inverse: Floats, weights: Floats, first: bool = False) -> None:
        sub = start // self.how.unit
        _descend(self.type)(
            self.now[0, start:].ctypes.data, self.entries[0, start:].ctypes.data, self.errors[0, start:].ctypes.data,
            self.now.strides[0], self.gradient.ctypes.data, self.moves.ctypes.data, self.gradient.strides[0],
            self.scale[0, sub:].ctypes.data, self.offset[0, sub:].ctypes.data, self.scale.strides[0],
            matrix.ctypes.data, matrix.strides[0], inverse.ctypes.data, len(matrix), self.panels,
            self.drops[0, sub:].ctypes.data, weights.ctypes.data, int(first),
        )  # fmt: skip

    def _refit(self, start: int, corner: Corner) -> None:
        sub, block = start // self.how.unit, start // self.type.block_elements
        matrix, sums = corner.matrix, corner.sums_over(self.how.unit)
        _refit(self.type)(
            self.now[0, start:].ctypes.data, self.entries[0, start:].ctypes.data, self.errors[0, start:].ctypes.data,
            self.now.strides[0], self.gradient.ctypes.data, self.image.ctypes.data, self.total.ctypes.data,
            self.gradient.strides[0], self.scale[0, sub:].ctypes.data, self.offset[0, sub:].ctypes.data,
            self.steps[0, sub:].ctypes.data, self.drops[0, sub:].ctypes.data, self.scale.strides[0],
            self.unit[0, block:].ctypes.data, self.least[0, block:].ctypes.data, self.unit.strides[0],
            matrix.ctypes.data, matrix.strides[0], sums.ctypes.data, len(matrix), self.panels,
        )  # fmt: skip

    def bytes(self) -> Bytes:
        """The blocks [rows, row_bytes], columns in the order of the weights."""
        blocks = np.zeros(self.rows * (self.columns // self.type.block_elements), self.format.dtype)
        count = len(blocks)
        entries = self._ordered(self.entries).reshape(count, -1)
        parts = {field.name: self._ordered(getattr(self, field.name)).reshape(count, -1) for field in fields(Grid)}
        parts.update({name: parts[name][:, 0] for name in ("unit", "least")})
        grid = Grid(**parts)
        if isinstance(self.how, Pointed):
            self.how.write(blocks, grid, entries)
        else:
            self.how.write(blocks, grid)
            join(blocks, self.format.planes, self.how.levels(entries))
        return blocks.view(np.uint8).reshape(self.rows, -1)

    def _ordered(self, panels: Floats) -> Floats:
        """Rows of values of columns, sub-blocks or blocks, those in the order of the weights."""
        size = self.columns // panels.shape[1]
        out = np.empty((self.rows, panels.shape[1]), np.float32)
        out[:, self.order[::size] // size] = self._rows(panels)
        return out
