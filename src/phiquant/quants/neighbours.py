"""Where groups of levels go that are no points of their lattice: the points nearest, among which weights decide.

A group of 8 or 4 levels has a *key*, its levels as digits of a number, the first one lowest: to base 3 where a
component of the lattice has three values (6561 keys), to base 8 where it has eight (4096).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.grids import GRIDS, codes

__all__ = ["Neighbours", "key_digits", "neighbours"]

# How many of the distinct distances from a group to points lead to candidates.
_SHELLS = {
    GGMLType.IQ2_XXS: 2,
    GGMLType.IQ2_XS: 2,
    GGMLType.IQ2_S: 1,
    GGMLType.IQ3_XXS: 2,
    GGMLType.IQ3_S: 3,
    GGMLType.IQ1_S: 3,
    GGMLType.IQ1_M: 3,
}


@dataclass(frozen=True)
class Neighbours:
    """The lattice of a format, as seen from every key.

    Attributes:
        point: int32 [keys], the point that a key is, or -1.
        start: int64 [keys + 1], where the key's candidates begin; a point has none.
        candidates: int32 [start[-1]], points by increasing distance, then number.
    """

    point: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    candidates: npt.NDArray[np.int32]


def key_digits(type: GGMLType) -> npt.NDArray[np.int32]:
    """What a level of each component counts in a key: int32 [dimension]."""
    grid = GRIDS[type]
    powers: npt.NDArray[np.int32] = len(grid.values) ** np.arange(grid.dimension, dtype=np.int32)
    return powers


@cache
def neighbours(type: GGMLType) -> Neighbours:
    """Points and candidates of a format that has a lattice.

    The candidates of a key are all points at its two (IQ2_XXS, IQ2_XS, IQ3_XXS), one (IQ2_S) or three (IQ3_S, IQ1)
    smallest distances, each distance counted once.
    """
    base, digits = len(GRIDS[type].values), key_digits(type)
    levels = np.arange(base ** len(digits), dtype=np.int32)[:, None] // digits % base
    places = codes(type).astype(np.int32)
    point = np.full(len(levels), -1, np.int32)
    point[places @ digits] = np.arange(len(places), dtype=np.int32)
    rows, found = [], []
    for first in range(0, len(levels), 1024):
        part = levels[first : first + 1024]
        distance = (part * part).sum(axis=1)[:, None] + (places * places).sum(axis=1) - 2 * (part @ places.T)
        present = np.zeros((len(part), int(distance.max()) + 1), bool)
        np.put_along_axis(present, distance, True, axis=1)
        rank = np.cumsum(present, axis=1)
        near = np.take_along_axis(rank, distance, axis=1) <= _SHELLS[type]
        near &= point[first : first + len(part), None] < 0
        row, column = np.nonzero(near)
        order = np.lexsort((column, distance[row, column], row))
        rows.append(row[order] + first)
        found.append(column[order].astype(np.int32))
    counts = np.bincount(np.concatenate(rows), minlength=len(levels))
    made = Neighbours(point, np.concatenate([[0], np.cumsum(counts)]), np.concatenate(found))
    for array in (made.point, made.start, made.candidates):
        array.setflags(write=False)
    return made
