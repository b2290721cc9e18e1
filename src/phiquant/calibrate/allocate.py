"""One choice for each of many items, so that the costs add up to the least possible within a budget of bytes.

This is the multiple-choice knapsack problem. It is solved by dynamic programming over bytes, in units of the greatest
common divisor of what the choices weigh: then the solution is the best there is. The weights of large models have large
common divisors. Where there would be too many units all the same, coarser ones are taken, weights are rounded up, and
what that leaves of the budget is filled with the best single changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "allocate"]

_CELLS: Final = 1 << 25  # items times units: one byte of each is kept


@dataclass(frozen=True)
class Choice:
    """What an item may be: so many bytes, at such a cost (finite, of any scale that adds up)."""

    bytes: int
    cost: float


def allocate(items: Sequence[Sequence[Choice]], budget: int, *, cells: int = _CELLS) -> list[int]:
    """The index of the choice of each item: the least sum of costs with at most `budget` bytes; of equal costs one.

    `cells` bounds memory (bytes) and time; the result is exact unless it would be exceeded. ValueError if an item has
    no choice, or if even the smallest choices do not fit.
    """
    if not all(items):
        raise ValueError("an item without a choice")
    least = [min(choice.bytes for choice in item) for item in items]
    room = budget - sum(least)
    if room < 0:
        raise ValueError(f"{sum(least)} bytes at least, and the budget is {budget}")
    useful = [_undominated(item) for item in items]
    more = [[item[i].bytes - base for i in kept] for item, kept, base in zip(items, useful, least, strict=True)]
    room = min(room, sum(max(extra) for extra in more))
    unit = max(math.gcd(*(extra for extras in more for extra in extras)), 1)
    units = room // unit
    if units * len(items) > cells:
        unit = math.ceil(room / max(cells // len(items), 1))
        units = room // unit
    costs = [[items[n][i].cost for i in kept] for n, kept in enumerate(useful)]
    chosen = [kept[i] for kept, i in zip(useful, _best(more, costs, unit, units), strict=True)]
    return _filled(items, chosen, budget)


def _undominated(item: Sequence[Choice]) -> list[int]:
    """Indices of the choices that nothing as small is cheaper than, from the smallest."""
    kept: list[int] = []
    for i in sorted(range(len(item)), key=lambda i: (item[i].bytes, item[i].cost)):
        if not kept or item[i].cost < item[kept[-1]].cost:
            kept.append(i)
    return kept


def _best(more: list[list[int]], costs: list[list[float]], unit: int, units: int) -> list[int]:
    """Dynamic programming: best[u] is the least cost of the items so far within u units."""
    best = np.zeros(units + 1)
    picks: list[NDArray[np.uint8]] = []
    for extras, prices in zip(more, costs, strict=True):
        found, pick = np.full(units + 1, np.inf), np.zeros(units + 1, np.uint8)
        for index, (extra, price) in enumerate(zip(extras, prices, strict=True)):
            taken = -(-extra // unit)
            if taken > units:
                continue
            candidate = best[: units + 1 - taken] + price
            better = candidate < found[taken:]
            found[taken:][better] = candidate[better]
            pick[taken:][better] = index
        best = found
        picks.append(pick)
    chosen, left = [0] * len(more), units
    for n in reversed(range(len(more))):
        chosen[n] = int(picks[n][left])
        left -= -(-more[n][chosen[n]] // unit)
    return chosen


def _filled(items: Sequence[Sequence[Choice]], chosen: list[int], budget: int) -> list[int]:
    """With the best changes of one item that still fit, one after another."""
    chosen = list(chosen)
    while True:
        left = budget - sum(item[i].bytes for item, i in zip(items, chosen, strict=True))
        gains = [
            (item[now].cost - choice.cost, n, i)
            for n, (item, now) in enumerate(zip(items, chosen, strict=True))
            for i, choice in enumerate(item)
            if choice.cost < item[now].cost and choice.bytes - item[now].bytes <= left
        ]
        if not gains:
            return chosen
        _, n, i = max(gains)
        chosen[n] = i
