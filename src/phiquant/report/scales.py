"""Axes: from figures to places on a drawing, and the ticks between."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Scale", "linear", "logarithmic", "short"]


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, evenly or by the logarithm; `ticks` with their labels lie between."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Where a value is, 0 to 1; what lies outside is at the end."""
        if self.log:
            place = (math.log10(max(value, self.low)) - math.log10(self.low)) / math.log10(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)


def linear(values: Iterable[float], *, zero: bool = False, room: float = 0.05) -> Scale:
    """An even axis for values, with a little room; with `zero` it begins there."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    width = (high - low) or abs(high) or 1.0
    low, high = (0.0 if zero else low - room * width), high + room * width
    step = _step((high - low) / 6)
    first = math.ceil(low / step - 1e-9)
    ticks = []
    while first * step <= high * (1 + 1e-12):
        ticks.append((first * step, short(first * step)))
        first += 1
    return Scale(low, high, False, tuple(ticks))


def logarithmic(values: Iterable[float]) -> Scale:
    """A logarithmic axis for the values above zero, with ticks at 1, 2 and 5 of few decades and at 1 of many."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(known) / 1.3, max(known) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    of: Sequence[int] = (1, 2, 5) if len(decades) < 5 else (1,)
    ticks = [(digit * 10.0**decade, short(digit * 10.0**decade)) for decade in decades for digit in of]
    return Scale(low, high, True, tuple(tick for tick in ticks if low <= tick[0] <= high))


def short(value: float) -> str:
    """A figure in few characters: 0.00012 as 1.2e-4."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
