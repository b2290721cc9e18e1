"""The lattices that the package ships."""

import numpy as np
import pytest

from gguf import quants as theirs
from phiquant.gguf.types import GGMLType
from phiquant.quants.grids import GRIDS, codes, points


@pytest.mark.parametrize("type", list(GRIDS))
def test_points_equal_gguf(type):
    other = getattr(theirs, type.name if type is not GGMLType.IQ1_M else "IQ1_S")
    other.init_grid()
    assert np.array_equal(points(type), other.grid.reshape(other.grid_shape))


@pytest.mark.parametrize("type", list(GRIDS))
def test_codes_ascend_and_stay_in_range(type):
    grid = GRIDS[type]
    split = codes(type)
    assert split.shape == (grid.count, grid.dimension)
    assert split.max() == len(grid.values) - 1
    words = (split.astype(np.int64) << (np.arange(grid.dimension) * grid.bits)).sum(axis=1)
    assert (np.diff(words) > 0).all()


def test_the_file_holds_nothing_else():
    ends = {grid.start + grid.count for grid in GRIDS.values()}
    starts = {grid.start for grid in GRIDS.values()}
    assert starts == {0, *ends} - {max(ends)}
    from importlib.resources import files

    assert len(files("phiquant.quants").joinpath("grids.bin").read_bytes()) == 2 * max(ends)
