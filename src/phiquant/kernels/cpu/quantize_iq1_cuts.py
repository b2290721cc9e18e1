"""Where the sorted elements of a unit of IQ1_S or IQ1_M are cut into levels -1, 0 and 1, in vector code.

As `quants.iq1` defines it: all pairs of places are tried with all shifts, in its order and with its operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .emit import I32, I64, Value
from .quantize_lanes import Column, Lanes

__all__ = ["Cut", "best_cut", "sorting_network"]

_UP, _DOWN = (-0.875, 0.125, 1.125), (-1.125, -0.125, 0.875)  # what the levels stand for with either shift
_LEAST = -3.4028234663852886e38


def sorting_network(n: int) -> Iterator[tuple[int, int]]:
    """The comparisons (i, j), i < j, of Batcher's merging network for n = 2**m elements."""
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        yield i + j, i + j + k
            k //= 2
        p *= 2


@dataclass(frozen=True)
class Cut:
    """The best cut of a unit.

    Attributes:
        lanes: of the kernel.
        x: the elements.
        borders: the sort keys (int64) that levels 0 and 1 begin at.
        swap: lanes in which -1 and 1 change places, as the scale came out negative.
        empty: lanes in which all levels are -1: their scale is 0.
        scale: float32, not negative.
        choice: int32; bit 1: the first half of the unit is shifted down, bit 0: the second.
    """

    lanes: Lanes
    x: Column
    borders: tuple[Value, Value]
    swap: Value
    empty: Value
    scale: Value
    choice: Value

    def level(self, i: int) -> Value:
        """The level of an element: 0, 1 or 2 as int32."""
        e = self.lanes.e
        key = _key(self.lanes, self.x.at(i), i)
        level = (key >= self.borders[0]).zext(I32) + (key >= self.borders[1]).zext(I32)
        level = e.where(self.swap, 2 - level, level)
        return e.where(self.empty, self.lanes.whole(0), level)


def _key(k: Lanes, x: Value, i: int) -> Value:
    """An int64 that orders elements by value (the zeros are one), then by place."""
    bits = (x + 0.0).bits(k.ints)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.sext(I64) << 32) | i


def best_cut(k: Lanes, x: Column, w: Column, n: int, threshold: float) -> Cut:
    """The best cut of n elements x with weights w; `threshold` is the magnitude that one of them must reach."""
    e = k.e
    peak = e.var(k.real(0))
    k.each(n, lambda i: peak.set(e.max(e.abs(x.at(i)), peak.get())))
    keys = [_key(k, x.at(i), i) for i in range(n)]
    weights = [w.at(i) for i in range(n)]
    for i, j in sorting_network(n):
        wrong = keys[i] > keys[j]
        keys[i], keys[j] = e.where(wrong, keys[j], keys[i]), e.where(wrong, keys[i], keys[j])
        weights[i], weights[j] = e.where(wrong, weights[j], weights[i]), e.where(wrong, weights[i], weights[j])
    weighted = []
    for key, weight in zip(keys, weights, strict=True):
        ordered = (key >> 32).trunc(I32)
        value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).bits(k.floats)
        weighted.append(weight * value)
    if n == 32:
        best = _search_32(k, weighted, weights)
    else:
        best = _search_16(k, weighted, weights, [(key & 15).trunc(I32) < 8 for key in keys])
    found, scale = best.found.get(), best.scale.get()
    empty = (peak.get() < threshold) | (found < 0)
    beyond = e.const(keys[0].type, (1 << 63) - 1)
    first, second, choice = found.lsr(10), found.lsr(4) & 63, found & 15
    borders = [beyond, beyond]
    for i, key in enumerate(keys):
        borders = [e.where(cut == i, key, b) for cut, b in zip((first, second), borders, strict=True)]
    swap = (scale < 0.0) & ~empty
    choice = e.where(swap, 3 - choice, choice)
    zero = k.whole(0)
    return Cut(
        k,
        x,
        (borders[0], borders[1]),
        swap,
        empty,
        e.where(empty, k.real(0), e.where(swap, -scale, scale)),
        e.where(empty, zero, choice),
    )


class _Best:
    """The best so far: scale, score, and (first place, second place, choice) as bits 15 ... 10, 9 ... 4, 3 ... 0."""

    def __init__(self, k: Lanes) -> None:
        self.k = k
        self.scale, self.score = k.e.var(k.real(0)), k.e.var(k.real(_LEAST))
        self.found = k.e.var(k.whole(-1))

    def offer(self, tries: list[tuple[Value, Value, int]], first: Value, second: Value) -> None:
        """Cuts in the order in which they count: sums of w x q and w q**2, and the choice of shifts.

        If none beats the best so far, none would beat it in turn.
        """
        e = self.k.e
        squares = [xq * xq for xq, _, _ in tries]
        score = self.score.get()
        beats = [(qq > 0.0) & (square > score * qq) for (_, qq, _), square in zip(tries, squares, strict=True)]
        some = beats[0]
        for other in beats[1:]:
            some = some | other
        with e.when(self.k.any(some)):
            place = (first << 10 | (second << 4)).trunc(I32)
            for (xq, qq, choice), square in zip(tries, squares, strict=True):
                better = (qq > 0.0) & (square > self.score.get() * qq)
                ratio = xq / qq
                self.scale.set(e.where(better, ratio, self.scale.get()))
                self.score.set(e.where(better, ratio * xq, self.score.get()))
                self.found.set(e.where(better, place | choice, self.found.get()))


def _running(k: Lanes, terms: list[Value]) -> tuple[Column, Value]:
    """Column of 0 and the sums of the first 1, 2, ... terms, and the last of them."""
    sums = k.column(len(terms) + 1)
    total = k.real(0)
    sums.put(0, total)
    for i, term in enumerate(terms):
        total = total + term
        sums.put(i + 1, total)
    return sums, total


def _search_32(k: Lanes, weighted: list[Value], weights: list[Value]) -> _Best:
    """Both shifts are the same: choices 0 and 3."""
    e, n = k.e, 32
    (sums_x, total_x), (sums_w, total_w) = _running(k, weighted), _running(k, weights)
    # what follows the second place, for either shift: its parts of both sums
    above = [(k.column(n + 1), k.column(n + 1)) for _ in range(2)]

    def follow(i: Value) -> None:
        rest_x, rest_w = total_x - sums_x.at(i), total_w - sums_w.at(i)
        for (part_x, part_w), (_, _, top) in zip(above, (_UP, _DOWN), strict=True):
            part_x.put(i, rest_x * top)
            part_w.put(i, rest_w * top * top)

    k.each(n + 1, follow, unroll=3)
    best = _Best(k)
    with e.loop(0, n + 1) as first:
        start_x, start_w = sums_x.at(first), sums_w.at(first)
        below = [(start_x * low, start_w * low * low) for low, _, _ in (_UP, _DOWN)]
        with e.loop(first, n + 1) as second:
            middle_x = (sums_x.at(second) - start_x) * 0.125
            middle_w = (sums_w.at(second) - start_w) * 0.125 * 0.125
            up = below[0][0] + middle_x + above[0][0].at(second), below[0][1] + middle_w + above[0][1].at(second)
            down = below[1][0] - middle_x + above[1][0].at(second), below[1][1] + middle_w + above[1][1].at(second)
            best.offer([(*up, 0), (*down, 3)], first, second)
    return best


def _search_16(k: Lanes, weighted: list[Value], weights: list[Value], early: list[Value]) -> _Best:
    """Each half of the unit (`early`: elements of the first) has a shift of its own."""
    e, n, zero = k.e, 16, k.real(0)
    halves = []
    for which in (True, False):
        mine = [(c if which else ~c) for c in early]
        sums_x, total_x = _running(k, [e.where(m, v, zero) for m, v in zip(mine, weighted, strict=True)])
        sums_w, total_w = _running(k, [e.where(m, v, zero) for m, v in zip(mine, weights, strict=True)])
        halves.append((sums_x, total_x, sums_w, total_w))
    best = _Best(k)
    with e.loop(0, n + 1) as first:
        starts = []
        for sums_x, total_x, sums_w, total_w in halves:
            start_w = sums_w.at(first)
            parts = []
            for low, middle, top in (_UP, _DOWN):
                head = total_w * top * top + start_w * (low * low - middle * middle)
                parts.append((total_x * top, head, middle * middle - top * top))
            starts.append((sums_x, sums_x.at(first), sums_w, parts))
        with e.loop(first, n + 1) as second:
            sums = []
            for sums_x, start_x, sums_w, parts in starts:
                below, stop_w = start_x + sums_x.at(second), sums_w.at(second)
                sums.append([(top_x - below, head + stop_w * difference) for top_x, head, difference in parts])
            tries = []
            for choice in range(4):
                a, b = sums[0][choice >> 1], sums[1][choice & 1]
                tries.append((a[0] + b[0], a[1] + b[1], choice))
            best.offer(tries, first, second)
    return best
