"""Candidates of groups of levels that are no points, against the definition, one key at a time."""

import numpy as np
import pytest

from phiquant.gguf.types import GGMLType
from phiquant.quants.grids import GRIDS, codes
from phiquant.quants.neighbours import key_digits, neighbours

SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3, "IQ1_M": 3}


@pytest.mark.parametrize("type", list(GRIDS))
def test_candidates_are_the_nearest_points_in_order(type):
    near, digits, base = neighbours(type), key_digits(type), len(GRIDS[type].values)
    places = codes(type).astype(int)
    assert len(near.point) == base ** len(digits)
    for key in np.random.default_rng(0).integers(0, len(near.point), 60):
        levels = key // digits % base
        distances = ((places - levels) ** 2).sum(axis=1)
        found = near.candidates[near.start[key] : near.start[key + 1]]
        if near.point[key] >= 0:
            assert (places[near.point[key]] == levels).all()
            assert not found.size
        else:
            wanted = sorted(set(distances.tolist()))[: SHELLS[type.name]]
            assert found.tolist() == sorted(
                np.flatnonzero(np.isin(distances, wanted)).tolist(), key=lambda j: (distances[j], j)
            )


@pytest.mark.parametrize("type", list(GRIDS))
def test_every_point_is_a_key_and_every_other_key_has_candidates(type):
    near = neighbours(type)
    assert sorted(near.point[near.point >= 0]) == list(range(GRIDS[type].count))
    assert ((np.diff(near.start) > 0) == (near.point < 0)).all()
    assert near.point[0] == 0 or type in (GGMLType.IQ1_S, GGMLType.IQ1_M)
