"""The searches for scales and levels that the quantizers share, vectorised across blocks.

Every array is [elements of a block, blocks]: one column is one block. All arithmetic is float32, and sums run over the
elements in order, so that a column comes out the same whatever stands beside it, and the same as in llama.cpp, whose
searches these are. `inf` and `nan` arise where a block is all zero or nearly so and are masked; callers hold
`np.errstate(all="ignore")`.
"""

import numpy as np

from phiquant.quants.block import Floats, Levels

__all__ = [
    "EPSILON",
    "descend",
    "fit_descent",
    "fit_range",
    "fit_symmetric",
    "fit_unsigned",
    "largest",
    "levels_of",
    "nearest",
    "ordered_sum",
    "reciprocal",
    "round_away",
    "signed_peak",
    "smallest",
]

EPSILON = np.float32(1e-15)  # blocks whose largest magnitude is below are zero
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the rounded integer in the mantissa


def nearest(v: Floats) -> Levels:
    """Round half to even; exact below 2**22, and zero for what stems from dividing by nothing."""
    mantissa = (v + _MAGIC).view(np.int32) & 0x7FFFFF
    rounded: Levels = mantissa - 0x400000
    return rounded


def reciprocal(d: Floats) -> Floats:
    """1 / d, or 0 where d is 0."""
    inverse: Floats = np.where(d != 0, np.float32(1) / d, np.float32(0))
    return inverse


def round_away(v: Floats) -> Floats:
    """Round half away from zero, still float32."""
    whole = np.trunc(v)  # what is left of the truncated value is exact
    rounded: Floats = whole + np.copysign((np.abs(v - whole) >= np.float32(0.5)).astype(np.float32), v)
    return rounded


def levels_of(v: Floats, low: int, high: int) -> Levels:
    """`nearest`, clamped to low..high."""
    clamped: Levels = np.clip(nearest(v), low, high)
    return clamped


def ordered_sum(terms: Floats) -> Floats:
    """Sum of terms [elements, ...] in the order of the elements."""
    total: Floats = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total = total + term
    return total


def signed_peak(x: Floats) -> Floats:
    """The first value of largest magnitude of each column, with its sign; a zero is positive."""
    at = np.abs(x).argmax(axis=0)
    peak: Floats = np.take_along_axis(x, at[None], axis=0)[0]
    return np.where(peak != 0, peak, np.float32(0))


def smallest(x: Floats) -> Floats:
    """The first of the smallest values of each column (of two zeros the first, whatever its sign)."""
    low: Floats = np.take_along_axis(x, x.argmin(axis=0)[None], axis=0)[0]
    return low


def largest(x: Floats) -> Floats:
    """The first of the largest values of each column."""
    high: Floats = np.take_along_axis(x, x.argmax(axis=0)[None], axis=0)[0]
    return high


def fit_symmetric(x: Floats, top: int, weights: Floats | None = None) -> tuple[Floats, Levels]:
    """Scale and levels, biased by `top`, that minimise the sum of w (x - scale * (level - top))**2.

    19 scales around the one that maps the peak to -top are tried; without weights they are x**2.
    """
    peak = signed_peak(x)
    empty = np.abs(peak) < EPSILON
    w = x * x if weights is None else weights
    wx = w * x
    scale = best = np.zeros(x.shape[1], np.float32)
    levels = np.zeros(x.shape, np.int32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(top) + np.float32(0.1) * np.float32(step)) / peak
        tried = levels_of(inverse * x, -top, top - 1)
        t = tried.astype(np.float32)
        sum_xl = ordered_sum(wx * t)
        sum_ll = ordered_sum(w * t * t)
        ratio = np.where(sum_ll != 0, sum_xl / sum_ll, np.float32(0))
        better = np.full(x.shape[1], True) if step == 0 else (sum_ll > 0) & (sum_xl * sum_xl > best * sum_ll)
        scale = np.where(better, ratio, scale)
        best = np.where(better, ratio * sum_xl, best)
        levels = np.where(better, tried + top, levels)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, levels)


def descend(
    x: Floats, levels: Levels, w: Floats, sum_xl: Floats, sum_ll: Floats, low: int, high: int, unsigned: bool
) -> tuple[Floats, Levels]:
    """At most five sweeps that move one level at a time to where the weighted correlation with x is larger.

    Levels that are `unsigned` are bytes, in which a negative one wraps, and one is moved only while the others are not
    all zero. Returns scale and levels.
    """
    levels = levels.copy()
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            wx = w[i] * x[i]
            old = levels[i].astype(np.float32)
            rest_xl = sum_xl - wx * old
            rest_ll = sum_ll - w[i] * old * old
            moved = levels_of(x[i] * rest_ll / rest_xl, low, high)
            new = moved.astype(np.float32)
            new_xl = rest_xl + wx * new
            new_ll = rest_ll + w[i] * new * new
            accept = (rest_xl > 0) & (moved != levels[i]) & (new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll)
            accept &= (rest_ll > 0) if unsigned else (new_ll > 0)
            changed |= bool(accept.any())
            levels[i] = np.where(accept, moved & 0xFF if unsigned else moved, levels[i])
            sum_xl = np.where(accept, new_xl, sum_xl)
            sum_ll = np.where(accept, new_ll, sum_ll)
        if not changed:  # a block that is done stays as it is in further sweeps
            break
    return np.where(sum_ll > 0, sum_xl / sum_ll, np.float32(0)), levels


def fit_descent(x: Floats, top: int) -> tuple[Floats, Levels]:
    """As `fit_symmetric` with weights x**2, but by coordinate descent from the first scale. Levels biased by `top`."""
    peak = signed_peak(x)
    empty = np.abs(peak) < EPSILON
    w = x * x
    levels = levels_of(np.float32(-top) / peak * x, -top, top - 1)
    t = levels.astype(np.float32)
    scale, levels = descend(x, levels, w, ordered_sum(w * x * t), ordered_sum(w * t * t), -top, top - 1, False)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, levels + top)


def fit_unsigned(x: Floats, top: int, weights: Floats) -> tuple[Floats, Levels]:
    """Scale and levels 0..top for values that are not negative: nine first scales, the best one refined by descent."""
    peak = x.max(axis=0)
    empty = peak < EPSILON
    inverse = np.float32(top) / peak
    best: Floats | None = None
    for step in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        tried = (np.float32(0.1) * np.float32(step) + np.float32(top)) / peak
        levels = nearest(tried * x)
        if step:
            levels = np.minimum(levels, top)
        else:
            levels = levels & 0xFF
        difference = x - np.float32(1) / tried * levels.astype(np.float32)
        error = ordered_sum(weights * difference * difference)
        if best is None:
            best = error
        else:
            better = error < best
            best = np.where(better, error, best)
            inverse = np.where(better, tried, inverse)
    levels = np.minimum(nearest(inverse * x), top)
    t = levels.astype(np.float32)
    sums = ordered_sum(weights * x * t), ordered_sum(weights * t * t)
    scale, levels = descend(x, levels & 0xFF, weights, *sums, -0x400000, top, True)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, levels & 0xFF)


def fit_range(
    x: Floats, top: int, weights: Floats, first: float, stride: float, steps: int, absolute: bool = False
) -> tuple[Floats, Floats, Levels]:
    """Scale, offset >= 0 and levels 0..top with scale * level - offset near x; `steps` + 1 widths of the range tried.

    The error is the sum of w |difference| if `absolute`, else of w difference**2. A try that is better moves the lower
    end of the range to its own offset, from where the later tries start.
    """
    low = smallest(x)
    low = np.where(low > 0, np.float32(0), low)
    high = largest(x)
    flat = high <= low
    sum_w, sum_x = weights[0], weights[0] * x[0]
    for w, v in zip(weights[1:], x[1:], strict=True):
        sum_w = sum_w + w
        sum_x = sum_x + w * v

    def error_of(scale: Floats, offset: Floats, t: Floats) -> Floats:
        difference = scale * t + offset - x
        return ordered_sum(weights * (np.abs(difference) if absolute else difference * difference))

    inverse = np.float32(top) / (high - low)
    scale = np.float32(1) / inverse
    levels = levels_of(inverse * (x - low), 0, top)
    best = error_of(scale, low, levels.astype(np.float32))
    for step in range(steps + 1):
        inverse = (np.float32(first) + np.float32(stride) * np.float32(step) + np.float32(top)) / (high - low)
        tried = levels_of(inverse * (x - low), 0, top)
        t = tried.astype(np.float32)
        wt = weights * t
        sum_l, sum_ll, sum_xl = ordered_sum(wt), ordered_sum(wt * t), ordered_sum(wt * x)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale = np.where(above, sum_xl / sum_ll, new_scale)
        new_low = np.where(above, np.float32(0), new_low)
        error = error_of(new_scale, new_low, t)
        better = (determinant > 0) & (error < best)
        best = np.where(better, error, best)
        scale = np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)
        levels = np.where(better, tried, levels)
    return np.where(flat, np.float32(0), scale), -low, np.where(flat, 0, levels)
