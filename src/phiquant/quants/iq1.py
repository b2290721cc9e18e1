"""Quantizers of IQ1_S and IQ1_M: levels -1, 0, 1 with a shift of 1/8 up or down, groups of 8 on a lattice.

Arrays are [elements, units]: a unit is what has a scale of its own, 32 (IQ1_S) or 16 (IQ1_M) elements. The rules of
the arithmetic are those of `quants.search`. Of a unit the two places are sought that cut its sorted elements into those
of level -1, 0 and 1: all are tried, with either shift (of both halves, in IQ1_M), and
(sum of w x q)**2 / (sum of w q**2) decides. Groups that are no point of the lattice then take the candidate with the
least weighted error.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Floats, Levels
from phiquant.quants.grids import points
from phiquant.quants.neighbours import key_digits, neighbours
from phiquant.quants.search import levels_of, ordered_sum

__all__ = ["IQ1_FACTORS", "IQ1_THRESHOLDS", "write_iq1_m", "write_iq1_s"]

IQ1_THRESHOLDS = {GGMLType.IQ1_S: 1e-12, GGMLType.IQ1_M: 1e-7}
"""Units whose largest magnitude is below have scale 0."""

IQ1_FACTORS = {GGMLType.IQ1_S: 1.125, GGMLType.IQ1_M: 1.1125}
"""What the scale of a block is multiplied with before it is stored."""

SHIFT = np.float32(0.125)
_LEAST = np.float32(-3.4028234663852886e38)


@dataclass
class _Best:
    """The best cut so far of every unit."""

    score: Floats
    scale: Floats
    first: Levels  # where level 0 begins among the sorted elements; -1: no cut is of use
    second: Levels  # where level 1 begins
    choice: Levels  # of shifts

    @classmethod
    def none(cls, units: int) -> "_Best":
        """No cut is worse."""
        nowhere = np.full(units, -1, np.int32)
        return cls(np.full(units, _LEAST), np.zeros(units, np.float32), nowhere, nowhere, nowhere)

    def offer(self, sum_xq: Floats, sum_qq: Floats, first: int, second: int, choice: int) -> None:
        """Take a cut where it is better than all before."""
        better = (sum_qq > 0) & (sum_xq * sum_xq > self.score * sum_qq)
        ratio = sum_xq / sum_qq
        self.scale = np.where(better, ratio, self.scale)
        self.score = np.where(better, ratio * sum_xq, self.score)
        self.first = np.where(better, first, self.first)
        self.second = np.where(better, second, self.second)
        self.choice = np.where(better, choice, self.choice)


def _running(terms: Floats) -> Floats:
    """0 and the sums of the first 1, 2, ... terms: [n + 1, units]."""
    sums = np.zeros((len(terms) + 1, terms.shape[1]), np.float32)
    for i, term in enumerate(terms):
        sums[i + 1] = sums[i] + term
    return sums


def _cut_32(x: Floats, w: Floats, order: npt.NDArray[np.intp]) -> _Best:
    """The best cut of units of 32; choice 0 shifts up, 1 down."""
    sorted_w = np.take_along_axis(w, order, axis=0)
    sums_x = _running(sorted_w * np.take_along_axis(x, order, axis=0))
    sums_w = _running(sorted_w)
    best, n = _Best.none(x.shape[1]), len(x)
    values = [(np.float32(-1) + s, s, np.float32(1) + s) for s in (SHIFT, -SHIFT)]
    for first in range(n + 1):
        for second in range(first, n + 1):
            part_x = sums_x[first] - sums_x[0], sums_x[second] - sums_x[first], sums_x[n] - sums_x[second]
            part_w = sums_w[first] - sums_w[0], sums_w[second] - sums_w[first], sums_w[n] - sums_w[second]
            for choice, q in enumerate(values):
                sum_xq = part_x[0] * q[0] + part_x[1] * q[1] + part_x[2] * q[2]
                sum_qq = part_w[0] * q[0] * q[0] + part_w[1] * q[1] * q[1] + part_w[2] * q[2] * q[2]
                best.offer(sum_xq, sum_qq, first, second, choice)
    return best


def _cut_16(x: Floats, w: Floats, order: npt.NDArray[np.intp]) -> _Best:
    """The best cut of units of 16; choice 2 a + b shifts the first 8 down if a, the others if b."""
    sorted_w = np.take_along_axis(w, order, axis=0)
    weighted = sorted_w * np.take_along_axis(x, order, axis=0)
    halves = [order < 8, order >= 8]
    zero = np.float32(0)
    sums_x = [_running(np.where(half, weighted, zero)) for half in halves]
    sums_w = [_running(np.where(half, sorted_w, zero)) for half in halves]
    best, n = _Best.none(x.shape[1]), len(x)
    for first in range(n + 1):
        for second in range(first, n + 1):
            xq, qq = [], []
            for half_x, half_w in zip(sums_x, sums_w, strict=True):
                below = half_x[first] + half_x[second]
                for s in (SHIFT, -SHIFT):
                    low, middle, high = (q * q for q in (np.float32(-1) + s, s, np.float32(1) + s))
                    top = np.float32(1) + s
                    xq.append(half_x[n] * top - below)
                    qq.append(half_w[n] * top * top + half_w[first] * (low - middle) + half_w[second] * (middle - high))
            for choice in range(4):
                a, b = choice >> 1, 2 + (choice & 1)
                best.offer(xq[a] + xq[b], qq[a] + qq[b], first, second, choice)
    return best


def _nearest_points(
    type: GGMLType, x: Floats, w: Floats, levels: Levels, scale: Floats, shift: Floats
) -> tuple[Levels, npt.NDArray[np.bool_]]:
    """The points of groups, [groups], and whether their levels [8, groups] (0, 1, 2) were those of one."""
    lattice = neighbours(type)
    key = (levels * key_digits(type)[:, None]).sum(axis=0)
    index: Levels = lattice.point[key].copy()
    off = np.flatnonzero(index < 0)
    x, w, scale, shift, key = x[:, off], w[:, off], scale[off], shift[off], key[off]
    errors = []  # of every element at each level
    for level in (-1, 0, 1):
        difference = scale * (np.float32(level) + shift) - x
        errors.append(w * difference * difference)
    table = np.stack(errors)
    start, count = lattice.start[key], lattice.start[key + 1] - lattice.start[key]
    chosen, least = lattice.candidates[start], np.full(len(off), -_LEAST)
    grid = points(type).astype(np.int32) + 1
    for turn in range(int(count.max()) if len(off) else 0):
        some = np.flatnonzero(turn < count)
        tried = lattice.candidates[start[some] + turn]
        error = np.zeros(len(some), np.float32)
        for i in range(8):
            error = error + table[grid[tried, i], i, some]
        better = error < least[some]
        least[some] = np.where(better, error, least[some])
        chosen[some] = np.where(better, tried, chosen[some])
    on = index >= 0
    index[off] = chosen
    return index, on


@dataclass
class _Units:
    """Units as quantized: [groups of 8, units] and [units]."""

    index: Levels
    negative: npt.NDArray[np.bool_]  # whether the shift of each group is -1/8
    scale: Floats


def _fit(type: GGMLType, x: Floats, w: Floats) -> _Units:
    """Points, shifts and scales of units [n, units]. A unit that is all but zero has scale 0 and points 0."""
    n, units = x.shape
    order = np.argsort(x, axis=0, kind="stable")
    best = (_cut_32 if n == 32 else _cut_16)(x, w, order)
    empty = (np.abs(x).max(axis=0) < np.float32(IQ1_THRESHOLDS[type])) | (best.first < 0)
    rank = np.arange(n)[:, None]
    by_rank = (rank >= best.first).astype(np.int32) + (rank >= best.second)
    levels = np.zeros((n, units), np.int32)
    np.put_along_axis(levels, order, by_rank, axis=0)
    swap = best.scale < 0
    levels = np.where(swap, 2 - levels, levels)
    scale = np.where(swap, -best.scale, best.scale)
    bits = best.choice * 3 if n == 32 else best.choice  # both shifts of IQ1_S are one
    negative = np.stack([(bits >> 1 & 1) != swap, (bits & 1) != swap]).repeat(n // 16, axis=0)
    shift = np.where(negative, -SHIFT, SHIFT)
    groups = n // 8

    def grouped(v: npt.NDArray[Any]) -> Any:
        return v.reshape(groups, 8, units).swapaxes(0, 1).reshape(8, -1)

    spread = np.tile(scale, groups)
    index, on = _nearest_points(type, grouped(x), grouped(w), grouped(levels), spread, shift.reshape(-1))
    index, off = index.reshape(groups, units), ~on.reshape(groups, units).all(axis=0)
    q = _values(type, index, shift)
    weighted = w * q
    sum_xq, sum_qq = ordered_sum(weighted * x), ordered_sum(weighted * q)
    scale = np.where(off & (sum_xq > 0) & (sum_qq > 0), sum_xq / sum_qq, scale)
    zero = np.float32(0)
    return _Units(np.where(empty, 0, index), negative & ~empty, np.where(empty, zero, scale))


def _values(type: GGMLType, index: Levels, shift: Floats) -> Floats:
    """What the points [groups, units] stand for at scale 1: [8 groups, units]."""
    components = points(type)[index].astype(np.float32) + shift[..., None]
    values: Floats = components.swapaxes(1, 2).reshape(-1, index.shape[1])
    return values


def _prepared(type: GGMLType, x: Floats, importance: Floats | None, n: int) -> tuple[Floats, Floats, _Units]:
    """Elements and weights [256, blocks] and the units, sub-block after sub-block of all blocks."""
    columns = np.ascontiguousarray(x.reshape(-1, 256).T)
    squares = columns * columns
    weights = squares
    if importance is not None:
        given = np.broadcast_to(importance, x.shape).reshape(-1, 256).T
        weights = given * np.sqrt(np.float32(2) * ordered_sum(squares) / np.float32(256) + squares)
    units = (np.concatenate(np.split(v, 256 // n), axis=1) for v in (columns, weights))
    return columns, weights, _fit(type, *units)


def _integers(scales: Floats, peak: Floats) -> Levels:
    """Scales of three bits, s of 2 s + 1, in units of a fifteenth of the largest."""
    unit = peak / np.float32(15)
    return levels_of(np.float32(0.5) * (np.float32(1) / unit * scales - np.float32(1)), 0, 7)


def write_iq1_s(dtype: np.dtype[np.void], x: Floats, importance: Floats | None) -> Blocks:
    """Rows [rows, columns] as blocks of IQ1_S; an element weighs importance * sqrt(2 * mean square + x**2)."""
    type = GGMLType.IQ1_S
    columns, _, units = _prepared(type, x, importance, 32)
    count = columns.shape[1]
    scales = units.scale.reshape(8, count)
    peak = np.maximum(scales.max(axis=0), np.float32(0))
    some = peak > 0
    blocks = np.zeros(count, dtype)
    blocks["d"] = peak / np.float32(15) * np.float32(IQ1_FACTORS[type])
    index = units.index.reshape(4, 8, count)
    blocks["qs"] = (index & 255).transpose(2, 1, 0).reshape(count, 32)
    tops = ((index >> 8) << np.arange(0, 12, 3)[:, None, None]).sum(axis=0)
    high = _integers(scales, peak) | units.negative[0].reshape(8, count) << 3
    blocks["qh"] = (tops | np.where(some, high, 0) << 12).T
    return blocks.reshape(len(x), -1)


def write_iq1_m(dtype: np.dtype[np.void], x: Floats, importance: Floats | None) -> Blocks:
    """Rows [rows, columns] as blocks of IQ1_M; weights as IQ1_S, or x**2 without importance.

    The scale of the block is the least-squares one for all that was chosen.
    """
    type = GGMLType.IQ1_M
    columns, weights, units = _prepared(type, x, importance, 16)
    count = columns.shape[1]
    scales = units.scale.reshape(16, count)
    peak = np.maximum(scales.max(axis=0), np.float32(0))
    some = peak > 0
    integers = np.where(some, _integers(scales, peak), 0)
    values = _values(type, units.index, np.where(units.negative, -SHIFT, SHIFT))  # [16, units]
    q = values.reshape(16, 16, count).swapaxes(0, 1) * (2 * integers + 1).astype(np.float32)[:, None]
    q = q.reshape(256, count)
    weighted = weights * q
    sum_xq, sum_qq = ordered_sum(weighted * columns), ordered_sum(weighted * q)
    unit = np.where(sum_qq > 0, sum_xq / sum_qq, peak / np.float32(15))
    half = np.where(some, unit * np.float32(IQ1_FACTORS[type]), np.float32(0)).astype(np.float16).view(np.uint16)
    blocks = np.zeros(count, dtype)
    index = units.index.reshape(2, 16, count)
    blocks["qs"] = (index & 255).transpose(2, 1, 0).reshape(count, 32)
    shifts = (units.negative.reshape(2, 16, count) & some).astype(np.int32) << 3
    nibbles = index >> 8 | shifts
    blocks["qh"] = (nibbles[0] | nibbles[1] << 4).T
    packed = (integers.reshape(4, 4, count) << np.arange(0, 12, 3)[:, None]).sum(axis=1)
    parts = half.astype(np.int32) >> np.arange(0, 16, 4)[:, None] & 15
    blocks["scales"] = (packed | parts << 12).T
    return blocks.reshape(len(x), -1)
