"""A sweep over a block's columns, each moved to the level that is best for what the columns before it left over.

With `gradient` g and a matrix M a column k wants to stand at

    now[k] + g[k] / M[k, k]

and is put to the nearest level there; the move d = now[k] - new then changes g[j] by d * M[k, j] for all later j. Two
sweeps are of this form:

    the first one         now = the weights, M = unit (whose diagonal is 1), g = errors @ unit
    coordinate descent    now = the values, M = the moments H, g = errors @ H
"""

from __future__ import annotations

from dataclasses import dataclass

from phiquant.quants.feedback import Stepped
from phiquant.quants.feedback_points import Pointed

from .emit import F32, Emitter, Value
from .feedback_points import PointSearch
from .feedback_product import GROUP, ROWS, Panels, lanes, product, room
from .quantize_lanes import Lanes
from .quantize_nonlinear import nearest_entry
from .simd import multiply_add

__all__ = ["DESCEND", "emit_descend"]

_LINE = 4 * ROWS
_BOUND = 135.0  # of what is looked up in a table

DESCEND = (
    "now", "entries", "errors", "wide", "gradient", "moves", "narrow", "scale", "offset", "scales",
    "matrix", "stride", "inverse", "width", "panels", "drops", "weights", "first",
)  # fmt: skip
"""Arguments of the kernel: addresses of the block's columns in the arrays of a slab (`now`, `entries`, `errors`:
panels `wide` bytes apart; `gradient`, `moves`: `narrow`; `scale`, `offset`: `scales`), the matrix from the block's
diagonal on, the inverses of that, the block's width and the number of panels. Of lattices besides: `drops` as
`scale`, the weights of errors in a group, and whether it is the first sweep, which takes whatever is nearest."""


def emit_descend(e: Emitter, how: Stepped | Pointed, *arguments: Value) -> None:
    """The body of the kernel for a format."""
    a = dict(zip(DESCEND, arguments, strict=True))
    scratch, panels = room(e), a["panels"]
    gradient, moves = Panels(a["gradient"], a["narrow"]), Panels(a["moves"], a["narrow"])
    search = PointSearch(e, how) if isinstance(how, Pointed) else None
    with e.loop(0, a["width"], GROUP) as first:
        at = first * _LINE
        out = Panels(gradient.address + at, a["narrow"])
        matrix = a["matrix"] + first * 4
        product(e, out, moves, matrix, a["stride"], first, e.integer(GROUP), panels, scratch)
        corner = matrix + first * a["stride"]
        with e.loop(0, panels) as panel, e.loop(0, ROWS, lanes(e)) as row:
            wide, narrow = panel * a["wide"] + at + row * 4, panel * a["narrow"] + at + row * 4
            scales = panel * a["scales"] + first // how.unit * _LINE + row * 4
            block = Block(
                Lanes(e), a["now"] + wide, a["entries"] + wide, a["errors"] + wide, a["gradient"] + narrow,
                a["moves"] + narrow, corner, a["stride"], a["inverse"] + first * 4,
            )  # fmt: skip
            if search is None:
                assert isinstance(how, Stepped)
                block.columns(how, a["scale"] + scales, a["offset"] + scales)
            else:
                given = a["drops"] + scales, a["weights"] + first * 4
                block.groups(search, a["scale"] + scales, *given, a["first"] != 0)


@dataclass(frozen=True)
class Block:
    """Sixteen columns of the rows of one vector, all of which have one scale; addresses of what there is of them."""

    k: Lanes
    now: Value
    entries: Value
    errors: Value
    gradient: Value
    moves: Value
    corner: Value  # of the matrix
    stride: Value
    inverse: Value

    def columns(self, how: Stepped, scale: Value, offset: Value) -> None:
        """One column after the other."""
        factor, minus = self._load(scale), self._load(offset)
        per = self.k.reciprocal(factor)
        left = [self._load(self.gradient + c * _LINE) for c in range(GROUP)]
        for c in range(GROUP):
            now, wanted = self._wanted(c, left[c])
            entry = _nearest(self.k, how, (wanted + minus) * per)
            move = self._put(c, now, entry, factor * entry - minus)
            self._push(c, move, left, c + 1)

    def groups(self, search: PointSearch, scale: Value, drops: Value, weights: Value, first: Value) -> None:
        """One group after the other, to the nearest points, if that is better than before or it is the first time."""
        e = self.k.e
        factor, shift = self._load(scale), self._load(drops)
        per = self.k.reciprocal(factor)
        left = [self._load(self.gradient + c * _LINE) for c in range(GROUP)]
        size = 8 if search.how.signs == "even" else search.dimension
        for start in range(0, GROUP, size):
            columns = range(start, start + size)
            now, wanted = zip(*(self._wanted(c, left[c]) for c in columns), strict=True)
            w = [self._number(weights + 4 * c) for c in columns]
            entries = search.entries([v * per for v in wanted], w, shift)
            moves = [old - factor * entry for old, entry in zip(now, entries, strict=True)]
            change = self.k.real(0)
            for i, c in enumerate(columns):
                pull = left[c] * 2.0 + self._coupling(c, c) * moves[i]
                for j in range(i + 1, size):
                    pull = multiply_add(e, self._coupling(c, start + j) * 2.0, moves[j], pull)
                change = multiply_add(e, moves[i], pull, change)
            better = (change < 0.0) | e.splat(first, self.k.count)
            for i, c in enumerate(columns):
                entry = e.where(better, entries[i], self._load(self.entries + c * _LINE))
                move = self._put(c, now[i], entry, e.where(better, factor * entry, now[i]))
                self._push(c, move, left, start + size)

    def _load(self, address: Value) -> Value:
        return self.k.e.load(address, self.k.floats)

    def _number(self, address: Value) -> Value:
        return self.k.e.splat(self.k.e.load(address, F32), self.k.count)

    def _coupling(self, c: int, other: int) -> Value:
        return self._number(self.corner + c * self.stride + 4 * other)

    def _wanted(self, c: int, left: Value) -> tuple[Value, Value]:
        """Where a column is, and where it would be best."""
        now = self._load(self.now + c * _LINE)
        return now, multiply_add(self.k.e, left, self._number(self.inverse + 4 * c), now)

    def _put(self, c: int, now: Value, entry: Value, new: Value) -> Value:
        """Moves a column; returns by how much down."""
        e, move = self.k.e, now - new
        e.store(entry, self.entries + c * _LINE)
        e.store(new, self.now + c * _LINE)
        e.store(move, self.moves + c * _LINE)
        e.store(self._load(self.errors + c * _LINE) + move, self.errors + c * _LINE)
        return move

    def _push(self, c: int, move: Value, left: list[Value], start: int) -> None:
        """What the move changes for the columns from `start` on."""
        for later in range(start, GROUP):
            left[later] = multiply_add(self.k.e, move, self._coupling(c, later), left[later])


def _nearest(k: Lanes, how: Stepped, v: Value) -> Value:
    """The entry nearest to v."""
    if how.table is not None:
        return nearest_entry(k, k.e.max(k.e.min(v, _BOUND), -_BOUND))[1]
    return k.round(k.clamp(v, how.low, how.top))
