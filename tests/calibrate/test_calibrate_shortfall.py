"""What a matrix makes up for: as much of what its inputs and the stream lack as holds on text that did not ask."""

import numpy as np
import pytest

from phiquant.calibrate.shortfall import Shortfall
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import Weight

COLUMNS, ROWS, TOKENS = 320, 48, 4096


@pytest.fixture
def chance() -> np.random.Generator:
    return np.random.default_rng(7)


def weight_of(values: np.ndarray) -> Weight:
    return Weight("blk.0.w", GGMLType.F32, values.shape, values.astype(np.float32).reshape(-1).view(np.uint8))


def values_of(weight: Weight) -> np.ndarray:
    assert weight.type is GGMLType.F32
    return weight.data.view(np.float32).reshape(weight.shape)


def taken(shortfall: Shortfall, x: np.ndarray, lacks: np.ndarray) -> Shortfall:
    for start in range(0, len(x), 512):
        part = slice(start, start + 512)
        shortfall.add(x[part].astype(np.float32), lacks[part].astype(np.float32), start // 512 % 2)
    return shortfall


def left(weight: np.ndarray, target: np.ndarray, x: np.ndarray, lacks: np.ndarray) -> float:
    """What is left of what the products lack, as a part of it, on fresh inputs."""
    return float(np.square(lacks - x @ (target - weight).T).sum() / np.square(lacks).sum())


@pytest.mark.parametrize("of_inputs", [True, False])
def test_what_follows_from_the_inputs_is_made_up_for(chance: np.random.Generator, of_inputs: bool) -> None:
    weight = chance.standard_normal((ROWS, COLUMNS)) * 0.1
    mixed = np.eye(COLUMNS) + chance.standard_normal((COLUMNS, COLUMNS)) * 0.01
    x = chance.standard_normal((2 * TOKENS, COLUMNS)) @ (np.eye(COLUMNS) + 0.1 * chance.random((COLUMNS, COLUMNS)))
    lacks = x @ mixed.T - x
    shortfall = Shortfall.of_inputs(COLUMNS) if of_inputs else Shortfall.of_stream(COLUMNS, ROWS)
    taken(shortfall, x[:TOKENS], lacks[:TOKENS] if of_inputs else lacks[:TOKENS] @ weight.T)
    (target,) = shortfall.targets((weight_of(weight),), "w")
    assert left(weight, values_of(target), x[TOKENS:], lacks[TOKENS:] @ weight.T) < 0.1
    np.testing.assert_allclose(shortfall.moments.of(0), x[:TOKENS].T @ x[:TOKENS], rtol=1e-3, atol=1)
    assert shortfall.moments.counts.tolist() == [TOKENS]


def test_what_is_chance_is_left(chance: np.random.Generator) -> None:
    """Noise: what one half asks for holds nothing for the other, however well it fits its own."""
    weight = chance.standard_normal((ROWS, COLUMNS)) * 0.1
    x, noise = chance.standard_normal((TOKENS, COLUMNS)), chance.standard_normal((TOKENS, ROWS))
    (target,) = taken(Shortfall.of_stream(COLUMNS, ROWS), x, noise).targets((weight_of(weight),), "w")
    fresh = np.square(x @ (values_of(target) - weight).T).sum() / np.square(noise).sum()
    asked = np.linalg.lstsq(x, noise, rcond=None)[0]
    assert np.square(x @ asked).sum() / np.square(noise).sum() > 0.07
    assert fresh < 0.001


def test_half_of_what_is_half_chance_is_made_up_for(chance: np.random.Generator) -> None:
    weight, change = (chance.standard_normal((ROWS, COLUMNS)) * 0.1 for _ in range(2))
    x = chance.standard_normal((TOKENS, COLUMNS))
    lacks = x @ change.T + chance.standard_normal((TOKENS, ROWS)) * 5
    (target,) = taken(Shortfall.of_stream(COLUMNS, ROWS), x, lacks).targets((weight_of(weight),), "w")
    found = values_of(target) - weight
    all_of_it = np.linalg.lstsq(x, lacks, rcond=None)[0].T
    assert np.square(found - change).sum() < 0.8 * np.square(all_of_it - change).sum()
    assert np.square(found - change).sum() < 0.8 * np.square(change).sum()


def test_dead_inputs_and_nothing_lacking_change_nothing(chance: np.random.Generator) -> None:
    weight = chance.standard_normal((ROWS, COLUMNS))
    for x in (np.zeros((TOKENS, COLUMNS)), chance.standard_normal((TOKENS, COLUMNS))):
        x[:, 5] = 0
        (target,) = taken(Shortfall.of_inputs(COLUMNS), x, np.zeros_like(x)).targets((weight_of(weight),), "w")
        np.testing.assert_array_equal(values_of(target), weight.astype(np.float32))


def test_what_is_no_number_is_refused(chance: np.random.Generator) -> None:
    x = chance.standard_normal((TOKENS, COLUMNS))
    lacks = np.zeros((TOKENS, ROWS))
    lacks[9, 3] = np.nan
    with pytest.raises(WeightsError, match=r"The inputs of blk\.0\.w are not finite"):
        taken(Shortfall.of_stream(COLUMNS, ROWS), x, lacks).targets((weight_of(x[:ROWS]),), "blk.0.w")
