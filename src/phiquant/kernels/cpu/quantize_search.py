"""The searches of `quants.search` in vector code, one block to a lane, with the same operations in the same order.

Levels are kept as float32 (small integers, exact) wherever the reference multiplies by them. Rounding then clamping
there is clamping then rounding here: the bounds are integers, and an inverse scale that came from dividing by nothing
is replaced by 0, which gives the level 0 that the reference's rounding gives. A search returns the inverse scale that
its levels came from instead of the levels: one multiplication finds them again where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit import F32, Value
from .quantize_lanes import Column, Lanes
from .simd import nearest_int

__all__ = ["EPSILON", "absolute_peak", "fit_descent", "fit_range", "fit_symmetric", "fit_unsigned", "symmetric_level"]

EPSILON = 1e-15


def absolute_peak(k: Lanes, x: Column, n: int) -> Value:
    """The first value of largest magnitude, with its sign."""
    e = k.e
    peak, magnitude = e.var(k.real(0)), e.var(k.real(0))

    def step(i: Value) -> None:
        v = x.at(i)
        size = e.abs(v)
        larger = size > magnitude.get()
        peak.set(e.where(larger, v, peak.get()))
        magnitude.set(e.where(larger, size, magnitude.get()))

    k.each(n, step)
    return peak.get()


def symmetric_level(k: Lanes, v: Value, top: int) -> Value:
    """v to the nearest of -top..top-1; -top where v is NaN."""
    return k.round(k.clamp(v, -top, top - 1))


def fit_symmetric(k: Lanes, x: Column, n: int, top: int, w: Column | None, group: int = 3) -> tuple[Value, Value]:
    """Scale, and the inverse whose `symmetric_level`s were best (NaN for a block of zeros, whose levels are -top)."""
    e = k.e
    peak = absolute_peak(k, x, n)
    empty = e.abs(peak) < EPSILON

    def sums(inverses: list[Value]) -> list[tuple[Value, Value]]:
        totals = [(e.var(k.real(0)), e.var(k.real(0))) for _ in inverses]

        def step(i: Value) -> None:
            v = x.at(i)
            weight = v * v if w is None else w.at(i)
            wx = weight * v
            for inverse, (xl, ll) in zip(inverses, totals, strict=True):
                level = symmetric_level(k, inverse * v, top)
                xl.set(xl.get() + wx * level)
                ll.set(ll.get() + weight * level * level)

        k.each(n, step)
        return [(xl.get(), ll.get()) for xl, ll in totals]

    inverse = e.var(k.real(-top) / peak)
    ((xl, ll),) = sums([inverse.get()])
    ratio = e.where(ll != 0.0, xl / ll, k.real(0))
    scale, best = e.var(ratio), e.var(ratio * xl)
    with e.loop(0, 18, group) as i:
        tried = []
        for g in range(group):
            step = i + (g - 9)
            step = e.where(step < 0, step, step + 1)  # -9..9 without 0
            width = e.const(F32, 0.1) * step.to_float(F32) + float(top)
            tried.append(e.splat(-width, k.count) / peak)
        for candidate, (xl, ll) in zip(tried, sums(tried), strict=True):
            better = (ll > 0.0) & (xl * xl > best.get() * ll)
            ratio = xl / ll
            scale.set(e.where(better, ratio, scale.get()))
            best.set(e.where(better, ratio * xl, best.get()))
            inverse.set(e.where(better, candidate, inverse.get()))
    return e.where(empty, k.real(0), scale.get()), e.where(empty, k.real(float("nan")), inverse.get())


def _descend(
    k: Lanes,
    levels: Column,
    n: int,
    terms: Callable[[Value], tuple[Value, Value]],
    sums: tuple[Value, Value],
    clamp: Callable[[Value], Value],
    stored: Callable[[Value], Value],
    careful: bool,
) -> Value:
    """Coordinate descent of `quants.search.descend` over int32 levels; `terms(i)` is x and its weight."""
    e = k.e
    sum_xl, sum_ll = e.var(sums[0]), e.var(sums[1])
    sweep = e.var(0)
    with e.forever() as done:
        changed = e.var(k.whole(0))

        def step(i: Value) -> None:
            x, weight = terms(i)
            wx = weight * x
            level = levels.int_at(i)
            old = level.to_float()
            rest_xl = sum_xl.get() - wx * old
            rest_ll = sum_ll.get() - weight * old * old
            moved = clamp(nearest_int(e, x * rest_ll / rest_xl))
            new = moved.to_float()
            new_xl = rest_xl + wx * new
            new_ll = rest_ll + weight * new * new
            accept = (rest_xl > 0.0) & (moved != level)
            accept = accept & (new_xl * new_xl * sum_ll.get() > sum_xl.get() * sum_xl.get() * new_ll)
            accept = accept & ((rest_ll if careful else new_ll) > 0.0)
            changed.set(e.where(accept, k.whole(1), changed.get()))
            levels.put(i, e.where(accept, stored(moved), level))
            sum_xl.set(e.where(accept, new_xl, sum_xl.get()))
            sum_ll.set(e.where(accept, new_ll, sum_ll.get()))

        k.each(n, step, unroll=2)
        sweep.set(sweep.get() + 1)
        still = k.any(changed.get() != 0)
        done(~still | (sweep.get() >= 5))
    return e.where(sum_ll.get() > 0.0, sum_xl.get() / sum_ll.get(), k.real(0))


def fit_descent(k: Lanes, x: Column, n: int, top: int, levels: Column) -> Value:
    """Scale by coordinate descent with weights x**2; writes int32 levels -top..top-1 (-top for a block of zeros)."""
    e = k.e
    peak = absolute_peak(k, x, n)
    empty = e.abs(peak) < EPSILON
    inverse = k.real(-top) / peak
    sum_xl, sum_ll = e.var(k.real(0)), e.var(k.real(0))

    def first(i: Value) -> None:
        v = x.at(i)
        weight = v * v
        level = symmetric_level(k, inverse * v, top)
        levels.put(i, level.to_int())
        sum_xl.set(sum_xl.get() + weight * v * level)
        sum_ll.set(sum_ll.get() + weight * level * level)

    k.each(n, first)

    def terms(i: Value) -> tuple[Value, Value]:
        v = x.at(i)
        return v, v * v

    sums = sum_xl.get(), sum_ll.get()
    scale = _descend(k, levels, n, terms, sums, lambda v: k.clamp(v, -top, top - 1), lambda v: v, careful=False)
    k.each(n, lambda i: levels.put(i, e.where(empty, k.whole(-top), levels.int_at(i))))
    return e.where(empty, k.real(0), scale)


def fit_unsigned(k: Lanes, x: Column, n: int, top: int, w: Column, levels: Column) -> Value:
    """Scale of values that are not negative; writes int32 levels 0..255, at most `top` but for negative oddities."""
    e = k.e
    peak = e.var(x.at(0))
    k.each(n, lambda i: peak.set(e.max(x.at(i), peak.get())))
    peak_value = peak.get()
    empty = peak_value < EPSILON
    inverse, best = e.var(k.real(0)), e.var(k.real(0))

    def attempt(width: Value, level_of: Callable[[Value], Value]) -> tuple[Value, Value]:
        tried = width / peak_value
        scale = 1.0 / tried

        def term(i: Value) -> Value:
            v = x.at(i)
            difference = v - scale * level_of(nearest_int(e, tried * v)).to_float()
            return w.at(i) * difference * difference

        return tried, k.total(n, term)

    tried, error = attempt(k.real(top), lambda level: level & 255)
    inverse.set(tried)
    best.set(error)
    with e.loop(0, 8) as i:
        step = i - 4
        step = e.where(step < 0, step, step + 1)  # -4..4 without 0
        width = e.splat(e.const(F32, 0.1) * step.to_float(F32) + float(top), k.count)
        tried, error = attempt(width, lambda level: e.min(level, top))
        better = error < best.get()
        best.set(e.where(better, error, best.get()))
        inverse.set(e.where(better, tried, inverse.get()))
    sum_xl, sum_ll = e.var(k.real(0)), e.var(k.real(0))

    def first(i: Value) -> None:
        v, weight = x.at(i), w.at(i)
        level = e.min(nearest_int(e, inverse.get() * v), top)
        real = level.to_float()
        levels.put(i, level & 255)
        sum_xl.set(sum_xl.get() + weight * v * real)
        sum_ll.set(sum_ll.get() + weight * real * real)

    k.each(n, first)
    scale = _descend(
        k,
        levels,
        n,
        lambda i: (x.at(i), w.at(i)),
        (sum_xl.get(), sum_ll.get()),
        lambda v: e.min(v, top),
        lambda v: v & 255,
        careful=True,
    )
    k.each(n, lambda i: levels.put(i, e.where(empty, k.whole(0), levels.int_at(i))))
    return e.where(empty, k.real(0), scale)


def fit_range(
    k: Lanes,
    x: Column,
    n: int,
    top: int,
    w: Column,
    scratch: Column,
    *,
    first: float,
    stride: float,
    steps: int,
    absolute: bool = False,
    group: int = 3,
) -> tuple[Value, Value, Value, Value]:
    """Scale, offset >= 0, and the inverse and lowest value that give the levels: round(inverse * (x - lowest)).

    `group` widths are tried together; `scratch` holds n * group vectors. A flat block has scale and inverse 0.
    """
    e = k.e
    low, high = e.var(x.at(0)), e.var(x.at(0))
    sum_w, sum_x = e.var(k.real(0)), e.var(k.real(0))

    def extent(i: Value) -> None:
        v, weight = x.at(i), w.at(i)
        low.set(e.where(v < low.get(), v, low.get()))
        high.set(e.where(v > high.get(), v, high.get()))
        sum_w.set(sum_w.get() + weight)
        sum_x.set(sum_x.get() + weight * v)

    k.each(n, extent)
    lowest = e.where(low.get() > 0.0, k.real(0), low.get())
    span = high.get() - lowest
    flat = high.get() <= lowest
    total_w, total_x = sum_w.get(), sum_x.get()

    def size(difference: Value) -> Value:
        return e.abs(difference) if absolute else difference * difference

    def level_of(inverse: Value, shifted: Value) -> Value:
        return k.round(e.min(inverse * shifted, float(top)))

    exact = k.real(top) / span
    scale, offset, inverse = e.var(1.0 / exact), e.var(lowest), e.var(k.finite(exact))

    def plain_error(i: Value) -> Value:
        v = x.at(i)
        return w.at(i) * size(scale.get() * level_of(inverse.get(), v - lowest) + lowest - v)

    best = e.var(k.total(n, plain_error))
    with e.loop(0, steps + 1, group) as i:
        tried, sums = [], []
        for g in range(group):
            width = (e.const(F32, stride) * (i + g).to_float(F32) + e.const(F32, first)) + float(top)
            tried.append(k.finite(e.splat(width, k.count) / span))
            sums.append([e.var(k.real(0)) for _ in range(3)])

        def accumulate(i: Value) -> None:
            v, weight = x.at(i), w.at(i)
            shifted = v - lowest
            for g in range(group):
                level = level_of(tried[g], shifted)
                scratch.put(i * group + g, level)
                wl = weight * level
                for total, term in zip(sums[g], (wl, wl * level, wl * v), strict=True):
                    total.set(total.get() + term)

        k.each(n, accumulate)
        scales, offsets, valid, errors = [], [], [], []
        for g in range(group):
            sum_l, sum_ll, sum_xl = (total.get() for total in sums[g])
            determinant = total_w * sum_ll - sum_l * sum_l
            new_scale = (total_w * sum_xl - total_x * sum_l) / determinant
            new_offset = (sum_ll * total_x - sum_l * sum_xl) / determinant
            above = new_offset > 0.0
            scales.append(e.where(above, sum_xl / sum_ll, new_scale))
            offsets.append(e.where(above, k.real(0), new_offset))
            ok = determinant > 0.0
            if (steps + 1) % group:
                ok = ok & e.splat(i + g <= steps, k.count)
            valid.append(ok)
            errors.append(e.var(k.real(0)))

        def measure(i: Value) -> None:
            v, weight = x.at(i), w.at(i)
            for g in range(group):
                difference = scales[g] * scratch.at(i * group + g) + offsets[g] - v
                errors[g].set(errors[g].get() + weight * size(difference))

        k.each(n, measure)
        for g in range(group):
            error = errors[g].get()
            better = valid[g] & (error < best.get())
            best.set(e.where(better, error, best.get()))
            scale.set(e.where(better, scales[g], scale.get()))
            offset.set(e.where(better, offsets[g], offset.get()))
            inverse.set(e.where(better, tried[g], inverse.get()))
    zero = k.real(0)
    return e.where(flat, zero, scale.get()), -offset.get(), e.where(flat, zero, inverse.get()), lowest
