"""Dot products of pairs: two rows of weights by two columns of activations, 8 values of each, in one instruction.

Arm's i8mm does twice the multiplications of a dot product so, if rows and columns lie as it takes them. Of an unpacked
chunk, two entries of 4 levels of 16 rows become two of 8 levels of 8 rows:

    entry 2 j      row 0: levels 0-3 | row 1: levels 0-3 | ...      row 0: levels 0-7 | row 1: levels 0-7 | ... row 7
    entry 2 j + 1  row 0: levels 4-7 | row 1: levels 4-7 | ...      row 8: levels 0-7 | row 9: levels 0-7 | ... row 15

The sums are the integers that dot products have, so where this is used is a question of speed alone.
"""

from __future__ import annotations

from .emit import I8, I32, I64, Emitter, Value, vec
from .simd import multiply_pairs
from .target import Target

__all__ = ["PairDot", "has_pairs", "paired"]

_ROWS = 16


def has_pairs(target: Target) -> bool:
    """Whether the processor multiplies pairs."""
    return target.lowering == "i8mm"


def paired(levels: list[Value]) -> list[Value]:
    """Entries of 4 levels of 16 rows, i8 × 64, an even number of them, as entries of 8 levels of 8 rows."""
    out = []
    for a, b in zip(levels[::2], levels[1::2], strict=True):
        first, second = (v.bits(vec(I32, _ROWS)) for v in (a, b))
        for half in (0, _ROWS // 2):
            places = [place for row in range(half, half + _ROWS // 2) for place in (row, _ROWS + row)]
            out.append(first.shuffle(places, second).bits(a.type))
    return out


class PairDot:
    """Dot products in the making, of the 16 rows of a panel and two columns."""

    def __init__(self, e: Emitter, starts: tuple[Value, Value]) -> None:
        """Every row of a column starts from the same: i32 × 16 for each of the columns."""
        self.e = e
        both = starts[0].shuffle([0, _ROWS] * (_ROWS // 2), starts[1])
        self.halves = [both, both]  # [row][column], of rows 0 to 7 and 8 to 15

    def add(self, levels: list[Value], columns: tuple[Value, Value]) -> None:
        """Levels, as `paired` leaves two entries, times the 8 activations at each of two addresses."""
        first, second = (self.e.splat(self.e.load(column, I64), 1) for column in columns)
        signed = first.shuffle([0, 1] * 4, second).bits(vec(I8, 4 * _ROWS))
        self.halves = [multiply_pairs(self.e, t, v, signed) for t, v in zip(self.halves, levels, strict=True)]

    def sums(self) -> list[Value]:
        """The dot products so far, i32 × 16 for each of the columns."""
        return [self.halves[0].shuffle(range(column, 2 * _ROWS, 2), self.halves[1]) for column in (0, 1)]
