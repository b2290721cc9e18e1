"""Products of panels with a square matrix, and what the kernels of error feedback share.

A panel is 64 rows of weights: [columns][64 rows], so that a lane is a row. A slab is some panels, one after
the other. Every sum runs over the columns in their order, whatever the number of panels and threads: the bits of a row
depend on nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from .emit import F32, Emitter, Value, vec
from .simd import multiply_add

__all__ = ["GROUP", "ROWS", "Panels", "emit_product", "product"]

ROWS = 64
"""Rows of a panel."""

GROUP = 16
"""Columns that a sweep takes together; ranges of columns are multiples of it."""

_LINE = 4 * ROWS  # bytes of a column of a panel
_DEPTH = 64  # columns whose errors are multiplied at a time: 16 KB of a panel
_TILE = 4  # columns of the result that are summed up at a time
_WIDTH = 256  # of a block, at most


@dataclass(frozen=True)
class Panels:
    """An array of a slab: address of a column of the first panel, and bytes from panel to panel."""

    address: Value
    stride: Value

    def of(self, panel: Value) -> Value:
        """The same column's address in another panel."""
        return self.address + panel * self.stride


def lanes(e: Emitter) -> int:
    """Rows that a vector holds."""
    return 16 if e.target.vector_bytes == 64 else 8


def product(
    e: Emitter,
    out: Panels,
    left: Panels,
    matrix: Value,
    stride: Value,
    count: Value,
    width: Value,
    panels: Value,
    scratch: Value,
) -> None:
    """out[c] += the sum over j < count of left[j] * matrix[j][c], for c < width, in every panel.

    `stride` is the bytes of a row of the matrix, `scratch` an address from `room`.
    """
    wide = vec(F32, GROUP)
    with e.loop(0, count, _DEPTH) as first:
        depth = e.min(count - first, _DEPTH)
        # The part of the matrix in the order it is read in: [tiles][depth][4].
        with e.loop(0, width, GROUP) as c, e.loop(0, depth) as j:
            row = e.load(matrix + (first + j) * stride + c * 4, wide)
            for part in range(0, GROUP, _TILE):
                piece = row.shuffle(range(part, part + _TILE))
                e.store(piece, scratch + (c + part) * (4 * _DEPTH) + j * (4 * _TILE))
        with e.loop(0, panels) as panel:
            source = left.of(panel) + first * _LINE
            with e.loop(0, width, _TILE) as c:
                _tile(e, out.of(panel) + c * _LINE, source, scratch + c * (4 * _DEPTH), depth)


def room(e: Emitter) -> Value:
    """Scratch memory for `product`."""
    return e.scratch(4 * _DEPTH * _WIDTH)


def _tile(e: Emitter, out: Value, source: Value, factors: Value, depth: Value) -> None:
    count = lanes(e)
    vectors = {64: 4, 32: 2}.get(e.target.vector_bytes, 1)
    of = vec(F32, count)
    with e.loop(0, ROWS, count * vectors) as row:
        totals = [
            [e.var(e.load(out + c * _LINE + row * 4 + v * 4 * count, of)) for v in range(vectors)] for c in range(_TILE)
        ]
        with e.loop(0, depth, 4) as j:
            for ahead in range(4):
                line = source + (j + ahead) * _LINE + row * 4
                values = [e.load(line + v * 4 * count, of) for v in range(vectors)]
                for c in range(_TILE):
                    factor = e.splat(e.load(factors + (j + ahead) * (4 * _TILE) + 4 * c, F32), count)
                    for v, value in enumerate(values):
                        totals[c][v].set(multiply_add(e, value, factor, totals[c][v].get()))
        for c in range(_TILE):
            for v in range(vectors):
                e.store(totals[c][v].get(), out + c * _LINE + row * 4 + v * 4 * count)


def emit_product(e: Emitter, *arguments: Value) -> None:
    """The body of a kernel of (out, its panel stride, left, its panel stride, matrix, stride, count, width, panels)."""
    out, out_stride, left, left_stride, matrix, stride, count, width, panels = arguments
    product(e, Panels(out, out_stride), Panels(left, left_stride), matrix, stride, count, width, panels, room(e))
