"""Rounding with error feedback inside the grids of the block formats, in NumPy: the definition of the compiled sweep.

With the moments H = unit diag(variances) unit^T of a matrix's inputs, unit upper triangular with ones on its diagonal,
the error e H e^T of a row e = w - v (v: what is stored) is the sum over the columns k of

    variances[k] * (t[k] - v[k])**2,    t[k] = w[k] + sum over j < k of e[j] * unit[j, k]

so rounding t[k] to the nearest level, column after column, makes every term as small as those before it allow
(arXiv 2210.17323; in this form arXiv 2307.13304).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants import kquants
from phiquant.quants.block import Blocks, Floats, Levels
from phiquant.quants.iquants import IQ4_TABLE, scales_iq4_xs
from phiquant.quants.nonlinear import nearest_entry
from phiquant.quants.search import levels_of

__all__ = ["STEPPED", "Grid", "Stepped", "round_columns"]

Table = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Grid:
    """Scale and offset of every sub-block, float32 [blocks, sub-blocks]: values are scale * entry - offset."""

    scale: Floats
    offset: Floats


@dataclass(frozen=True)
class Stepped:
    """A format whose values are scale * entry - offset, one entry to an element.

    Attributes:
        low, top: least and largest entry, of those that follow one another.
        stored: what is added to an entry to store it.
        unit: elements that have one scale.
        table: where the entries are those of a table, by the level stored; then `low` and `top` are of levels.
        grid: reads scales and offsets out of blocks.
    """

    low: int
    top: int
    stored: int
    unit: int
    grid: Callable[[Blocks], Grid]
    table: Table | None = None

    def entries(self, levels: Levels) -> Floats:
        """What levels `low`..`top` stand for."""
        chosen = levels if self.table is None else self.table[levels]
        return chosen.astype(np.float32)

    def nearest(self, v: Floats) -> Levels:
        """The levels whose entries are nearest to v."""
        return levels_of(v, self.low, self.top) if self.table is None else nearest_entry(v, self.table)


def _one_scale(blocks: Blocks, parts: int) -> Grid:
    scale = np.repeat(blocks["d"].astype(np.float32)[:, None], parts, axis=1)
    offset = np.repeat(-blocks["m"].astype(np.float32)[:, None], parts, axis=1) if "m" in _fields(blocks) else None
    return Grid(scale, np.zeros_like(scale) if offset is None else offset)


def _fields(blocks: Blocks) -> tuple[str, ...]:
    return blocks.dtype.names or ()


def _pairs(blocks: Blocks) -> Grid:
    return Grid(*kquants.units(blocks))


def _signed(blocks: Blocks) -> Grid:
    scale = blocks["d"].astype(np.float32)[:, None] * kquants.signed(blocks).astype(np.float32)
    return Grid(scale, np.zeros_like(scale))


def _iq4_xs(blocks: Blocks) -> Grid:
    scale = blocks["d"].astype(np.float32)[:, None] * scales_iq4_xs(blocks).astype(np.float32)
    return Grid(scale, np.zeros_like(scale))


_whole = partial(_one_scale, parts=1)

STEPPED: dict[GGMLType, Stepped] = {
    GGMLType.Q4_0: Stepped(-8, 7, 8, 32, _whole),
    GGMLType.Q4_1: Stepped(0, 15, 0, 32, _whole),
    GGMLType.Q5_0: Stepped(-16, 15, 16, 32, _whole),
    GGMLType.Q5_1: Stepped(0, 31, 0, 32, _whole),
    GGMLType.Q8_0: Stepped(-127, 127, 0, 32, _whole),
    GGMLType.Q2_K: Stepped(0, 3, 0, 16, _pairs),
    GGMLType.Q3_K: Stepped(-4, 3, 4, 16, _signed),
    GGMLType.Q4_K: Stepped(0, 15, 0, 32, _pairs),
    GGMLType.Q5_K: Stepped(0, 31, 0, 32, _pairs),
    GGMLType.Q6_K: Stepped(-32, 31, 32, 16, _signed),
    GGMLType.IQ4_NL: Stepped(0, 15, 0, 32, _whole, IQ4_TABLE),
    GGMLType.IQ4_XS: Stepped(0, 15, 0, 32, _iq4_xs, IQ4_TABLE),
}
"""Formats that are rounded column by column."""


def round_columns(targets: Floats, unit: Floats, grid: Grid, how: Stepped, weights: Floats) -> tuple[Levels, Floats]:
    """Round some columns one after the other, feeding each one's error into those that follow.

    Args:
        targets: float32 [rows, columns], the weights plus what earlier columns left over.
        unit: float32 [columns, columns], unit upper triangular.
        grid: of every row, [rows, sub-blocks of these columns].
        how: the format.
        weights: float32 [rows, columns], the original weights, against which errors count.

    Returns:
        levels int32 [rows, columns] (add `how.stored` to store them), and errors weights - values.
    """
    rows, columns = targets.shape
    times = columns // grid.scale.shape[1]
    levels, errors = np.empty((rows, columns), np.int32), np.empty((rows, columns), np.float32)
    left = targets.copy()
    for k in range(columns):
        scale, offset = grid.scale[:, k // times], grid.offset[:, k // times]
        with np.errstate(all="ignore"):
            v = np.where(scale != 0, (left[:, k] + offset) / scale, np.float32(0))
        levels[:, k] = how.nearest(v)
        errors[:, k] = weights[:, k] - (scale * how.entries(levels[:, k]) - offset)
        left[:, k + 1 :] += errors[:, k, None] * unit[k, None, k + 1 :]
    return levels, errors
