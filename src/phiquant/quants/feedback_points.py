"""The lattice formats as error feedback sees them: scales that can be fitted, and points for groups of 8 or 4 columns.

Entries are the points' components with their signs (of IQ1: with their shifts), so that values are scale * entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Floats, Levels
from phiquant.quants.feedback import Grid
from phiquant.quants.grids import GRIDS, codes
from phiquant.quants.iquants import d_iq1_m

__all__ = ["POINTED", "Pointed"]


@dataclass(frozen=True)
class Pointed:
    """A format whose values are scale * entry, the entries of a group together a point.

    Attributes:
        type: whose lattice it is.
        unit, steps, base, slope: of its scales, as in `quants.feedback.Stepped`.
        signs: "free", "even" (an even number of every 8 is negative), or of IQ1 "shift" (what is added to all
            components is one number for a sub-block, kept as `drops`) and "shifts" (one for every 8).
        read, write: as in `Stepped`; what is written are the entries [blocks, 256], too.
    """

    type: GGMLType
    unit: int
    steps: tuple[int, int]
    base: float
    slope: float
    signs: str
    read: Callable[[Blocks], Grid]
    write: Callable[[Blocks, Grid, Floats], None]
    ranged: bool = False
    shared: bool = True

    @property
    def shifted(self) -> bool:
        """Whether components have signs of their own and a shift."""
        return self.signs.startswith("shift")

    @property
    def values(self) -> tuple[int, ...]:
        """What the codes of a component stand for."""
        return GRIDS[self.type].values


@cache
def _numbers(type: GGMLType) -> npt.NDArray[np.int16]:
    """Number of the point by its codes, joined."""
    grid = GRIDS[type]
    found = np.full(1 << grid.bits * grid.dimension, -1, np.int16)
    found[(codes(type).astype(np.int64) << grid.bits * np.arange(grid.dimension)).sum(axis=1)] = np.arange(grid.count)
    return found


def _indices(type: GGMLType, components: Floats) -> Levels:
    """Numbers [blocks, groups] of the points with these components [blocks, 256]."""
    grid = GRIDS[type]
    code = np.searchsorted(np.array(grid.values, np.float32), components).reshape(len(components), -1, grid.dimension)
    index: Levels = _numbers(type)[(code << grid.bits * np.arange(grid.dimension)).sum(axis=2)].astype(np.int32)
    return index


def _bits(negative: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return np.packbits(negative, axis=1, bitorder="little")


def _grid(
    blocks: Blocks, steps: npt.NDArray[np.integer], base: float, slope: float, half: Floats | None = None
) -> Grid:
    unit = blocks["d"].astype(np.float32) if half is None else half
    real = steps.astype(np.float32)
    scale = unit[:, None] * (np.float32(base) + np.float32(slope) * real)
    return Grid(scale, np.zeros_like(scale), real, np.zeros_like(scale), unit, np.zeros_like(unit))


def _nibbles(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    both = (data[..., None] >> np.array([0, 4], np.uint8)).astype(np.uint8) & np.uint8(15)
    return both.reshape(len(data), -1)


def _steps(grid: Grid) -> Levels:
    assert grid.steps is not None
    return grid.steps.astype(np.int32)


def _joined(values: Levels, width: int, per: int) -> Levels:
    """Numbers of `width` bits, `per` of them to a word, the first one lowest."""
    words: Levels = (values.reshape(len(values), -1, per) << width * np.arange(per)).sum(axis=2)
    return words


def _coded(grid: Grid, entries: Floats) -> npt.NDArray[np.uint32]:
    """Words [blocks, 8] of four sign codes and a scale."""
    signs = (_bits(entries < 0) & 127).astype(np.int64)
    words = (signs.reshape(len(signs), 8, 4) << 7 * np.arange(4)).sum(axis=2) | _steps(grid).astype(np.int64) << 28
    coded: npt.NDArray[np.uint32] = words.astype(np.uint32)
    return coded


def _write_iq2_xxs(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    index = _indices(GGMLType.IQ2_XXS, np.abs(entries)).astype(np.uint8)
    blocks["qs"][..., 0] = np.ascontiguousarray(index).view("<u4")
    blocks["qs"][..., 1] = _coded(grid, entries)


def _write_iq2_xs(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    signs = (_bits(entries < 0) & 127).astype(np.int32)
    blocks["qs"] = _indices(GGMLType.IQ2_XS, np.abs(entries)) | signs << 9
    blocks["scales"] = _joined(_steps(grid), 4, 2)


def _write_iq2_s(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    index = _indices(GGMLType.IQ2_S, np.abs(entries))
    blocks["qs"], blocks["qh"] = index & 255, _joined(index >> 8, 2, 4)
    blocks["signs"], blocks["scales"] = _bits(entries < 0), _joined(_steps(grid), 4, 2)


def _write_iq3_xxs(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    blocks["qs"], blocks["signs"] = _indices(GGMLType.IQ3_XXS, np.abs(entries)), _coded(grid, entries)


def _write_iq3_s(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    index = _indices(GGMLType.IQ3_S, np.abs(entries))
    blocks["qs"], blocks["qh"] = index & 255, _joined(index >> 8, 1, 8)
    blocks["signs"], blocks["scales"] = _bits(entries < 0), _joined(_steps(grid), 4, 2)


def _shifted(entries: Floats) -> tuple[Levels, npt.NDArray[np.bool_]]:
    """Numbers of the points of IQ1, and which groups of 8 have a negative shift."""
    whole = np.rint(entries)
    return _indices(GGMLType.IQ1_S, whole), (entries < whole)[:, ::8]


def _write_iq1_s(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    index, negative = _shifted(entries)
    high = _joined(index >> 8, 3, 4) | _steps(grid) << 12 | negative[:, ::4].astype(np.int32) << 15
    blocks["qs"], blocks["qh"] = index & 255, high


def _write_iq1_m(blocks: Blocks, grid: Grid, entries: Floats) -> None:
    assert grid.unit is not None
    index, negative = _shifted(entries)
    blocks["qs"] = index & 255
    blocks["qh"] = _joined(index >> 8 | negative.astype(np.int32) << 3, 4, 2)
    half = grid.unit.astype(np.float16).view(np.uint16).astype(np.int32)[:, None]
    blocks["scales"] = _joined(_steps(grid), 3, 4) | (half >> 4 * np.arange(4) & 15) << 12


def _with_unit(write: Callable[[Blocks, Grid, Floats], None]) -> Callable[[Blocks, Grid, Floats], None]:
    def both(blocks: Blocks, grid: Grid, entries: Floats) -> None:
        blocks["d"] = grid.unit
        write(blocks, grid, entries)

    return both


def _read_iq1_s(blocks: Blocks) -> Grid:
    high = blocks["qh"]
    grid = _grid(blocks, high >> 12 & 7, 1, 2)
    shift = np.where(high >= 0x8000, np.float32(-0.125), np.float32(0.125))
    return Grid(grid.scale, grid.offset, grid.steps, shift, grid.unit, grid.least)


def _read_iq1_m(blocks: Blocks) -> Grid:
    steps = (blocks["scales"][..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(len(blocks), -1)
    return _grid(blocks, steps, 1, 2, d_iq1_m(blocks).astype(np.float32))


POINTED: dict[GGMLType, Pointed] = {
    entry.type: entry
    for entry in (
        Pointed(
            GGMLType.IQ2_XXS, 32, (0, 15), 0.125, 0.25, "even",
            lambda blocks: _grid(blocks, blocks["qs"][..., 1] >> 28, 0.125, 0.25), _with_unit(_write_iq2_xxs),
        ),
        Pointed(
            GGMLType.IQ2_XS, 16, (0, 15), 0.125, 0.25, "even",
            lambda blocks: _grid(blocks, _nibbles(blocks["scales"]), 0.125, 0.25), _with_unit(_write_iq2_xs),
        ),
        Pointed(
            GGMLType.IQ2_S, 16, (0, 15), 0.125, 0.25, "free",
            lambda blocks: _grid(blocks, _nibbles(blocks["scales"]), 0.125, 0.25), _with_unit(_write_iq2_s),
        ),
        Pointed(
            GGMLType.IQ3_XXS, 32, (0, 15), 0.25, 0.5, "even",
            lambda blocks: _grid(blocks, blocks["signs"] >> 28, 0.25, 0.5), _with_unit(_write_iq3_xxs),
        ),
        Pointed(
            GGMLType.IQ3_S, 32, (0, 15), 1.0, 2.0, "free",
            lambda blocks: _grid(blocks, _nibbles(blocks["scales"]), 1, 2), _with_unit(_write_iq3_s),
        ),
        Pointed(GGMLType.IQ1_S, 32, (0, 7), 1.0, 2.0, "shift", _read_iq1_s, _with_unit(_write_iq1_s)),
        Pointed(GGMLType.IQ1_M, 16, (0, 7), 1.0, 2.0, "shifts", _read_iq1_m, _write_iq1_m),
    )
}  # fmt: skip
"""Formats that are rounded to points of a lattice."""
