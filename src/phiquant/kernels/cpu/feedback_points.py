"""The nearest point of a lattice for groups of columns, a row to a lane: every point is looked at.

The distance of a point is a sum over its components. Sums for the pairs of components are made first, one for each pair
of values; then each point is two or four of these, added.
"""

from __future__ import annotations

import numpy as np

from phiquant.quants.feedback_points import Pointed
from phiquant.quants.grids import GRIDS, codes

from .emit import I32, I64, Emitter, Value, Variable
from .quantize_lanes import Lanes

__all__ = ["PointSearch"]

_SHIFT = 0.125
_UNROLL = 4


class PointSearch:
    """The search, with its tables, in a kernel being emitted."""

    def __init__(self, e: Emitter, how: Pointed) -> None:
        self.e, self.how, self.k = e, how, Lanes(e)
        grid = GRIDS[how.type]
        self.dimension, self.bits, self.kinds = grid.dimension, grid.bits, len(grid.values)
        self.count, self.pairs = grid.count, grid.dimension // 2
        code = codes(how.type).astype(np.int64)
        pair = code[:, ::2] + self.kinds * code[:, 1::2] + np.arange(self.pairs) * self.kinds**2
        word = (code << self.bits * np.arange(self.dimension)).sum(axis=1)
        rows = np.concatenate((pair * self.k.stride, word[:, None]), axis=1).astype("<i4")
        self.row = 4 * (self.pairs + 1)
        self.points = e.table(rows.tobytes())
        self.sums = self.k.column(self.pairs * self.kinds**2)

    def entries(self, x: list[Value], w: list[Value], shift: Value) -> list[Value]:
        """The entries nearest to x, weighted by w, of all columns of one group (of 8, or of 4)."""
        if self.how.signs == "shift":
            return self._shifted(x, w, shift)[0]
        if self.how.signs == "shifts":
            low, below = self._shifted(x, w, self.k.real(-_SHIFT))
            high, above = self._shifted(x, w, self.k.real(_SHIFT))
            return [self.e.where(below < above, a, b) for a, b in zip(low, high, strict=True)]
        return self._signed(x, w)

    def _shifted(self, x: list[Value], w: list[Value], shift: Value) -> tuple[list[Value], Value]:
        values = [shift + float(v) for v in self.how.values]
        word, cost = self._nearest(x, w, values)
        return [self._value(word, i) + shift for i in range(self.dimension)], cost

    def _signed(self, x: list[Value], w: list[Value]) -> list[Value]:
        e, k = self.e, self.k
        negative = [v < 0.0 for v in x]
        if self.how.signs == "even":  # an odd number: the one that weighs least is turned
            odd, least, at = k.whole(0), k.real(0), k.whole(0)
            for i, (v, weight, sign) in enumerate(zip(x, w, negative, strict=True)):
                odd = odd ^ e.where(sign, k.whole(1), k.whole(0))
                size = weight * v * v
                smaller = size < least
                least = e.where(smaller, size, least) if i else size
                at = e.where(smaller, k.whole(i), at) if i else at
            turn = odd != 0
            negative = [e.where(turn & (at == i), ~sign, sign) for i, sign in enumerate(negative)]
        sizes = [e.where(sign, -v, v) for v, sign in zip(x, negative, strict=True)]
        found = []
        for first in range(0, len(x), self.dimension):
            group = slice(first, first + self.dimension)
            word, _ = self._nearest(sizes[group], w[group], [k.real(float(v)) for v in self.how.values])
            found += [self._value(word, i) for i in range(self.dimension)]
        return [e.where(sign, -v, v) for v, sign in zip(found, negative, strict=True)]

    def _nearest(self, x: list[Value], w: list[Value], values: list[Value]) -> tuple[Value, Value]:
        """Codes of the nearest point, joined, and its cost, sum of w * (v**2 - 2 v x)."""
        e, k = self.e, self.k
        for pair in range(self.pairs):
            both = []
            for i in (2 * pair, 2 * pair + 1):
                both.append([w[i] * (v * (v - 2.0 * x[i])) for v in values])
            for b, second in enumerate(both[1]):
                for a, first in enumerate(both[0]):
                    self.sums.put((pair * self.kinds + b) * self.kinds + a, first + second)
        best, word = e.var(k.real(float("inf"))), e.var(k.whole(0))
        with e.loop(0, self.count, _UNROLL) as number:
            for ahead in range(_UNROLL):
                self._look(self.points + (number + ahead) * self.row, best, word)
        return word.get(), best.get()

    def _look(self, point: Value, best: Variable, word: Variable) -> None:
        e, k = self.e, self.k
        parts = [e.load(self.sums.address + e.load(point + 4 * i, I32).sext(I64), k.floats) for i in range(self.pairs)]
        cost = parts[0]
        for part in parts[1:]:
            cost = cost + part
        better = cost < best.get()
        best.set(e.where(better, cost, best.get()))
        word.set(e.where(better, e.splat(e.load(point + 4 * self.pairs, I32), k.count), word.get()))

    def _value(self, word: Value, i: int) -> Value:
        """Component i of a point."""
        e, k = self.e, self.k
        code = word.lsr(self.bits * i) & (2**self.bits - 1)
        values = self.how.values
        if values[-1] - values[0] == (len(values) - 1) * (values[1] - values[0]):
            level: Value = code * (values[1] - values[0]) + values[0]
            return level.to_float()
        value = k.real(float(values[-1]))
        for number, v in reversed(list(enumerate(values[:-1]))):
            value = e.where(code == number, k.real(float(v)), value)
        return value
