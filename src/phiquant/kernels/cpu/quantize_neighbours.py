"""From groups of levels to points of a lattice, in vector code: every scale tried, for every sub-block.

A group's levels, as a number (its key), say in a table whether they are a point, else where the list of candidates is.
While the scale falls from try to try the key of a group changes only a few times. Within a run of one key the candidate
of least distance is sought at both ends of the run, eight candidates at a time. The difference of two candidates'
distances, divided by the scale, is linear in the scale: a candidate that is best at both ends is best in between. Where
rounding could make that untrue the run is halved, down to single tries, so that the result is what trying all would
give.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.grids import GRIDS, codes
from phiquant.quants.neighbours import neighbours

from .emit import BOOL, F32, I32, I64, Value, Variable, vec
from .quantize_lanes import Column, Lanes
from .simd import nearest_int, reduce, transpose

__all__ = ["TRIES", "LatticeSearch", "lattice_tables"]

TRIES = 32  # room for the tries of a sub-block
_WIDTH = 8  # candidates looked at together
_COUNT_AT = 20  # bit of an entry from which on it holds the number of eights of candidates
# Two distances are told apart for certain if they differ by this part of themselves: far above the error of sums of
# eight terms, in which the terms that differ have differences of at least a step of the level.
_CERTAIN = 1e-4


@cache
def lattice_tables(type: GGMLType) -> npt.NDArray[np.int32]:
    """What the search reads, int32: entries [keys], numbers of points [keys], candidates in eights [..., 8].

    A point (as entry or as candidate) is its odd levels, four bits for each component; an entry that is one has its
    sign bit set. Any other entry is the first eight of its candidates (20 bits) and their number of eights (11 bits).
    Eights are filled up with -1.
    """
    near, dimension = neighbours(type), GRIDS[type].dimension
    shifts = 4 * np.arange(dimension, dtype=np.uint32)
    packed = ((2 * codes(type).astype(np.uint32) + 1) << shifts).sum(axis=1, dtype=np.uint32)
    counts = np.diff(near.start)
    eights = -(-counts // _WIDTH)
    first = np.cumsum(eights) - eights
    lists = np.full(eights.sum() * _WIDTH, 0xFFFFFFFF, np.uint32)
    within = np.arange(len(near.candidates)) - np.repeat(near.start[:-1], counts)
    lists[np.repeat(first * _WIDTH, counts) + within] = packed[near.candidates]
    entries = np.where(near.point >= 0, packed[near.point] | 1 << 31, first | eights << _COUNT_AT).astype(np.uint32)
    tables = np.concatenate([entries, near.point.view(np.uint32), lists]).view(np.int32)
    tables.setflags(write=False)
    return tables


class LatticeSearch:
    """The search for points of one sub-block in every lane."""

    def __init__(self, k: Lanes, type: GGMLType, tables: Value) -> None:
        grid = GRIDS[type]
        self.k, self.tables, self.dimension, self.base = k, tables, grid.dimension, len(grid.values)
        self.keys = self.base**self.dimension
        # for each lane a row of tries; what is written to a row may run into the next one, which is written later
        self._keys = k.e.scratch((k.count + 1) * TRIES * 4)
        self._points = k.e.scratch((k.count + 1) * TRIES * 4)

    def levels(self, point: Value) -> list[Value]:
        """The odd levels of points, as float32."""
        mask = 7 if self.base == 3 else 15  # the sign of an entry is not a level
        return [(point.lsr(4 * i) & mask).to_float() for i in range(self.dimension)]

    def number(self, points: Column, numbers: Column, count: int) -> None:
        """The numbers in the lattice of `count` vectors of points; `numbers` may be `points`."""
        e = self.k.e
        with e.loop(0, count) as i:
            point, key = points.int_at(i), self.k.whole(0)
            for c in reversed(range(self.dimension)):
                key = key * self.base + (point.lsr(4 * c + 1) & (self.base - 1 if self.base == 8 else 3))
            numbers.put(i, key)
        with e.loop(0, count * self.k.count) as i:
            at = numbers.address + i * 4
            e.store(e.load(self.tables + (e.load(at, I32).sext(I64) + self.keys) * 4, I32), at)

    def run(
        self, x: Column, root: Column, groups: int, tries: Value, inverses: Column, scales: Column, points: Column
    ) -> None:
        """Points, as entries, of `groups` groups of x at every try: vector TRIES * group + try of `points`.

        Levels are x * inverse; a group that is no point takes the candidate with the least sum of
        root * (scale * level - x)**2. Vectors beyond the number of tries repeat the last one.
        """
        e, k, n = self.k.e, self.k, self.dimension
        keys = k.column(TRIES)
        with e.loop(0, groups) as group:
            mine, weights = x.start(group * n), root.start(group * n)
            with e.loop(0, tries) as t:
                inverse, key = inverses.at(t), k.whole(0)
                for i in reversed(range(n)):
                    level = k.clamp(nearest_int(e, (inverse * mine.at(i) - 1.0) * 0.5), 0, self.base - 1)
                    key = key * self.base + level
                keys.put(t, key)
            self._turn(keys.address, k.stride, self._keys, TRIES * 4, tries)
            with e.loop(0, k.count) as lane:
                self._lane(lane, mine, weights, scales, tries)
            with e.loop(0, tries, k.count) as t:
                self._turn_block(self._points + t * 4, TRIES * 4, points.start(group * TRIES + t).address, k.stride)

    def _turn(self, source: Value, source_step: int, to: Value, to_step: int, tries: Value) -> None:
        with self.k.e.loop(0, tries, self.k.count) as t:
            self._turn_block(source + t * source_step, source_step, to + t * 4, to_step)

    def _turn_block(self, source: Value, source_step: int, to: Value, to_step: int) -> None:
        """Transpose as many rows as there are lanes."""
        e, k = self.k.e, self.k
        rows = [e.load(source + i * source_step, k.ints) for i in range(k.count)]
        for i, row in enumerate(transpose(e, rows)):
            e.store(row, to + i * to_step)

    def _lane(self, lane: Value, x: Column, root: Column, scales: Column, tries: Value) -> None:
        """All tries of one group in one lane."""
        e, many = self.k.e, vec(I32, TRIES)
        keys, points = self._keys + lane * (TRIES * 4), self._points + lane * (TRIES * 4)
        # bit t: the key changes after try t
        changes = (e.load(keys, many) != e.load(keys + 4, many)).bits(I32).zext(I64)
        changes = changes | (e.integer(1) << (tries - 1))
        xs, weights = self._spread(x, lane), self._spread(root, lane)
        first = e.var(0)
        with e.forever() as done:
            start = first.get()
            end = start + e.intrinsic("llvm.cttz.i64", I64, changes.lsr(start), e.const(BOOL, 0))
            entry = e.load(self.tables + e.load(keys + start * 4, I32).sext(I64) * 4, I32)
            with e.choose(entry < 0) as (yes, no):
                with yes:
                    e.store(e.splat(entry, TRIES), points + start * 4)
                with no:
                    self._run(entry, start, end, xs, weights, scales.address + lane * 4, points)
            first.set(end + 1)
            done(end + 1 >= tries)

    def _spread(self, column: Column, lane: Value) -> list[Value]:
        e = self.k.e
        at = column.address + lane * 4
        return [e.splat(e.load(at + i * self.k.stride, F32), _WIDTH) for i in range(self.dimension)]

    def _run(
        self, entry: Value, start: Value, end: Value, xs: list[Value], ws: list[Value], scales: Value, points: Value
    ) -> None:
        """The best candidates from try `start` to try `end`, which share a key."""
        e = self.k.e
        eights = entry.lsr(_COUNT_AT).zext(I64)
        lists = self.tables + (entry & ((1 << _COUNT_AT) - 1)).zext(I64) * (4 * _WIDTH) + 8 * self.keys
        low, high = e.var(start), e.var(end)
        with e.forever() as done:
            a, b = low.get(), high.get()
            tried = [e.splat(e.load(scales + t * self.k.stride, F32), _WIDTH) for t in (a, b)]
            (one, error, margin), (other, error_b, margin_b) = self._best(lists, eights, xs, ws, tried)
            certain = e.min(margin, margin_b) > e.max(error, error_b) * _CERTAIN
            settled = ((one == other) & certain) | (b - a <= 1)
            with e.choose(settled) as (yes, no):
                with yes:
                    e.store(e.splat(e.load(lists + one * 4, I32), TRIES), points + a * 4)
                    e.store(e.splat(e.load(lists + other * 4, I32), TRIES), points + b * 4)
                    low.set(b + 1)
                    high.set(end)
                with no:
                    high.set((a + b) >> 1)
            done(low.get() > end)

    def _best(
        self, lists: Value, eights: Value, xs: list[Value], ws: list[Value], tried: list[Value]
    ) -> list[tuple[Value, Value, Value]]:
        """For each scale: place of the first candidate of least distance, the distance, and how far off the next is."""
        e, reals, wholes = self.k.e, vec(F32, _WIDTH), vec(I32, _WIDTH)
        infinity = e.const(reals, float("inf"))
        places = e.const(wholes, list(range(_WIDTH)))
        best: list[tuple[Variable, Variable, Variable]] = [
            (e.var(infinity), e.var(infinity), e.var(places)) for _ in tried
        ]
        with e.loop(0, eights) as c:
            points = e.load(lists + c * (4 * _WIDTH), wholes)
            padding = points < 0
            here = places + e.splat((c * _WIDTH).trunc(I32), _WIDTH)
            levels = self.levels(points)
            for scale, (least, second, place) in zip(tried, best, strict=True):
                distance: Value | None = None
                for level, x, w in zip(levels, xs, ws, strict=True):
                    difference = scale * level - x
                    term = w * difference * difference
                    distance = term if distance is None else distance + term
                assert distance is not None
                distance = e.where(padding, infinity, distance)
                before = least.get()
                nearer = distance < before
                second.set(e.min(second.get(), e.where(nearer, before, distance)))
                place.set(e.where(nearer, here, place.get()))
                least.set(e.where(nearer, distance, before))
        found = []
        for least, second, place in best:
            error = reduce(e, least.get(), "min")
            first = reduce(e, e.where(least.get() == error, place.get(), 0x7FFFFFF), "min")
            rest = reduce(e, e.where(place.get() == first, second.get(), least.get()), "min")
            # where nothing compares (values that are not finite) the place would be none
            first = e.where(first == 0x7FFFFFF, 0, first)
            found.append((first.sext(I64), error, rest - error))
        return found
