"""The quantizers of IQ1_S and IQ1_M in vector code, one block to a lane, as `quants.iq1` defines them.

A unit (32 or 16 elements) is sorted by a network, cut at every pair of places, and its groups of 8 brought to the
lattice: those that are no point one by one, 16 candidates at a time, each element's error being one of three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format
from phiquant.quants.grids import codes
from phiquant.quants.iq1 import IQ1_FACTORS, IQ1_THRESHOLDS
from phiquant.quants.neighbours import key_digits, neighbours

from .emit import F32, I16, I32, I64, Emitter, Value, vec
from .quantize_iq1_cuts import Cut, best_cut
from .quantize_lanes import Arguments, Column, Kernel
from .simd import choose_of_four, nearest_int, reduce, transpose

__all__ = ["emit_iq1", "iq1_tables"]

SHIFT = 0.125
_CHUNK = 16  # candidates that are compared at once
_HUGE = 3.4028234663852886e38


@cache
def iq1_tables() -> npt.NDArray[np.int32]:
    """The lattice by key, and the candidates.

    Two words for each key: the point or, where the key is none, the place of its candidates in bytes from the start of
    the table; and the number of chunks of candidates, 0 for a point. Candidates are 16-bit words, two bits for each
    component; the last chunk is filled up with the first candidate.
    """
    lattice = neighbours(GGMLType.IQ1_S)
    words = (codes(GGMLType.IQ1_S).astype(np.uint32) << np.arange(0, 16, 2, dtype=np.uint32)).sum(axis=1)
    counts = np.diff(lattice.start)
    chunks = -(-counts // _CHUNK)
    first = np.cumsum(chunks) - chunks
    within = np.arange(len(lattice.candidates)) - np.repeat(lattice.start[:-1], counts)
    off = counts > 0
    candidates = np.repeat(words[lattice.candidates[lattice.start[:-1][off]]], chunks[off] * _CHUNK)
    candidates[np.repeat(first * _CHUNK, counts) + within] = words[lattice.candidates]
    head = np.stack([np.where(off, 8 * len(counts) + 2 * _CHUNK * first, lattice.point), chunks], axis=1)
    table = np.concatenate([head.astype(np.int32).reshape(-1), candidates.astype(np.uint16).view(np.int32)])
    table.setflags(write=False)
    return table


def emit_iq1(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks of IQ1_S or IQ1_M."""
    k = Kernel(e, entry, source, arguments)
    n = 32 if entry.type is GGMLType.IQ1_S else 16
    units, groups = 256 // n, n // 8
    x, w = k.column(256), k.column(256)
    scales, choices = k.column(units), k.column(units)
    words, points = k.column(32), k.column(32)
    search = _Search(k)

    def group(first: Value) -> None:
        k.load(x, first)
        if weighted:
            k.load_importance(w, first)
            sigma = 2.0 * k.total(256, lambda i: x.at(i) * x.at(i)) / 256.0

            def weigh(i: Value) -> None:
                v = x.at(i)
                w.put(i, w.at(i) * e.sqrt(sigma + v * v))

            k.each(256, weigh)
        else:
            k.each(256, lambda i: w.put(i, x.at(i) * x.at(i)))
        with e.loop(0, units) as j:
            part, weights = x.start(j * n), w.start(j * n)
            cut = best_cut(k, part, weights, n, IQ1_THRESHOLDS[entry.type])
            choices.put(j, cut.choice)
            shifts = [_shift(k, cut.choice, g // (groups // 2)) for g in range(groups)]
            at = j * groups
            off = search.run(part, weights, cut, shifts, words.start(at), points.start(at))
            again = _refit(k, part, weights, words.start(at), shifts)
            scales.put(j, e.where(off & (again > 0.0), again, cut.scale))
        if n == 32:
            k.store(first, _fields_s(k, scales, choices, points))
        else:
            k.store(first, _fields_m(k, x, w, scales, choices, words, points))

    k.groups(group)


def _shift(k: Kernel, choice: Value, half: int) -> Value:
    """1/8, or -1/8 where the bit of the half is set (bit 1: the first)."""
    return k.e.where((choice & (2 - half)) != 0, k.real(-SHIFT), k.real(SHIFT))


def _component(word: Value, i: int, shift: Value) -> Value:
    """Component i of a point, shifted."""
    return (word.lsr(2 * i) & 3).to_float() - 1.0 + shift


class _Search:
    """Brings the groups of a unit to the lattice."""

    def __init__(self, k: Kernel) -> None:
        self.k = k
        self.errors = k.column(32)  # of a group, turned: for every lane 8 elements x 4 levels, the last one unused
        self.keys, self.off = k.column(1), k.column(1)

    def run(self, x: Column, w: Column, cut: Cut, shifts: list[Value], words: Column, points: Column) -> Value:
        """Writes word and number of every group's point; returns in which lanes some group was none."""
        k, e = self.k, self.k.e
        self.off.put(0, k.whole(0))
        digits = [int(d) for d in key_digits(GGMLType.IQ1_S)]
        for g, shift in enumerate(shifts):
            levels = [cut.level(8 * g + i) for i in range(8)]
            key, word = levels[0] * digits[0], levels[0]
            for i in range(1, 8):
                key, word = key + levels[i] * digits[i], word | (levels[i] << (2 * i))
            self.keys.put(0, key)
            words.put(g, word)
            self._errors(x.start(e.integer(8 * g)), w.start(e.integer(8 * g)), cut.scale, shift)
            with e.loop(0, k.count) as lane:
                self._lane(lane, words.address + (g * k.stride + lane * 4), points.address + (g * k.stride + lane * 4))
        return self.off.int_at(0) != 0

    def _errors(self, x: Column, w: Column, scale: Value, shift: Value) -> None:
        k, e = self.k, self.k.e
        at_level = [scale * (float(level) + shift) for level in (-1, 0, 1)]
        rows = []
        for i in range(8):
            v, weight = x.at(i), w.at(i)
            for value in at_level:
                difference = value - v
                rows.append(weight * difference * difference)
            rows.append(k.real(0))
        for start in range(0, 32, k.count):
            for lane, row in enumerate(transpose(e, rows[start : start + k.count])):
                e.store(row, self.errors.address + (lane * 128 + start * 4))

    def _lane(self, lane: Value, word: Value, point: Value) -> None:
        """One group of one block."""
        k, e = self.k, self.k.e
        tables = k.arguments.tables
        head = tables + e.load(self.keys.address + lane * 4, I32).sext(I64) * 8
        place, chunks = e.load(head, I32), e.load(head + 4, I32)
        e.store(place, point)
        with e.when(chunks > 0):
            e.store(e.const(I32, 1), self.off.address + lane * 4)
            candidates = tables + place.sext(I64)
            code = self._nearest(candidates, chunks.sext(I64), self.errors.address + lane * 128)
            e.store(code, word)
            e.store(self._number(code), point)

    def _nearest(self, candidates: Value, chunks: Value, errors: Value) -> Value:
        """The word of the first candidate with the least error."""
        e = self.k.e
        ints = vec(I32, _CHUNK)
        tables = [e.load(errors + 16 * i, vec(F32, 4)) for i in range(8)]
        counting = e.const(ints, list(range(_CHUNK)))
        least, position = e.var(e.const(vec(F32, _CHUNK), _HUGE)), e.var(counting)
        with e.loop(0, chunks) as chunk:
            word = e.load(candidates + chunk * (2 * _CHUNK), vec(I16, _CHUNK)).zext(I32)
            total = choose_of_four(e, tables[0], word)
            for i in range(1, 8):
                total = total + choose_of_four(e, tables[i], word.lsr(2 * i))
            better = total < least.get()
            least.set(e.where(better, total, least.get()))
            position.set(e.where(better, counting + (chunk * _CHUNK).trunc(I32), position.get()))
        smallest = e.splat(reduce(e, least.get(), "min"), _CHUNK)
        earliest = reduce(e, e.where(least.get() == smallest, position.get(), e.const(ints, 1 << 30)), "min")
        return e.load(candidates + earliest.sext(I64) * 2, I16).zext(I32)

    def _number(self, code: Value) -> Value:
        """The number of a point from its word."""
        e = self.k.e
        key = code & 3
        for i, digit in enumerate(key_digits(GGMLType.IQ1_S)[1:], 1):
            key = key + (code.lsr(2 * i) & 3) * int(digit)
        return e.load(self.k.arguments.tables + key.sext(I64) * 8, I32)


def _sums(
    k: Kernel, x: Column, w: Column, words: list[Value], shifts: list[Value], factor: Value | None,
    start: tuple[Value, Value],
) -> tuple[Value, Value]:  # fmt: skip
    """The sums of w x q and of w q**2 over groups, added to `start` in order."""
    xq, qq = start
    for g, (word, shift) in enumerate(zip(words, shifts, strict=True)):
        for i in range(8):
            q = _component(word, i, shift)
            q = q if factor is None else q * factor
            weighted = w.at(8 * g + i) * q
            xq, qq = xq + weighted * x.at(8 * g + i), qq + weighted * q
    return xq, qq


def _refit(k: Kernel, x: Column, w: Column, words: Column, shifts: list[Value]) -> Value:
    """The least-squares scale for the points, or 0 where it would not be positive."""
    zero = k.real(0)
    xq, qq = _sums(k, x, w, [words.int_at(g) for g in range(len(shifts))], shifts, None, (zero, zero))
    return k.e.where((xq > 0.0) & (qq > 0.0), xq / qq, zero)


def _integers(k: Kernel, scales: Column, units: int) -> tuple[Value, Callable[[int | Value], Value]]:
    """The largest scale, and a function that gives the 3-bit scale of a unit (0 where all are 0)."""
    e = k.e
    peak = e.var(k.real(0))
    k.each(units, lambda j: peak.set(e.max(scales.at(j), peak.get())))
    largest = peak.get()
    inverse = 1.0 / (largest / 15.0)
    some = largest > 0.0

    def integer(j: int | Value) -> Value:
        wanted = k.clamp(nearest_int(e, 0.5 * (inverse * scales.at(j) - 1.0)), 0, 7)
        return e.where(some, wanted, k.whole(0))

    return largest, integer


def _fields_s(k: Kernel, scales: Column, choices: Column, points: Column) -> dict[str, Value | Column]:
    e = k.e
    peak, integer = _integers(k, scales, 8)
    some, zero = peak > 0.0, k.whole(0)
    qs, qh = k.column(8), k.column(4)
    halves = []
    for j in range(8):
        number = [points.int_at(4 * j + g) for g in range(4)]
        low, high = number[0] & 255, number[0].lsr(8)
        for g in range(1, 4):
            low, high = low | ((number[g] & 255) << (8 * g)), high | (number[g].lsr(8) << (3 * g))
        qs.put(j, low)
        negative = e.where(some, (choices.int_at(j) & 1) << 15, zero)
        halves.append(high | (integer(j) << 12) | negative)
    for i in range(4):
        qh.put(i, halves[2 * i] | (halves[2 * i + 1] << 16))
    return {"d": k.half(peak / 15.0 * IQ1_FACTORS[GGMLType.IQ1_S])[0], "qs": qs, "qh": qh}


def _fields_m(
    k: Kernel, x: Column, w: Column, scales: Column, choices: Column, words: Column, points: Column
) -> dict[str, Value | Column]:
    e = k.e
    peak, integer = _integers(k, scales, 16)
    some, zero = peak > 0.0, k.whole(0)
    integers = k.column(16)
    xq, qq = e.var(k.real(0)), e.var(k.real(0))
    with e.loop(0, 16) as j:
        scale = integer(j)
        integers.put(j, scale)
        both = [_shift(k, choices.int_at(j), half) for half in range(2)]
        two = [words.int_at(j * 2), words.int_at(j * 2 + 1)]
        factor = (scale * 2 + 1).to_float()
        a, b = _sums(k, x.start(j * 16), w.start(j * 16), two, both, factor, (xq.get(), qq.get()))
        xq.set(a)
        qq.set(b)
    unit = e.where(qq.get() > 0.0, xq.get() / qq.get(), peak / 15.0)
    half = k.half(e.where(some, unit * IQ1_FACTORS[GGMLType.IQ1_M], k.real(0)))[0]
    low, nibbles = [points.int_at(g) for g in range(32)], []
    for u in range(16):
        choice = e.where(some, choices.int_at(u), zero)
        first = low[2 * u].lsr(8) | ((choice & 2) << 2)
        nibbles.append(first | (low[2 * u + 1].lsr(8) << 4) | ((choice & 1) << 7))
    packed = []
    for i in range(4):
        word = (half.lsr(4 * i) & 15) << 12
        for turn in range(4):
            word = word | (integers.int_at(4 * i + turn) << (3 * turn))
        packed.append(word)
    stored = k.column(2)
    for i in range(2):
        stored.put(i, packed[2 * i] | (packed[2 * i + 1] << 16))
    return {"qs": k.words(low), "qh": k.words(nibbles), "scales": stored}
