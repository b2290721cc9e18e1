"""One slab of rows on its way to blocks with error feedback: its arrays, and the kernels that work on them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu.feedback_descend import DESCEND, emit_descend
from phiquant.kernels.cpu.feedback_product import ROWS, emit_product
from phiquant.kernels.dequantize import native
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.block import join
from phiquant.quants.feedback import STEPPED

__all__ = ["PANELS", "Slab"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PANELS = 4
"""Panels of a slab: enough that what NumPy does for a block is little beside the kernels."""

_WIDTH = 256


@cache
def _product() -> Any:
    return native("feedback.product", 9, emit_product)


@cache
def _descend(type: GGMLType) -> Any:
    how = STEPPED[type]
    table = "" if how.table is None else how.table.tobytes().hex()
    name = f"feedback.descend.{how.low}.{how.top}.{how.unit}.{table}"
    return native(name, len(DESCEND), lambda e, *values: emit_descend(e, how, how.unit, *values))


class Slab:
    """Some rows of weights, at most 64 * `PANELS`, being quantized.

    Arrays are [panels][columns][64 rows]: `now` (values, at first the weights), `entries` (of the levels), `errors`
    (weights - now), and `scale` and `offset` [panels][sub-blocks][64].
    """

    def __init__(self, x: Floats, type: GGMLType) -> None:
        self.rows, self.columns = x.shape
        self.type, self.how, self.format = type, STEPPED[type], quants.format_of(type)
        self.panels = -(-self.rows // ROWS)
        shape = (self.panels, self.columns, ROWS)
        self.now = self._panels(x)
        self.entries, self.errors = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        subs = (self.panels, self.columns // self.how.unit, ROWS)
        self.scale, self.offset = np.zeros(subs, np.float32), np.zeros(subs, np.float32)
        narrow = (self.panels, _WIDTH, ROWS)
        self.gradient, self.moves = np.zeros(narrow, np.float32), np.zeros(narrow, np.float32)
        self.blocks = np.zeros((self.rows, self.columns // type.block_elements), self.format.dtype)

    def _panels(self, x: Floats) -> Floats:
        """[rows, n] as [panels][n][64], with zeros for rows that are not there."""
        out = np.zeros((self.panels, x.shape[1], ROWS), np.float32)
        for panel in range(self.panels):
            part = x[panel * ROWS : (panel + 1) * ROWS]
            out[panel, :, : len(part)] = part.T
        return out

    def _rows(self, panels: Floats) -> Floats:
        """The inverse of `_panels`."""
        n = panels.shape[1]
        return np.ascontiguousarray(panels.transpose(0, 2, 1)).reshape(-1, n)[: self.rows]

    def begin(self, start: int, width: int, unit: Floats, variances: Floats) -> None:
        """Choose scales for columns from `start` on, from what the columns before leave for them, and round."""
        self._pull(start, width, unit, start)
        targets = self._rows(self.now[:, start : start + width] + self.gradient[:, :width])
        data = quantize_rows(targets, GGMLType.F32, self.type, variances[start : start + width])
        elements = self.type.block_elements
        blocks = data.reshape(-1).view(self.format.dtype)
        self.blocks[:, start // elements : (start + width) // elements] = blocks.reshape(self.rows, -1)
        grid = self.how.grid(blocks)
        subs = slice(start // self.how.unit, (start + width) // self.how.unit)
        self.scale[:, subs] = self._panels(grid.scale.reshape(self.rows, -1))
        self.offset[:, subs] = self._panels(grid.offset.reshape(self.rows, -1))
        self._descend(start, width, unit, np.ones(width, np.float32))

    def again(self, start: int, width: int, moments: Floats, inverse: Floats) -> None:
        """Choose the levels of columns from `start` on once more, for the moments, all other columns as they are."""
        self._pull(start, width, moments, self.columns)
        self._descend(start, width, moments, inverse[start : start + width])

    def _pull(self, start: int, width: int, matrix: Floats, count: int) -> None:
        """gradient = the errors of the first `count` columns times the matrix, for some of its columns."""
        self.gradient[:] = 0
        _product()(
            self.gradient.ctypes.data, self.gradient.strides[0], self.errors.ctypes.data, self.errors.strides[0],
            matrix[0, start:].ctypes.data, matrix.strides[0], count, width, self.panels,
        )  # fmt: skip

    def _descend(self, start: int, width: int, matrix: Floats, inverse: Floats) -> None:
        sub = start // self.how.unit
        _descend(self.type)(
            self.now[0, start:].ctypes.data, self.entries[0, start:].ctypes.data, self.errors[0, start:].ctypes.data,
            self.now.strides[0], self.gradient.ctypes.data, self.moves.ctypes.data, self.gradient.strides[0],
            self.scale[0, sub:].ctypes.data, self.offset[0, sub:].ctypes.data, self.scale.strides[0],
            matrix[start, start:].ctypes.data, matrix.strides[0], inverse.ctypes.data, width, self.panels,
        )  # fmt: skip

    def bytes(self) -> Bytes:
        """The blocks [rows, row_bytes]."""
        entries = self._rows(self.entries)
        if self.how.table is None:
            levels = entries.astype(np.int32) + self.how.stored
        else:
            levels = np.searchsorted(self.how.table.astype(np.float32), entries).astype(np.int32)
        blocks = self.blocks.reshape(-1)
        join(blocks, self.format.planes, levels.reshape(len(blocks), -1))
        return blocks.view(np.uint8).reshape(self.rows, -1)
