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
    """What gives the values of rows of blocks, which are scale * entry - offset.

    Where a block has common factors, scale = unit * (base + slope * step) and offset = least * drop.

    Attributes:
        scale, offset: of every sub-block, float32 [blocks, sub-blocks].
        steps, drops: the whole numbers stored for them, as float32 [blocks, sub-blocks]; None without common factors.
        unit, least: the factors, float32 [blocks]; None without.
    """

    scale: Floats
    offset: Floats
    steps: Floats | None = None
    drops: Floats | None = None
    unit: Floats | None = None
    least: Floats | None = None


@dataclass(frozen=True)
class Stepped:
    """A format whose values are scale * entry - offset, one entry to an element.

    Attributes:
        low, top: least and largest entry, of those that follow one another.
        stored: what is added to an entry to store it.
        unit: elements that have one scale.
        read: reads the scales of blocks.
        write: puts them into blocks.
        steps: range of the whole numbers of scales; None without common factors.
        base, slope: how they become scales.
        ranged: whether there are offsets.
        table: where the entries are those of a table, by the level stored; then `low` and `top` are of levels.
    """

    low: int
    top: int
    stored: int
    unit: int
    read: Callable[[Blocks], Grid]
    write: Callable[[Blocks, Grid], None]
    steps: tuple[int, int] | None = None
    base: float = 0.0
    slope: float = 1.0
    ranged: bool = False
    table: Table | None = None

    @property
    def shared(self) -> bool:
        """Whether the scales of a block have a common factor."""
        return self.steps is not None

    def entries(self, levels: Levels) -> Floats:
        """What levels `low`..`top` stand for."""
        chosen = levels if self.table is None else self.table[levels]
        return chosen.astype(np.float32)

    def levels(self, entries: Floats) -> Levels:
        """What is stored for entries."""
        if self.table is None:
            return entries.astype(np.int32) + self.stored
        return np.searchsorted(self.table.astype(np.float32), entries).astype(np.int32)

    def nearest(self, v: Floats) -> Levels:
        """The levels whose entries are nearest to v."""
        return levels_of(v, self.low, self.top) if self.table is None else nearest_entry(v, self.table)


def _read_own(blocks: Blocks) -> Grid:
    scale = blocks["d"].astype(np.float32)[:, None]
    if "m" in (blocks.dtype.names or ()):
        return Grid(scale, -blocks["m"].astype(np.float32)[:, None])
    return Grid(scale, np.zeros_like(scale))


def _write_own(blocks: Blocks, grid: Grid) -> None:
    blocks["d"] = grid.scale[:, 0]
    if "m" in (blocks.dtype.names or ()):
        blocks["m"] = -grid.offset[:, 0]


def _read_pairs(blocks: Blocks) -> Grid:
    steps, drops = (part.astype(np.float32) for part in kquants.pairs(blocks))
    unit, least = blocks["d"].astype(np.float32), blocks["dmin"].astype(np.float32)
    return Grid(unit[:, None] * steps, least[:, None] * drops, steps, drops, unit, least)


def _write_pairs(blocks: Blocks, grid: Grid) -> None:
    assert grid.steps is not None
    assert grid.drops is not None
    steps, drops = grid.steps.astype(np.uint8), grid.drops.astype(np.uint8)
    blocks["scales"] = steps | drops << 4 if blocks.dtype == kquants.Q2_K else kquants.pack_pairs(steps, drops)
    blocks["d"], blocks["dmin"] = grid.unit, grid.least


def _signed_grid(blocks: Blocks, steps: Levels) -> Grid:
    unit, real = blocks["d"].astype(np.float32), steps.astype(np.float32)
    scale = unit[:, None] * real
    return Grid(scale, np.zeros_like(scale), real, np.zeros_like(scale), unit, np.zeros_like(unit))


def _read_signed(blocks: Blocks) -> Grid:
    return _signed_grid(blocks, kquants.signed(blocks))


def _write_q3_k(blocks: Blocks, grid: Grid) -> None:
    assert grid.steps is not None
    blocks["scales"], blocks["d"] = kquants.pack_signed((grid.steps + 32).astype(np.uint8)), grid.unit


def _write_q6_k(blocks: Blocks, grid: Grid) -> None:
    assert grid.steps is not None
    blocks["scales"], blocks["d"] = grid.steps.astype(np.int8), grid.unit


def _read_iq4_xs(blocks: Blocks) -> Grid:
    return _signed_grid(blocks, scales_iq4_xs(blocks))


def _write_iq4_xs(blocks: Blocks, grid: Grid) -> None:
    assert grid.steps is not None
    stored = (grid.steps + 32).astype(np.int32)
    blocks["scales_l"] = (stored[:, ::2] & 15) | (stored[:, 1::2] & 15) << 4
    blocks["scales_h"] = ((stored >> 4) << np.arange(0, 16, 2)).sum(axis=1)
    blocks["d"] = grid.unit


_own = partial(Stepped, unit=32, read=_read_own, write=_write_own)
_pairs = partial(Stepped, stored=0, read=_read_pairs, write=_write_pairs, ranged=True)

STEPPED: dict[GGMLType, Stepped] = {
    GGMLType.Q4_0: _own(-8, 7, 8),
    GGMLType.Q4_1: _own(0, 15, 0, ranged=True),
    GGMLType.Q5_0: _own(-16, 15, 16),
    GGMLType.Q5_1: _own(0, 31, 0, ranged=True),
    GGMLType.Q8_0: _own(-127, 127, 0),
    GGMLType.Q2_K: _pairs(0, 3, unit=16, steps=(0, 15)),
    GGMLType.Q3_K: Stepped(-4, 3, 4, 16, _read_signed, _write_q3_k, (-32, 31)),
    GGMLType.Q4_K: _pairs(0, 15, unit=32, steps=(0, 63)),
    GGMLType.Q5_K: _pairs(0, 31, unit=32, steps=(0, 63)),
    GGMLType.Q6_K: Stepped(-32, 31, 32, 16, _read_signed, _write_q6_k, (-128, 127)),
    GGMLType.IQ4_NL: _own(0, 15, 0, table=IQ4_TABLE),
    GGMLType.IQ4_XS: Stepped(0, 15, 0, 32, _read_iq4_xs, _write_iq4_xs, (-32, 31), table=IQ4_TABLE),
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
