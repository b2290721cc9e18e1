"""Quantizing to the formats whose groups of weights are points of a lattice: IQ2_XXS to IQ3_S.

For every sub-block some scales are tried. Magnitudes are rounded to odd levels (2 l + 1), groups that are no point of
the lattice take the candidate of least weighted distance, and the try whose least-squares scale explains most wins.
Columns as in `search`: [elements of a sub-block, sub-blocks], sums in the order of the elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants import iquants
from phiquant.quants.block import Blocks, Bytes, Floats, Levels, Write
from phiquant.quants.grids import GRIDS, codes
from phiquant.quants.neighbours import key_digits, neighbours
from phiquant.quants.search import fit_unsigned, levels_of, ordered_sum

__all__ = ["LATTICES", "QUANTIZERS", "Lattice"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Lattice:
    """What tells the formats apart.

    Attributes:
        unit: weights of a sub-block.
        spread: mean squares of the super-block that are added to the square of a weight.
        tries: the scales tried map the peak to each of `top + stride * i`, i in -tries..tries.
        again: which groups are rounded once more, with the best scale: "all", "off" (those that were not points), or
            "any" (all of them if one was not a point).
        parity: an even number of weights of every 8 is negative.
        epsilon: a sub-block without a magnitude of at least this is zero.
        factor: of the stored scale of the super-block.
        cleared: a super-block whose scale is zero has neither points nor signs.
    """

    type: GGMLType
    unit: int
    spread: int
    tries: int
    again: str
    parity: bool
    epsilon: float
    factor: float
    cleared: bool

    @property
    def top(self) -> int:
        """The largest odd level."""
        return 2 * len(GRIDS[self.type].values) - 1

    @property
    def stride(self) -> float:
        """Between two tries."""
        return 0.1 if self.top == 5 else 0.2


LATTICES: dict[GGMLType, Lattice] = {
    lattice.type: lattice
    for lattice in (
        Lattice(GGMLType.IQ2_XXS, 32, 1, 6, "all", True, 1e-15, 1.0, True),
        Lattice(GGMLType.IQ2_XS, 16, 1, 9, "off", True, 1e-15, 1.0, True),
        Lattice(GGMLType.IQ2_S, 16, 2, 9, "off", False, 1e-8, 0.9875, False),
        Lattice(GGMLType.IQ3_XXS, 32, 2, 15, "off", True, 1e-8, 1.0125, True),
        Lattice(GGMLType.IQ3_S, 32, 2, 9, "any", False, 0.0, 1.033, False),
    )
}

_LAYOUTS = {
    GGMLType.IQ2_XXS: iquants.IQ2_XXS,
    GGMLType.IQ2_XS: iquants.IQ2_XS,
    GGMLType.IQ2_S: iquants.IQ2_S,
    GGMLType.IQ3_XXS: iquants.IQ3_XXS,
    GGMLType.IQ3_S: iquants.IQ3_S,
}


def _weights(lattice: Lattice, x: Floats, importance: Floats | None) -> Floats:
    """Weights [n, 256] of super-blocks x [n, 256], from the importance of every weight."""
    squares = x * x
    total = ordered_sum(squares.T)[:, None]
    mean = np.float32(lattice.spread) * total / np.float32(256)
    if importance is not None:
        given: Floats = importance * np.sqrt(mean + squares)
        return given
    if lattice.type is GGMLType.IQ2_S:
        return np.float32(0.25) * mean + squares
    return squares


def _magnitudes(x: Floats, w: Floats, parity: bool) -> tuple[Floats, Mask]:
    """Magnitudes and signs; with parity, in eights of odd signs the least weighty one is turned (and is negative)."""
    negative = ~(x >= 0)
    if parity:
        eights = (-1, 8, x.shape[1])
        least = (w * x * x).reshape(eights).argmin(axis=1)
        odd = np.bitwise_xor.reduce(negative.reshape(eights), axis=1)
        turned = (np.arange(8)[None, :, None] == least[:, None]) & odd[:, None]
        negative = negative ^ turned.reshape(x.shape)
    return np.where(negative, -x, x), negative


def _to_points(type: GGMLType, levels: Levels, x: Floats, root: Floats, scale: Floats) -> tuple[Levels, Levels, Mask]:
    """Levels [elements, n] moved to points: the levels, the points [groups, n], and which were points before.

    A group that is none takes the candidate of least sum of root * (scale * (2 l + 1) - x)**2, the first of equals.
    """
    near, dimension = neighbours(type), GRIDS[type].dimension
    shape = (-1, dimension, levels.shape[1])
    grouped = levels.reshape(shape).copy()
    key = (grouped * key_digits(type)[:, None]).sum(axis=1)
    point = near.point[key]
    on = point >= 0
    group, column = np.nonzero(~on)
    if len(group):
        start, count = near.start[key[group, column]], np.diff(near.start)[key[group, column]]
        first = np.concatenate([[0], np.cumsum(count)[:-1]])
        candidates = near.candidates[np.repeat(start - first, count) + np.arange(count.sum())]
        odd = (2 * codes(type)[candidates] + 1).astype(np.float32)
        values, weights = x.reshape(shape)[group, :, column], root.reshape(shape)[group, :, column]
        distance = np.zeros(len(candidates), np.float32)
        for i in range(dimension):
            difference = np.repeat(scale[column], count) * odd[:, i] - np.repeat(values[:, i], count)
            distance = distance + np.repeat(weights[:, i], count) * difference * difference
        equal = np.flatnonzero(distance == np.repeat(np.minimum.reduceat(distance, first), count))
        equal = np.concatenate([equal, [len(candidates)]])  # so that values which are not finite find something
        best = candidates[np.minimum(equal[np.searchsorted(equal, first)], first + count - 1)]
        point[group, column] = best
        grouped[group, :, column] = codes(type)[best]
    return grouped.reshape(levels.shape), point, on


def _sums(levels: Levels, x: Floats, w: Floats) -> tuple[Floats, Floats]:
    odd = (2 * levels + 1).astype(np.float32)
    return ordered_sum(w * x * odd), ordered_sum(w * odd * odd)


def _fit(lattice: Lattice, x: Floats, w: Floats) -> tuple[Floats, Levels, Mask]:
    """Scale, which may be negative, and points of sub-blocks of magnitudes x; and which sub-blocks are zero."""
    type, dimension, top = lattice.type, GRIDS[lattice.type].dimension, np.float32(lattice.top)
    root, peak = np.sqrt(w), x.max(axis=0)
    empty = ~(peak >= np.float32(lattice.epsilon)) | (peak == 0)
    if type is GGMLType.IQ2_XXS:
        scale, _ = fit_unsigned(x, 4, w)
        peak = scale * np.float32(3)
        empty |= peak <= 0
    else:
        scale = peak / top
    levels, best = np.zeros(x.shape, np.int32), np.zeros(x.shape[1], np.float32)
    on = np.full((len(x) // dimension, x.shape[1]), lattice.again != "any")

    def rounded(inverse: Floats) -> Levels:
        return levels_of(np.float32(0.5) * (inverse * x - np.float32(1)), 0, (lattice.top - 1) // 2)

    for step in range(-lattice.tries, lattice.tries + 1):
        inverse = (top + np.float32(step) * np.float32(lattice.stride)) / peak
        tried, _, met = _to_points(type, rounded(inverse), x, root, np.float32(1) / inverse)
        sum_xl, sum_ll = _sums(tried, x, w)
        better = (sum_ll > 0) & (sum_xl * sum_xl > best * sum_ll)
        ratio = sum_xl / sum_ll
        scale = np.where(better, ratio, scale)
        best = np.where(better, ratio * sum_xl, best)
        levels = np.where(better, tried, levels)
        on = np.where(better, met, on)
    again = ~on if lattice.again == "off" else np.broadcast_to((~on).any(axis=0) | (lattice.again == "all"), on.shape)
    again = again & (scale > 0)
    moved, _, _ = _to_points(type, rounded(np.float32(1) / scale), x, root, scale)
    levels = np.where(np.repeat(again, dimension, axis=0), moved, levels)
    sum_xl, sum_ll = _sums(levels, x, w)
    scale = np.where(again.any(axis=0) & (sum_ll > 0), sum_xl / sum_ll, scale)
    _, point, _ = _to_points(type, levels, x, root, scale)
    return np.where(empty, np.float32(0), scale), np.where(empty, 0, point), empty


def _write(type: GGMLType, x: Floats, importance: Floats | None) -> Blocks:
    """Blocks [rows, columns / 256] of values x [rows, columns], for an importance [columns] if there is one."""
    lattice, dtype = LATTICES[type], _LAYOUTS[type]
    blocks = x.reshape(-1, 256)
    given = None if importance is None else np.broadcast_to(importance, x.shape).reshape(-1, 256)
    w = _weights(lattice, blocks, given).reshape(-1, lattice.unit).T
    magnitudes, negative = _magnitudes(blocks.reshape(-1, lattice.unit).T, w, lattice.parity)
    scale, point, empty = _fit(lattice, magnitudes, w)
    bits = np.packbits(negative ^ (scale < 0), axis=0, bitorder="little")
    bits = np.where(empty, 0, bits & 127 if lattice.parity else bits).astype(np.uint8)
    scales = np.abs(scale).reshape(len(blocks), -1)
    peak = scales.max(axis=1, keepdims=True)
    d = peak / np.float32(31)
    steps = levels_of(np.float32(0.5) * (np.float32(1) / d * scales - np.float32(1)), 0, 15)
    out = np.zeros(len(blocks), dtype)
    out["d"] = (d * np.float32(lattice.factor))[:, 0]
    _store(out, type, point.T.reshape(len(blocks), -1), bits.T.reshape(len(blocks), -1), np.where(peak > 0, steps, 0))
    if lattice.cleared:
        out[peak[:, 0] == 0] = np.zeros((), dtype)
    return out.reshape(len(x), -1)


def _store(out: Blocks, type: GGMLType, point: Levels, signs: Bytes, steps: Levels) -> None:
    """Points [n, 32 or 64], eights of signs [n, 32] and scales of four bits [n, 16 or 8] into their fields."""
    low = point.astype(np.uint8)
    if type in (GGMLType.IQ2_XXS, GGMLType.IQ3_XXS):
        coded = (signs.reshape(-1, 8, 4).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)).sum(
            axis=2, dtype=np.uint32
        )
        coded |= steps.astype(np.uint32) << 28
        if type is GGMLType.IQ3_XXS:
            out["qs"], out["signs"] = low, coded
        else:
            out["qs"][..., 0], out["qs"][..., 1] = low.view("<u4"), coded
        return
    out["scales"] = (steps[:, 0::2] | steps[:, 1::2] << 4).astype(np.uint8)
    if type is GGMLType.IQ2_XS:
        out["qs"] = point.astype(np.uint16) | signs.astype(np.uint16) << 9
        return
    width = 2 if type is GGMLType.IQ2_S else 1
    high = (point >> 8).reshape(len(out), 8, 8 // width) << np.arange(0, 8, width)
    out["qs"], out["signs"], out["qh"] = low, signs, high.sum(axis=2).astype(np.uint8)


QUANTIZERS: Mapping[GGMLType, Write] = {type: partial(_write, type) for type in LATTICES}
"""What writes each of the formats."""
