"""Quantizers of the lattice formats IQ2_XXS to IQ3_S in vector code, a super-block of 256 to a lane.

The same operations in the same order as `quants.lattice`.
"""

from __future__ import annotations

from collections.abc import Callable

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format
from phiquant.quants.grids import GRIDS
from phiquant.quants.lattice import LATTICES, Lattice

from .emit import F32, Emitter, Value, Variable
from .quantize_lanes import Arguments, Column, Kernel
from .quantize_neighbours import TRIES, LatticeSearch
from .quantize_search import fit_unsigned
from .simd import nearest_int

__all__ = ["emit_lattice"]

_TOGETHER = 4  # tries whose sums are made at once; room and points beyond the last try are there


def emit_lattice(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks to points of a lattice."""
    k = Kernel(e, entry, source, arguments)
    lattice = LATTICES[entry.type]
    unit = lattice.unit
    fit = _Fit(k, lattice, arguments.tables)
    x, signs, points, scales = k.column(256), k.column(32), k.column(256 // fit.dimension), k.column(256 // unit)
    importance = k.column(256) if weighted else None

    def group(first: Value) -> None:
        k.load(x, first)
        if importance is not None:
            k.load_importance(importance, first)

        def square(i: Value) -> Value:
            v = x.at(i)
            return v * v

        mean = float(lattice.spread) * k.total(256, square) / 256.0
        with e.loop(0, 256 // unit) as j:
            given = importance.start(j * unit) if importance else None
            _weigh(k, lattice, x.start(j * unit), fit.w, given, mean)
            mine = signs.start(j * (unit // 8))
            _magnitudes(k, lattice, x.start(j * unit), fit, mine)
            scale, empty = fit.fit()
            turned = e.where(scale < 0.0, k.whole(255), k.whole(0))
            kept = e.where(empty, k.whole(0), k.whole(127 if lattice.parity else 255))
            k.each(unit // 8, lambda i: mine.put(i, (mine.int_at(i) ^ turned) & kept))
            with e.loop(0, fit.groups) as i:
                points.put(j * fit.groups + i, e.where(empty, fit.zero, fit.best.int_at(i)))
            scales.put(j, e.where(empty, k.real(0), e.abs(scale)))
        fit.search.number(points, points, 256 // fit.dimension)
        _store(k, lattice, first, points, signs, scales)

    k.groups(group)


def _weigh(k: Kernel, lattice: Lattice, x: Column, w: Column, importance: Column | None, mean: Value) -> None:
    """The weights of one sub-block."""
    e = k.e

    def weigh(i: Value) -> None:
        v = x.at(i)
        square = v * v
        if importance is not None:
            w.put(i, importance.at(i) * e.sqrt(mean + square))
        else:
            w.put(i, 0.25 * mean + square if lattice.type is GGMLType.IQ2_S else square)

    k.each(lattice.unit, weigh)


def _magnitudes(k: Kernel, lattice: Lattice, x: Column, fit: _Fit, signs: Column) -> None:
    """Signs, magnitudes and what follows from them; where an eight's signs are odd the least weighty one is turned."""
    e = k.e
    fit.peak.set(k.real(float("-inf")))
    with e.loop(0, lattice.unit // 8) as eight:
        bits, least, at = k.whole(0), k.real(0), k.whole(1)
        values = [x.at(eight * 8 + i) for i in range(8)]
        for i, v in enumerate(values):
            bits = bits | e.where(v >= 0.0, k.whole(0), k.whole(1 << i))
            if lattice.parity:
                size = fit.w.at(eight * 8 + i) * v * v
                smaller = size < least
                least = e.where(smaller, size, least) if i else size
                at = e.where(smaller, k.whole(1 << i), at) if i else at
        if lattice.parity:
            odd = bits ^ bits.lsr(4)
            odd = odd ^ odd.lsr(2)
            odd = (odd ^ odd.lsr(1)) & 1
            bits = bits ^ e.where(odd != 0, at, k.whole(0))
        signs.put(eight, bits)
        for i, v in enumerate(values):
            magnitude = e.where((bits & (1 << i)) != 0, -v, v)
            weight = fit.w.at(eight * 8 + i)
            fit.x.put(eight * 8 + i, magnitude)
            fit.wx.put(eight * 8 + i, weight * magnitude)
            fit.root.put(eight * 8 + i, e.sqrt(weight))
            fit.peak.set(e.max(magnitude, fit.peak.get()))


class _Fit:
    """The search for one sub-block's scale and points."""

    def __init__(self, k: Kernel, lattice: Lattice, tables: Value) -> None:
        self.k, self.lattice = k, lattice
        self.dimension = GRIDS[lattice.type].dimension
        self.groups = lattice.unit // self.dimension
        self.search = LatticeSearch(k, lattice.type, tables)
        self.x, self.w, self.wx, self.root = (k.column(lattice.unit) for _ in range(4))
        self.inverses, self.scales = k.column(TRIES), k.column(TRIES)
        self.points, self.best = k.column(self.groups * TRIES), k.column(self.groups)
        self.levels = k.column(lattice.unit) if lattice.type is GGMLType.IQ2_XXS else None
        self.peak = k.e.var(k.real(0))
        self.zero = k.whole(sum(1 << 4 * i for i in range(self.dimension)) - (1 << 31))

    def fit(self) -> tuple[Value, Value]:
        """The scale, which may be negative, and whether a sub-block is zero; the points are in `best`."""
        k, e, lattice = self.k, self.k.e, self.lattice
        peak = self.peak.get()
        empty = ~(peak >= lattice.epsilon) | (peak == 0.0)
        if self.levels is not None:
            scale = fit_unsigned(k, self.x, 32, 4, self.w, self.levels)
            peak = scale * 3.0
            empty = empty | (peak <= 0.0)
        else:
            scale = peak / float(lattice.top)
        count = 2 * lattice.tries + 1
        with e.loop(0, count) as t:
            width = (t - lattice.tries).to_float(F32) * e.const(F32, lattice.stride) + float(lattice.top)
            inverse = e.splat(width, k.count) / peak
            self.inverses.put(t, inverse)
            self.scales.put(t, 1.0 / inverse)
        # what no try improves on: the lowest levels
        start = self.zero if lattice.again != "any" else self.zero & 0x7FFFFFFF
        k.each(self.groups, lambda i: self.best.put(i, start))
        found = e.var(scale)
        with e.loop(0, 2) as turn:  # all tries; then once more with the scale that was best
            first = turn == 0
            tries = e.where(first, e.integer(count), e.integer(1))
            self.search.run(self.x, self.root, self.groups, tries, self.inverses, self.scales, self.points)
            with e.choose(first) as (yes, no):
                with yes:
                    self._choose(found, count)
                    self.scales.put(0, found.get())
                    self.inverses.put(0, 1.0 / found.get())
                with no:
                    self._again(found)
        return found.get(), empty

    def _sums(self, of: Callable[[Value], list[Value]], count: int) -> list[tuple[Value, Value]]:
        """For each of `count` choices of points, of(group): the sums over all groups of w x l and w l l."""
        e, k = self.k.e, self.k
        totals = [(e.var(k.real(0)), e.var(k.real(0))) for _ in range(count)]
        with e.loop(0, self.groups) as i:
            levels = [self.search.levels(point) for point in of(i)]
            at = i * self.dimension
            for c in range(self.dimension):
                wx, w = self.wx.at(at + c), self.w.at(at + c)
                for (xl, ll), odd in zip(totals, levels, strict=True):
                    xl.set(xl.get() + wx * odd[c])
                    ll.set(ll.get() + w * odd[c] * odd[c])
        return [(xl.get(), ll.get()) for xl, ll in totals]

    def _choose(self, scale: Variable, count: int) -> None:
        """Of all tries the one that explains most: its scale and points."""
        e, k = self.k.e, self.k
        best = e.var(k.real(0))
        with e.loop(0, count, _TOGETHER) as t:

            def tried(i: Value) -> list[Value]:
                return [self.points.int_at(i * TRIES + t + g) for g in range(_TOGETHER)]

            better = []
            for xl, ll in self._sums(tried, _TOGETHER):
                better.append((ll > 0.0) & (xl * xl > best.get() * ll))
                ratio = xl / ll
                scale.set(e.where(better[-1], ratio, scale.get()))
                best.set(e.where(better[-1], ratio * xl, best.get()))
            with e.loop(0, self.groups) as i:
                point = self.best.int_at(i)
                for mask, other in zip(better, tried(i), strict=True):
                    point = e.where(mask, other, point)
                self.best.put(i, point)

    def _again(self, scale: Variable) -> None:
        """Exchange the points that are chosen again, and the scale if any were."""
        e, k, which = self.k.e, self.k, self.lattice.again
        off, some = e.var(k.whole(0)), e.var(k.whole(0))
        if which == "any":
            k.each(self.groups, lambda i: off.set(off.get() | ~self.best.int_at(i)))
        positive = e.where(scale.get() > 0.0, k.whole(-1), k.whole(0))

        def exchange(i: Value) -> None:
            point = self.best.int_at(i)
            turn = {"all": positive, "any": positive & off.get(), "off": positive & ~point}[which]
            some.set(some.get() | turn)
            self.best.put(i, e.where(turn < 0, self.points.int_at(i * TRIES), point))

        k.each(self.groups, exchange)
        ((xl, ll),) = self._sums(lambda i: [self.best.int_at(i)], 1)
        scale.set(e.where((some.get() < 0) & (ll > 0.0), xl / ll, scale.get()))


def _joined(k: Kernel, values: Column, count: int, bits: int, shift: int = 0) -> Column:
    """Words from `count` values, each shifted right by `shift`, 32 / bits to a word, the first one lowest."""
    e, per_word = k.e, 32 // bits
    words = k.column(count // per_word)
    with e.loop(0, count // per_word) as i:
        word = k.whole(0)
        for turn in range(per_word):
            part = values.int_at(i * per_word + turn).lsr(shift) & (2**bits - 1)
            word = word | (part << (bits * turn))
        words.put(i, word)
    return words


def _store(k: Kernel, lattice: Lattice, first: Value, points: Column, signs: Column, scales: Column) -> None:
    """The super-block's scale, the integer scales, and all fields of the block."""
    e, type, count = k.e, lattice.type, 256 // lattice.unit
    peak = e.var(k.real(0))
    k.each(count, lambda j: peak.set(e.max(peak.get(), scales.at(j))))
    d = peak.get() / 31.0
    bits, _ = k.half(d * e.const(F32, lattice.factor))
    inverse, none = 1.0 / d, peak.get() == 0.0

    def step(j: Value) -> None:
        level = k.clamp(nearest_int(e, (inverse * scales.at(j) - 1.0) * 0.5), 0, 15)
        scales.put(j, e.where(none, k.whole(0), level))

    k.each(count, step)
    fields: dict[str, Value | Column] = {"d": bits}
    if type in (GGMLType.IQ2_XXS, GGMLType.IQ3_XXS):
        coded = k.column(8)
        with e.loop(0, 8) as j:
            word = scales.int_at(j) << 28
            for turn in range(4):
                word = word | (signs.int_at(j * 4 + turn) << (7 * turn))
            coded.put(j, word)
        low = _joined(k, points, 256 // GRIDS[type].dimension, 8)
        if type is GGMLType.IQ3_XXS:
            fields.update({"qs": low, "signs": coded})
        else:
            both = k.column(16)
            with e.loop(0, 8) as j:
                both.put(j * 2, low.int_at(j))
                both.put(j * 2 + 1, coded.int_at(j))
            fields["qs"] = both
    else:
        fields["scales"] = _joined(k, scales, count, 4)
        if type is GGMLType.IQ2_XS:
            k.each(32, lambda i: points.put(i, points.int_at(i) | (signs.int_at(i) << 9)))
            fields["qs"] = _joined(k, points, 32, 16)
        else:
            number = 256 // GRIDS[type].dimension
            high = _joined(k, points, number, 64 // number, 8)
            fields.update({"qs": _joined(k, points, number, 8), "qh": high, "signs": _joined(k, signs, 32, 8)})
    if lattice.cleared:
        for name, field in fields.items():
            if isinstance(field, Column):
                with e.loop(0, k.entry.dtype[name].itemsize // 4) as i:
                    field.put(i, e.where(none, k.whole(0), field.int_at(i)))
    k.store(first, fields)
