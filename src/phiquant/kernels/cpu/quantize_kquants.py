"""The K-quantizers in vector code: a super-block of 256 to a lane, as `quants.kquants` defines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format

from .emit import Emitter, Value
from .quantize_lanes import Arguments, Column, Kernel
from .quantize_search import (
    EPSILON,
    RangeSearch,
    absolute_peak,
    fit_descent,
    fit_range,
    fit_symmetric,
    fit_unsigned,
    range_level,
)
from .simd import nearest_int

__all__ = ["emit_kquant"]


@dataclass(frozen=True)
class _Ranged:
    """What tells Q2_K, Q4_K and Q5_K apart."""

    count: int  # sub-blocks
    most: int  # largest integer scale
    plain: RangeSearch
    together: int  # sub-blocks searched at once

    @property
    def weighted(self) -> RangeSearch:
        """The search with importance."""
        return RangeSearch(self.plain.top, -0.9, 0.05, 36)


_RANGED = {
    GGMLType.Q2_K: _Ranged(16, 15, RangeSearch(3, -0.5, 0.1, 15, absolute=True), 2),
    GGMLType.Q4_K: _Ranged(8, 63, RangeSearch(15, -1.0, 0.1, 20), 2),
    GGMLType.Q5_K: _Ranged(8, 63, RangeSearch(31, -0.5, 0.1, 15), 2),
}


def emit_kquant(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks of a K format."""
    k = Kernel(e, entry, source, arguments)
    if entry.type in _RANGED:
        _emit_ranged(k, weighted, _RANGED[entry.type])
    elif entry.type is GGMLType.Q3_K:
        _emit_q3_k(k, weighted)
    else:
        _emit_q6_k(k, weighted)


def _sigma(k: Kernel, x: Column, times: int) -> Value:
    """`times` the mean square of the super-block."""

    def square(i: Value) -> Value:
        v = x.at(i)
        return v * v

    return times * k.total(256, square) / 256.0


def _pack_scales(first: list[Value], second: list[Value]) -> list[Value]:
    """The bytes of scales and offsets: 16 pairs of four bits, or 12 bytes for 8 pairs of six."""
    if len(first) == 16:
        return [a | (b << 4) for a, b in zip(first, second, strict=True)]
    low = [first[j] | (first[j + 4].lsr(4) << 6) for j in range(4)]
    middle = [second[j] | (second[j + 4].lsr(4) << 6) for j in range(4)]
    high = [(first[j + 4] & 15) | (second[j + 4] << 4) for j in range(4)]
    return low + middle + high


def _unpack_scales(packed: list[Value]) -> tuple[list[Value], list[Value]]:
    """What a reader makes of them (a scale that wrapped around spoils its neighbours)."""
    if len(packed) == 16:
        return [v & 15 for v in packed], [v.lsr(4) & 15 for v in packed]
    low, middle, high = packed[:4], packed[4:8], packed[8:]
    first = [v & 63 for v in low] + [(a & 15) | (b.lsr(2) & 48) for a, b in zip(high, low, strict=True)]
    second = [v & 63 for v in middle] + [(a.lsr(4) & 15) | (b.lsr(2) & 48) for a, b in zip(high, middle, strict=True)]
    return first, second


def _emit_ranged(k: Kernel, weighted: bool, r: _Ranged) -> None:
    e, n = k.e, 256 // r.count
    x, scratch = k.column(256), k.column(n * r.together)
    ws = [k.column(n) for _ in range(r.together)]
    importance = k.column(256) if weighted else None
    scales, offsets, inverses, lows, totals = (k.column(r.count) for _ in range(5))
    integers = k.column(r.count), k.column(r.count)
    search = r.weighted if weighted else r.plain

    def group(first: Value) -> None:
        k.load(x, first)
        sigma = k.real(0)
        if importance is not None:
            k.load_importance(importance, first)
            sigma = _sigma(k, x, 1 if r.count == 16 else 2)
        with e.loop(0, r.count, r.together) as j:
            parts = [x.start((j + g) * n) for g in range(r.together)]
            for g, w in enumerate(ws):
                given = importance.start((j + g) * n) if importance else None
                _weigh(k, parts[g], w, n, search, given, sigma)
                if weighted:
                    totals.put(j + g, k.total(n, w.at))
            for g, fit in enumerate(fit_range(k, parts, ws, n, search, scratch)):
                for column, value in zip((scales, offsets, inverses, lows), fit, strict=True):
                    column.put(j + g, value)
        units, reals = [], []
        for values, levels in zip((scales, offsets), integers, strict=True):
            if weighted:
                unit = fit_unsigned(k, values, r.count, r.most, totals, levels)
            else:
                unit = _plain_scales(k, values, r, levels)
            bits, real = k.half(unit)
            units.append(bits)
            reals.append(real)
        packed = _pack_scales(*([column.int_at(j) for j in range(r.count)] for column in integers))
        for column, stored in zip(integers, _unpack_scales(packed), strict=True):
            for place, value in enumerate(stored):
                column.put(place, value)
        with e.loop(0, r.count) as j:
            part = x.start(j * n)
            scale = reals[0] * integers[0].int_at(j).to_float()
            offset = reals[1] * integers[1].int_at(j).to_float()
            none, inverse, lowest = scale == 0.0, inverses.at(j), lows.at(j)

            def level(i: Value) -> None:
                v = part.at(i)
                found = inverse * (v - lowest)
                again = (v + offset) / scale
                part.put(i, range_level(k, e.where(none, found, again), search.top))

            k.each(n, level)
        fields: dict[str, Value | Column] = {"d": units[0], "dmin": units[1], "scales": k.words(packed)}
        fields.update({plane.field: k.pack(plane, x) for plane in k.entry.planes})
        k.store(first, fields)

    k.groups(group)


def _weigh(
    k: Kernel, x: Column, w: Column, n: int, search: RangeSearch, importance: Column | None, sigma: Value
) -> None:
    """The weights of one sub-block."""
    e = k.e
    if importance is not None:

        def important(i: Value) -> None:
            v = x.at(i)
            w.put(i, importance.at(i) * e.sqrt(sigma + v * v))

        k.each(n, important)
    elif search.absolute:
        k.each(n, lambda i: w.put(i, e.abs(x.at(i))))
    else:

        def square(i: Value) -> Value:
            v = x.at(i)
            return v * v

        average = e.sqrt(k.total(n, square) / float(n))
        k.each(n, lambda i: w.put(i, average + e.abs(x.at(i))))


def _plain_scales(k: Kernel, values: Column, r: _Ranged, levels: Column) -> Value:
    """Integer scales in proportion to the largest; returns their unit."""
    e = k.e
    peak = e.var(k.real(0))
    k.each(r.count, lambda j: peak.set(e.max(values.at(j), peak.get())))
    inverse = e.where(peak.get() > 0.0, float(r.most) / peak.get(), k.real(0))
    # a scale that rounding made negative wraps in an unsigned byte, which only the formats of six bits bound
    bound = r.most if r.count == 8 else 255
    k.each(r.count, lambda j: levels.put(j, e.min(nearest_int(e, inverse * values.at(j)) & 255, bound)))
    return peak.get() / float(r.most)


def _pack_signed(scales: list[Value]) -> list[Value]:
    """The 12 bytes of Q3_K's scales, each below 64."""
    packed = [(scales[j] & 15) | (scales[j + 8] << 4) for j in range(8)]
    for j in range(4):
        top = scales[j].lsr(4)
        for turn in range(1, 4):
            top = top | (scales[j + 4 * turn].lsr(4) << (2 * turn))
        packed.append(top)
    return packed


def _emit_q3_k(k: Kernel, weighted: bool) -> None:
    e = k.e
    x, levels, scales, integers = k.column(256), k.column(256), k.column(16), k.column(16)
    importance, w, totals = (k.column(256), k.column(16), k.column(16)) if weighted else (None, None, None)

    def group(first: Value) -> None:
        k.load(x, first)
        if importance is not None and w is not None and totals is not None:
            k.load_importance(importance, first)
            sigma = _sigma(k, x, 2)
            with e.loop(0, 16) as j:
                part, mine = x.start(j * 16), importance.start(j * 16)

                def weigh(i: Value) -> None:
                    v = part.at(i)
                    w.put(i, mine.at(i) * e.sqrt(sigma + v * v))

                k.each(16, weigh)
                scale, inverse = fit_symmetric(k, part, 16, 4, w)
                scales.put(j, scale)
                totals.put(j, k.total(16, w.at))
                found = levels.start(j * 16)
                k.each(16, lambda i: found.put(i, k.clamp(inverse * part.at(i), -4, 3)))
                k.each(16, lambda i: found.put(i, k.round(found.at(i)).to_int()))
            unit, inverse = fit_symmetric(k, scales, 16, 32, totals)
            k.each(16, lambda j: integers.put(j, k.round(k.clamp(inverse * scales.at(j), -32, 31)).to_int()))
        else:
            with e.loop(0, 16) as j:
                scales.put(j, fit_descent(k, x.start(j * 16), 16, 4, levels.start(j * 16)))
            peak = absolute_peak(k, scales, 16)
            some = peak != 0.0
            inverse = -32.0 / peak
            unit = e.where(some, 1.0 / inverse, k.real(0))
            none = k.whole(-32)
            k.each(
                16,
                lambda j: integers.put(
                    j, e.where(some, k.clamp(nearest_int(e, inverse * scales.at(j)), -32, 31), none)
                ),
            )
        bits, real = k.half(unit)
        _levels_again(k, x, real, integers, 4, lambda i, v: levels.int_at(i))
        packed = _pack_signed([integers.int_at(j) + 32 for j in range(16)])
        fields: dict[str, Value | Column] = {"d": bits, "scales": k.words(packed)}
        fields.update({plane.field: k.pack(plane, x) for plane in k.entry.planes})
        k.store(first, fields)

    k.groups(group)


def _emit_q6_k(k: Kernel, weighted: bool) -> None:
    e = k.e
    x, scales, inverses, integers = k.column(256), k.column(16), k.column(16), k.column(16)
    importance = k.column(256) if weighted else None

    def group(first: Value) -> None:
        k.load(x, first)
        if importance is not None:
            k.load_importance(importance, first)
        with e.loop(0, 16) as j:
            w = importance.start(j * 16) if importance else None
            scale, inverse = fit_symmetric(k, x.start(j * 16), 16, 32, w)
            scales.put(j, scale)
            inverses.put(j, inverse)
        peak = absolute_peak(k, scales, 16)
        empty = e.abs(peak) < EPSILON
        inverse = -128.0 / peak
        bits, real = k.half(e.where(empty, k.real(0), 1.0 / inverse))
        zero = k.whole(0)
        k.each(
            16,
            lambda j: integers.put(j, e.where(empty, zero, e.min(nearest_int(e, inverse * scales.at(j)), 127))),
        )

        def found(i: Value, v: Value) -> Value:
            return k.round(k.clamp(inverses.at(i // 16) * v, -32, 31)).to_int()

        _levels_again(k, x, real, integers, 32, found, empty)
        fields: dict[str, Value | Column] = {"d": bits, "scales": k.words([integers.int_at(j) for j in range(16)])}
        fields.update({plane.field: k.pack(plane, x) for plane in k.entry.planes})
        k.store(first, fields)

    k.groups(group)


def _levels_again(
    k: Kernel,
    x: Column,
    unit: Value,
    integers: Column,
    centre: int,
    found: Callable[[Value, Value], Value],
    empty: Value | None = None,
) -> None:
    """Choose the levels for the scales as stored, in place of x and biased by `centre`.

    Sub-blocks whose scale came out zero keep the levels `found(element, x)`; lanes that are `empty` get all zero bits.
    """
    e = k.e
    with e.loop(0, 16) as j:
        part, base = x.start(j * 16), j * 16
        scale = unit * integers.int_at(j).to_float()
        none = scale == 0.0

        def level(i: Value) -> None:
            v = part.at(i)
            again = k.round(k.clamp(v / scale, -centre, centre - 1)).to_int()
            chosen = e.where(none, found(base + i, v), again) + centre
            part.put(i, chosen if empty is None else e.where(empty, k.whole(0), chosen))

        k.each(16, level)
