"""Quantizers whose scale follows from the largest or mean magnitude, in vector code, one block to a lane.

Q1_0, Q2_0, TQ1_0, TQ2_0 as `quants.small` defines them, MXFP4 and NVFP4 as `quants.microscaling` does.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format
from phiquant.quants.microscaling import E2M1, UE4M3_LARGEST

from .emit import I32, Emitter, Value
from .quantize_lanes import Arguments, Column, Kernel

__all__ = ["emit_small"]

_Fields = dict[str, Value | Column]


def emit_small(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks of any of these formats."""
    k = Kernel(e, entry, source, arguments)
    fields_of = {
        GGMLType.Q1_0: _q1_0,
        GGMLType.Q2_0: _q2_0,
        GGMLType.TQ1_0: _tq1_0,
        GGMLType.TQ2_0: _tq2_0,
        GGMLType.MXFP4: _mxfp4,
        GGMLType.NVFP4: _nvfp4,
    }[entry.type]
    x = k.column(k.elements)

    def group(first: Value) -> None:
        k.load(x, first)
        fields = fields_of(k, x)
        fields.update({plane.field: k.pack(plane, x) for plane in entry.planes})
        k.store(first, fields)

    k.groups(group)


def _magnitude(k: Kernel, x: Column, n: int) -> Value:
    """The largest magnitude; four chains of comparisons, as the order does not matter."""
    e = k.e
    largest = [e.var(k.real(0)) for _ in range(4)]
    with e.loop(0, n, 4) as i:
        for j, peak in enumerate(largest):
            peak.set(e.max(e.abs(x.at(i + j)), peak.get()))
    a, b, c, d = (peak.get() for peak in largest)
    return e.max(e.max(a, b), e.max(c, d))


def _q1_0(k: Kernel, x: Column) -> _Fields:
    e = k.e
    d = k.total(128, lambda i: e.abs(x.at(i))) / 128.0
    k.each(128, lambda i: x.put(i, (x.at(i) >= 0.0).zext(I32)))
    return {"d": k.half(d)[0]}


def _ternary(k: Kernel, x: Column) -> tuple[Value, Value]:
    """Writes 1 + x / d, rounded, where d is the largest magnitude; returns d, and whether 1 / d is finite.

    Where it is not, all levels are 1, that of zero.
    """
    e = k.e
    d = _magnitude(k, x, k.elements)
    inverse = k.reciprocal(d)
    finite = inverse < float("inf")
    inverse = e.where(finite, inverse, k.real(0))
    one, zero = k.whole(1), k.whole(0)

    def level(i: Value) -> None:
        v = x.at(i) * inverse
        x.put(i, one + e.where(v >= 0.5, one, zero) - e.where(v <= -0.5, one, zero))

    k.each(k.elements, level)
    return d, finite


def _q2_0(k: Kernel, x: Column) -> _Fields:
    d, finite = _ternary(k, x)
    with k.e.when(k.any(~finite)):
        k.each(64, lambda i: x.put(i, k.e.where(finite, x.int_at(i), 0)))
    return {"d": k.half(d)[0]}


def _tq2_0(k: Kernel, x: Column) -> _Fields:
    return {"d": k.half(_ternary(k, x)[0])[0]}


def _fractions(k: Kernel, x: Column, made: Column, words: int, run: int, digits: int) -> None:
    """Words of bytes from `digits` base-3 digits of x, `run` elements apart, the first most significant of five."""

    def word(i: Value) -> None:
        total: Value | None = None
        for byte in range(4):
            number = k.whole(0)
            for digit in range(5):
                number = number * 3
                if digit < digits:
                    number = number + x.int_at(i * 4 + (digit * run + byte))
            # times 256 / 243, upwards; the quotient by 243 is exact for all numbers below 243
            fraction = number + ((number * 13 + 242) * 270).lsr(16)
            total = fraction if total is None else total | (fraction << (8 * byte))
        assert total is not None
        made.put(i, total)

    k.each(words, word, unroll=1)


def _tq1_0(k: Kernel, x: Column) -> _Fields:
    d, _ = _ternary(k, x)
    qs, qh = k.column(12), k.column(1)
    _fractions(k, x, qs, 8, 32, 5)
    _fractions(k, x.start(k.e.integer(160)), qs.start(k.e.integer(8)), 4, 16, 5)
    _fractions(k, x.start(k.e.integer(240)), qh, 1, 4, 4)
    return {"d": k.half(d)[0], "qs": qs, "qh": qh}


def _nearest(k: Kernel, x: Column, n: int, scale: Value) -> None:
    """The levels whose values at this scale are nearest to x, in its place; of two as near the smaller magnitude."""
    e = k.e
    values = E2M1[:8].astype(np.float32)
    middles = [scale * float((a + b) / 2) for a, b in pairwise(values)]  # exact
    one, zero = k.whole(1), k.whole(0)

    def level(i: Value) -> None:
        v = x.at(i)
        magnitude = e.abs(v)
        above = [e.where(magnitude > middle, one, zero) for middle in middles]
        total = above[0]
        for term in above[1:]:
            total = total + term
        x.put(i, total + e.where((v < 0.0) & (total > 0), k.whole(8), zero))

    k.each(n, level)


def _mxfp4(k: Kernel, x: Column) -> _Fields:
    """The exponent is floor(log2(peak)) with the logarithm rounded to float32 first.

    Of a peak j units of last place below 2**n the logarithm is n - j log2(e) 2**-24, which rounds to n if that is at
    most half the distance of float32 numbers there: 2**(m - 24) with 2**m <= |n| (< for n > 0), so if j <= 2**m ln 2.
    """
    e = k.e
    bits = _magnitude(k, x, 32).bits(k.ints)
    floor = bits.lsr(23) - 127
    n = floor + 1
    power = e.where(n > 0, n - 1, -n).to_float().bits(k.ints) & 0x7F800000
    reach = (power.bits(k.floats) * 0.6931472).to_int()
    below = 0x800000 - (bits & 0x7FFFFF)
    exponent = e.max(floor + 125 + e.where(below <= reach, k.whole(1), k.whole(0)), 0)
    subnormal = k.whole(0x00200000) << e.min(exponent, 1)
    scale = e.where(exponent < 2, subnormal, (exponent - 1) << 23).bits(k.floats)
    _nearest(k, x, 32, scale)
    return {"e": exponent}


def _nvfp4(k: Kernel, x: Column) -> _Fields:
    e = k.e
    scales = k.column(4)
    with e.loop(0, 4) as j:
        part = x.start(j * 16)
        wanted = _magnitude(k, part, 16) / 6.0
        k.overflow(wanted > UE4M3_LARGEST)
        bits = e.min(wanted, UE4M3_LARGEST).bits(k.ints)
        exponent = bits.lsr(23) - 120
        normal = (exponent << 3 | (bits.lsr(20) & 7)) + (bits.lsr(19) & 1)
        normal = e.where(normal >= 0x78, k.whole(0x7E), normal)
        subnormal = e.min((e.min(wanted, 1.0) * 512.0 + 0.5).to_int(), 7)
        byte = e.where(exponent <= 0, subnormal, normal)
        scales.put(j, byte)
        exponent, mantissa = byte.lsr(3), (byte & 7).to_float()
        small = mantissa * 2.0**-10
        # half of (1 + mantissa / 8) * 2**(exponent - 7)
        large = (1.0 + mantissa / 8.0) * ((exponent + 119) << 23).bits(k.floats)
        scale = e.where(exponent == 0, small, large)
        # a scale of 0 leaves only zeros: no magnitude is above infinity
        _nearest(k, part, 16, e.where(byte == 0, k.real(float("inf")), scale))
    return {"d": k.words([scales.int_at(j) for j in range(4)])}
