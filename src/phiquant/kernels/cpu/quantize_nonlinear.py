"""The quantizers of IQ4_NL and IQ4_XS in vector code, one block to a lane, as `quants.nonlinear` defines them.

The search spends its time in finding the entry of the table that is nearest to a number. A cubic that runs through the
middle of every step of that staircase gives the index or the next one; a comparison with the lower end of the step
found says which. Where a register cannot be used as a table, the number is compared with all ends.
"""

from __future__ import annotations

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format
from phiquant.quants.iquants import IQ4_TABLE
from phiquant.quants.nonlinear import middles

from .emit import F32, Emitter, Value
from .quantize_lanes import Arguments, Column, Kernel, Lanes
from .quantize_search import EPSILON, absolute_peak
from .simd import has_float_table, lookup_floats, nearest_int

__all__ = ["emit_nonlinear", "nearest_entry"]

_VALUES = [float(v) for v in IQ4_TABLE]
_ENDS = [float(v) for v in middles(IQ4_TABLE)]  # from number i on, entry i + 1 is the nearest
_BOUND = 135.0
# Fitted to i + 0.5 at end i (of 1 to 15), less 0.1 so that it stays below 16 up to the bound: within i + 0.27 and
# i + 0.51 there, and rising between.
_CUBIC = (8.803, 8.17424e-2, -1.20307e-5, -1.49313e-6)


def nearest_entry(k: Lanes, v: Value) -> tuple[Value, Value]:
    """Index (int32) and value of the entry nearest to v, of magnitude 135 at most; of two as near the upper one."""
    e = k.e
    if not has_float_table(e, 16):
        index, value = k.whole(0), k.real(_VALUES[0])
        for i, end in enumerate(_ENDS):
            below = v < end
            index = e.where(below, index, k.whole(i + 1))
            value = e.where(below, value, k.real(_VALUES[i + 1]))
        return index, value
    estimate = k.real(_CUBIC[3])
    for c in reversed(_CUBIC[:3]):
        estimate = estimate * v + c
    above = estimate.to_int()
    start = lookup_floats(e, [-np.inf, *_ENDS], above)
    index = above + (v < start).sext(k.ints.element)
    return index, lookup_floats(e, _VALUES, index)


def emit_nonlinear(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks of IQ4_NL or IQ4_XS."""
    k = Kernel(e, entry, source, arguments)
    n = k.elements
    x, scales = k.column(n), k.column(n // 32)
    importance = k.column(n) if weighted else None

    def group(first: Value) -> None:
        k.load(x, first)
        if importance is not None:
            k.load_importance(importance, first)
            sigma = k.total(n, lambda i: x.at(i) * x.at(i)) * (2 / n)

            def weigh(i: Value) -> None:
                v = x.at(i)
                importance.put(i, importance.at(i) * e.sqrt(sigma + v * v))

            k.each(n, weigh)
        with e.loop(0, n // 32) as j:
            w = importance.start(j * 32) if importance else None
            scales.put(j, _fit(k, x.start(j * 32), w))
        fields = _finish(k, x, scales)
        fields.update({plane.field: k.pack(plane, x) for plane in entry.planes})
        k.store(first, fields)

    k.groups(group)


def _fit(k: Kernel, x: Column, w: Column | None) -> Value:
    """The scale of 32 elements."""
    e = k.e
    peak = absolute_peak(k, x, 32)
    empty = e.abs(peak) < EPSILON
    divisor = e.where(empty, k.real(1), peak)  # keeps the numbers of lanes that are not used within bounds

    def sums(inverses: list[Value]) -> list[tuple[Value, Value]]:
        totals = [(e.var(k.real(0)), e.var(k.real(0))) for _ in inverses]

        def step(i: Value) -> None:
            v = x.at(i)
            weight = v * v if w is None else w.at(i)
            for inverse, (xq, qq) in zip(inverses, totals, strict=True):
                _, value = nearest_entry(k, inverse * v)
                weighted = weight * value
                xq.set(xq.get() + weighted * v)
                qq.set(qq.get() + weighted * value)

        k.each(32, step, unroll=2)
        return [(xq.get(), qq.get()) for xq, qq in totals]

    ((xq, qq),) = sums([1.0 / (divisor / 127.0)])
    ratio = e.where(qq > 0.0, xq / qq, k.real(0))
    scale, best = e.var(ratio), e.var(ratio * xq)
    together = 5 if k.count == 16 else 3
    with e.loop(0, 15, together) as i:
        tried = [e.splat((i + (g - 134)).to_float(F32), k.count) / divisor for g in range(together)]
        for xq, qq in sums(tried):
            better = (qq > 0.0) & (xq * xq > best.get() * qq)
            ratio = xq / qq
            scale.set(e.where(better, ratio, scale.get()))
            best.set(e.where(better, ratio * xq, best.get()))
    return e.where(empty, k.real(0), scale.get())


def _finish(k: Kernel, x: Column, scales: Column) -> dict[str, Value | Column]:
    """Puts the levels in place of x; returns the fields of the scales."""
    if k.elements == 32:
        unit = scales.at(0)
        _levels(k, x, unit)
        return {"d": k.half(unit)[0]}
    e = k.e
    d = -absolute_peak(k, scales, 8) / 32.0
    inverse = k.reciprocal(d)
    low, high = e.var(k.whole(0)), e.var(k.whole(0))
    with e.loop(0, 8) as j:
        integer = k.clamp(nearest_int(e, inverse * scales.at(j)), -32, 31)
        _levels(k, x.start(j * 32), d * integer.to_float())
        stored = integer + 32
        shift = e.splat(j.trunc(k.ints.element), k.count)
        low.set(low.get() | ((stored & 15) << (shift * 4)))
        high.set(high.get() | (stored.lsr(4) << (shift * 2)))
    words = k.column(1)
    words.put(0, low.get())
    return {"d": k.half(d)[0], "scales_h": high.get(), "scales_l": words}


def _levels(k: Kernel, x: Column, unit: Value) -> None:
    inverse = k.reciprocal(unit)

    def level(i: Value) -> None:
        # NaN becomes the upper bound, and so the last level
        v = k.e.max(k.e.min(inverse * x.at(i), _BOUND), -_BOUND)
        x.put(i, nearest_entry(k, v)[0])

    k.each(32, level)
