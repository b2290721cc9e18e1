"""The searches of `quants.search` in vector code, one block to a lane, with the same operations in the same order.

Levels are kept as float32 (small integers, exact) wherever the reference multiplies by them. Rounding then clamping
there is clamping then rounding here: the bounds are integers, and an inverse scale that came from dividing by nothing
is replaced by 0, which gives the level 0 that the reference's rounding gives. A search returns the inverse scale that
its levels came from instead of the levels: one multiplication finds them again where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .emit import F32, Value
from .quantize_lanes import Column, Lanes
from .simd import nearest_int

__all__ = [
    "EPSILON",
    "RangeSearch",
    "absolute_peak",
    "fit_descent",
    "fit_range",
    "fit_symmetric",
    "fit_unsigned",
    "range_level",
    "symmetric_level",
]

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
    top: int,
    unsigned: bool,
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
            nearest = nearest_int(e, x * rest_ll / rest_xl)
            moved = e.min(nearest, top) if unsigned else k.clamp(nearest, -top, top - 1)
            new = moved.to_float()
            new_xl = rest_xl + wx * new
            new_ll = rest_ll + weight * new * new
            accept = (rest_xl > 0.0) & (moved != level)
            accept = accept & (new_xl * new_xl * sum_ll.get() > sum_xl.get() * sum_xl.get() * new_ll)
            accept = accept & ((rest_ll if unsigned else new_ll) > 0.0)
            changed.set(e.where(accept, k.whole(1), changed.get()))
            levels.put(i, e.where(accept, moved & 255 if unsigned else moved, level))
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
    scale = _descend(k, levels, n, terms, sums, top, unsigned=False)
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
    sums = sum_xl.get(), sum_ll.get()
    scale = _descend(k, levels, n, lambda i: (x.at(i), w.at(i)), sums, top, unsigned=True)
    k.each(n, lambda i: levels.put(i, e.where(empty, k.whole(0), levels.int_at(i))))
    return e.where(empty, k.real(0), scale)


@dataclass(frozen=True)
class RangeSearch:
    """The widths that `fit_range` tries: (first + stride * i + top) / range for i in 0..steps."""

    top: int
    first: float
    stride: float
    steps: int
    absolute: bool = False  # the error is weight * |difference|, else weight * difference**2


def range_level(k: Lanes, v: Value, top: int) -> Value:
    """v to the nearest of 0..top as int32, as the reference rounds: what is beyond 2**22 wraps."""
    return k.clamp(nearest_int(k.e, v), 0, top)


def fit_range(
    k: Lanes, xs: list[Column], ws: list[Column], n: int, search: RangeSearch, scratch: Column
) -> list[tuple[Value, Value, Value, Value]]:
    """For each column x: scale, offset >= 0, and the inverse and low end whose levels were best.

    The levels are `range_level(inverse * (x - low))`. A flat block has scale and inverse 0. Several columns are worked
    on at once because each try waits for the one before: a better one moves the low end. `scratch` holds n vectors
    for each column.
    """
    e, top, count = k.e, search.top, len(xs)
    fits = [_RangeFit(k, x, w, n, top) for x, w in zip(xs, ws, strict=True)]

    def size(difference: Value) -> Value:
        return e.abs(difference) if search.absolute else difference * difference

    def plain_errors(i: Value) -> None:
        for fit in fits:
            v = fit.x.at(i)
            level = range_level(k, fit.inverse.get() * (v - fit.low.get()), top).to_float()
            difference = fit.scale.get() * level + fit.low.get() - v
            fit.best.set(fit.best.get() + fit.w.at(i) * size(difference))

    k.each(n, plain_errors)
    with e.loop(0, search.steps + 1) as step:
        width = (e.const(F32, search.stride) * step.to_float(F32) + e.const(F32, search.first)) + float(top)
        tried = [e.where(fit.flat, k.real(0), width / fit.span()) for fit in fits]
        lows = [fit.low.get() for fit in fits]
        sums = [[e.var(k.real(0)) for _ in range(3)] for _ in fits]

        def accumulate(i: Value, exact: bool) -> None:
            for g, fit in enumerate(fits):
                v, weight = fit.x.at(i), fit.w.at(i)
                scaled = tried[g] * (v - lows[g])
                level = range_level(k, scaled, top).to_float() if exact else k.round(k.clamp(scaled, 0, top))
                scratch.put(i * count + g, level)
                wl = weight * level
                for total, term in zip(sums[g], (wl, wl * level, wl * v), strict=True):
                    total.set(total.get() + term)

        # rounding and clamping may be exchanged while no level wraps: not where the range shrank to next to nothing
        bounded = [fit.bounded(inverse) for fit, inverse in zip(fits, tried, strict=True)]
        usual = ~k.any(~bounded[0])
        for other in bounded[1:]:
            usual = usual & ~k.any(~other)
        with e.choose(usual) as (yes, no):
            with yes:
                k.each(n, lambda i: accumulate(i, False))
            with no:
                k.each(n, lambda i: accumulate(i, True))
        tries = [fit.solve(*(total.get() for total in three)) for fit, three in zip(fits, sums, strict=True)]
        errors = [e.var(k.real(0)) for _ in fits]

        def measure(i: Value) -> None:
            for g, (fit, (_, scale, low)) in enumerate(zip(fits, tries, strict=True)):
                difference = scale * scratch.at(i * count + g) + low - fit.x.at(i)
                errors[g].set(errors[g].get() + fit.w.at(i) * size(difference))

        k.each(n, measure)
        for fit, (valid, scale, low), error, inverse, start in zip(fits, tries, errors, tried, lows, strict=True):
            better = valid & (error.get() < fit.best.get())
            for variable, value in (
                (fit.best, error.get()),
                (fit.scale, scale),
                (fit.low, low),
                (fit.inverse, inverse),
                (fit.start, start),
            ):
                variable.set(e.where(better, value, variable.get()))
    return [fit.result() for fit in fits]


class _RangeFit:
    """State of one column's search."""

    def __init__(self, k: Lanes, x: Column, w: Column, n: int, top: int) -> None:
        e = k.e
        self.k, self.x, self.w = k, x, w
        low, high = e.var(x.at(0)), e.var(x.at(0))
        sum_w, sum_x = e.var(k.real(0)), e.var(k.real(0))

        def extent(i: Value) -> None:
            v, weight = x.at(i), w.at(i)
            low.set(e.where(v < low.get(), v, low.get()))
            high.set(e.where(v > high.get(), v, high.get()))
            sum_w.set(sum_w.get() + weight)
            sum_x.set(sum_x.get() + weight * v)

        k.each(n, extent)
        self.smallest = e.where(low.get() > 0.0, k.real(0), low.get())
        self.high, self.sum_w, self.sum_x = high.get(), sum_w.get(), sum_x.get()
        self.flat = self.high <= self.smallest
        exact = e.where(self.flat, k.real(0), k.real(top) / (self.high - self.smallest))
        self.low, self.start = e.var(self.smallest), e.var(self.smallest)
        self.inverse, self.scale, self.best = e.var(exact), e.var(1.0 / exact), e.var(k.real(0))

    def span(self) -> Value:
        """The width of the range from the present low end."""
        return self.high - self.low.get()

    def bounded(self, inverse: Value) -> Value:
        """Whether every inverse * (x - low) stays below 2**22 in magnitude."""
        e, low = self.k.e, self.low.get()
        above = e.abs(inverse * (self.high - low)) < 2.0**22
        return above & (e.abs(inverse * (self.smallest - low)) < 2.0**22)

    def solve(self, sum_l: Value, sum_ll: Value, sum_xl: Value) -> tuple[Value, Value, Value]:
        """Whether a try is valid, and its least-squares scale and low end."""
        e = self.k.e
        determinant = self.sum_w * sum_ll - sum_l * sum_l
        scale = (self.sum_w * sum_xl - self.sum_x * sum_l) / determinant
        low = (sum_ll * self.sum_x - sum_l * sum_xl) / determinant
        above = low > 0.0
        return determinant > 0.0, e.where(above, sum_xl / sum_ll, scale), e.where(above, self.k.real(0), low)

    def result(self) -> tuple[Value, Value, Value, Value]:
        """What `fit_range` returns of this column."""
        e, zero = self.k.e, self.k.real(0)
        scale, inverse = (e.where(self.flat, zero, v.get()) for v in (self.scale, self.inverse))
        return scale, -self.low.get(), inverse, self.start.get()
