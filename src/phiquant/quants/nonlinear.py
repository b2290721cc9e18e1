"""Quantizers of the formats whose levels stand for the entries of a table, IQ4_NL and IQ4_XS.

Arrays are [elements, blocks] as in `quants.search`, and so are the rules of the arithmetic.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Floats, Levels, Plane, join
from phiquant.quants.search import EPSILON, levels_of, ordered_sum, reciprocal, signed_peak

__all__ = ["fit_table", "middles", "nearest_entry", "write_nonlinear"]

Table = npt.NDArray[np.int8]


@cache
def _middles(table: bytes) -> Floats:
    values = np.frombuffer(table, np.int8).astype(np.float32)
    result: Floats = (values[1:] + values[:-1]) / np.float32(2)
    result.setflags(write=False)
    return result


def middles(table: Table) -> Floats:
    """Where one entry of an ascending table begins to be nearer than the one below."""
    return _middles(table.tobytes())


def nearest_entry(v: Floats, table: Table) -> Levels:
    """The index of the entry nearest to v; of two as near the upper one, and the last one for NaN."""
    index: Levels = np.searchsorted(middles(table), v, side="right").astype(np.int32)
    return index


def fit_table(x: Floats, weights: Floats, table: Table) -> Floats:
    """The scale [blocks] that minimises the sum of w (x - scale * entry)**2, of 16 tried around the peak.

    The first maps the peak to 127, the others to -134..-120; the scale for given entries is the least-squares one.
    """
    peak = signed_peak(x)
    values = table.astype(np.float32)
    scale = best = np.zeros(x.shape[1], np.float32)
    for step in (None, *range(-7, 8)):
        if step is None:
            inverse = np.float32(1) / (peak / np.float32(127))
        else:
            inverse = np.float32(step - 127) / peak
        entry = values[nearest_entry(inverse * x, table)]
        weighted = weights * entry
        sum_xq = ordered_sum(weighted * x)
        sum_qq = ordered_sum(weighted * entry)
        ratio = np.where(sum_qq > 0, sum_xq / sum_qq, np.float32(0))
        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq) | (step is None)
        scale = np.where(better, ratio, scale)
        best = np.where(better, ratio * sum_xq, best)
    return np.where(np.abs(peak) < EPSILON, np.float32(0), scale)


def write_nonlinear(
    type: GGMLType,
    dtype: np.dtype[np.void],
    planes: tuple[Plane, ...],
    table: Table,
    x: Floats,
    importance: Floats | None,
) -> Blocks:
    """Rows [rows, columns] as blocks of IQ4_NL or IQ4_XS.

    With an importance an element weighs importance * sqrt(2 * mean square of the block + x**2), without it x**2.
    """
    n = type.block_elements
    columns = np.ascontiguousarray(x.reshape(-1, n).T)
    squares = columns * columns
    weights = squares
    if importance is not None:
        given = np.broadcast_to(importance, x.shape).reshape(-1, n).T
        weights = given * np.sqrt(ordered_sum(squares) * np.float32(2 / n) + squares)
    parts = n // 32
    scales = np.stack(
        [fit_table(part, w, table) for part, w in zip(np.split(columns, parts), np.split(weights, parts), strict=True)]
    )
    blocks = np.zeros(columns.shape[1], dtype)
    if parts == 1:
        units = scales
        blocks["d"] = scales[0]
    else:
        d = -signed_peak(scales) / np.float32(32)
        blocks["d"] = d
        integers = levels_of(reciprocal(d) * scales, -32, 31)
        units = d * integers.astype(np.float32)
        stored = (integers + 32).T
        blocks["scales_l"] = (stored[:, ::2] & 15) | (stored[:, 1::2] & 15) << 4
        blocks["scales_h"] = ((stored >> 4) << np.arange(0, 16, 2)).sum(axis=1)
    levels = nearest_entry(np.repeat(reciprocal(units), 32, axis=0) * columns, table)
    join(blocks, planes, levels.T)
    return blocks.reshape(len(x), -1)
