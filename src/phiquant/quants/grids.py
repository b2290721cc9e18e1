"""The lattices of the IQ formats: the points that groups of 8 or 4 weights may take, signs apart.

They were found by search and follow from no formula, so they are data: `grids.bin` holds a code for every point, as
little-endian 16-bit words, lattice after lattice, codes ascending. A code has 2 bits (lattices of 8 dimensions) or 3
bits (of 4) for each component, the first component in the lowest bits:

    bits  15 14|13 12|11 10| 9  8| 7  6| 5  4| 3  2| 1  0        11 10 9|8 7 6|5 4 3|2 1 0
    of      7  |  6  |  5  |  4  |  3  |  2  |  1  |  0             3   |  2  |  1  |  0
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType

__all__ = ["GRIDS", "Grid", "codes", "points"]


@dataclass(frozen=True)
class Grid:
    """One lattice.

    Attributes:
        start: index of its first code in the file.
        count: number of points.
        dimension: components of a point.
        values: what the codes of a component stand for.
    """

    start: int
    count: int
    dimension: int
    values: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of a component's code."""
        return 2 if self.dimension == 8 else 3


_IQ1 = Grid(1792, 2048, 8, (-1, 0, 1))

GRIDS: dict[GGMLType, Grid] = {
    GGMLType.IQ2_XXS: Grid(0, 256, 8, (8, 25, 43)),
    GGMLType.IQ2_XS: Grid(256, 512, 8, (8, 25, 43)),
    GGMLType.IQ2_S: Grid(768, 1024, 8, (8, 25, 43)),
    GGMLType.IQ1_S: _IQ1,
    GGMLType.IQ1_M: _IQ1,
    GGMLType.IQ3_XXS: Grid(3840, 256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    GGMLType.IQ3_S: Grid(4096, 512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
}
"""The lattice of every format that has one."""


@cache
def _all() -> npt.NDArray[np.uint16]:
    return np.frombuffer(files("phiquant.quants").joinpath("grids.bin").read_bytes(), "<u2").astype(np.uint16)


@cache
def codes(type: GGMLType) -> npt.NDArray[np.uint8]:
    """Codes of the components, uint8 [points, dimension], of the lattice of a format."""
    grid = GRIDS[type]
    words = _all()[grid.start : grid.start + grid.count, None]
    split = (words >> (np.arange(grid.dimension, dtype=np.uint16) * grid.bits)) & (2**grid.bits - 1)
    result: npt.NDArray[np.uint8] = split.astype(np.uint8)
    result.setflags(write=False)
    return result


@cache
def points(type: GGMLType) -> npt.NDArray[np.int8]:
    """The points, int8 [points, dimension], of the lattice of a format."""
    result: npt.NDArray[np.int8] = np.array(GRIDS[type].values, np.int8)[codes(type)]
    result.setflags(write=False)
    return result
