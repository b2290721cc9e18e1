"""Error feedback: the compiled sweep against its definition, what the bytes mean, and what they gain."""

import numpy as np
import pytest

from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels import feedback_slab as slabs
from phiquant.kernels.cpu import library
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.feedback import SUPPORTED, Factor, factorize, feedback_rows
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.feedback import STEPPED, Grid, round_columns
from phiquant.quants.validity import bad_blocks

pytestmark = pytest.mark.cpu

TYPES = sorted(SUPPORTED)


def inputs(n: int, seed: int, count: int | None = None) -> np.ndarray:
    """Rows of correlated inputs with columns of uneven size, as layers give them."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * np.arange(1, n + 1)[:, None] ** -0.5
    size = np.exp(rng.standard_normal(n) * 0.6)
    return rng.standard_normal((count or 4 * n, n)) @ mixing * size


def weights(rows: int, n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, (rows, n)) * 0.02).astype(np.float32)


def error(x: np.ndarray, data: np.ndarray, type: GGMLType, moments: np.ndarray) -> float:
    left = x.astype(np.float64) - quants.dequantize(data, type, x.shape)
    return float(((left @ moments) * left).sum())


@pytest.fixture(scope="module")
def moments() -> np.ndarray:
    x = inputs(512, seed=1)
    return x.T @ x


@pytest.fixture(scope="module")
def factor(moments) -> Factor:
    return factorize(moments)


# The error beside that of the same bytes chosen with the diagonal alone, at most: 1.1 times what was measured.
GAIN = {
    GGMLType.Q4_0: 0.2,
    GGMLType.Q4_1: 0.23,
    GGMLType.Q5_0: 0.2,
    GGMLType.Q5_1: 0.22,
    GGMLType.Q8_0: 0.18,
    GGMLType.Q2_K: 0.25,
    GGMLType.Q3_K: 0.21,
    GGMLType.Q4_K: 0.23,
    GGMLType.Q5_K: 0.22,
    GGMLType.Q6_K: 0.215,
    GGMLType.IQ4_NL: 0.205,
    GGMLType.IQ4_XS: 0.205,
    GGMLType.IQ1_S: 0.24,
    GGMLType.IQ1_M: 0.235,
    GGMLType.IQ2_XXS: 0.22,
    GGMLType.IQ2_XS: 0.22,
    GGMLType.IQ2_S: 0.205,
    GGMLType.IQ3_XXS: 0.215,
    GGMLType.IQ3_S: 0.19,
}


@pytest.mark.parametrize("type", TYPES)
def test_errors_of_products_are_a_part_of_those_without_feedback(type, moments, factor):
    x = weights(150, 512, seed=2)
    diagonal = np.diagonal(moments).astype(np.float32)
    plain = error(x, quantize_rows(x, GGMLType.F32, type, diagonal), type, moments)
    found = feedback_rows(x, type, factor)
    assert found.shape == (150, type.row_bytes(512))
    assert found.dtype == np.uint8
    assert bad_blocks(found.reshape(-1), type) is None
    assert np.array_equal(dequantize_rows(found, type, *x.shape), quants.dequantize(found, type, x.shape))
    assert error(x, found, type, moments) < GAIN[type] * plain


@pytest.mark.parametrize("type", sorted(STEPPED))
def test_the_first_sweep_is_the_reference(type, factor):
    x, how = weights(70, 512, seed=3), STEPPED[type]
    slab = slabs.Slab(x, type, factor.order)
    slab.begin(0, factor.unit, factor.inner[0], 0)
    own = np.ascontiguousarray(x[:, factor.order[:256]])
    data = quantize_rows(own, GGMLType.F32, type, factor.variances[:256])
    grid = how.read(data.reshape(-1).view(quants.block_dtype(type)))
    grid = Grid(grid.scale.reshape(70, -1), grid.offset.reshape(70, -1))
    levels, errors = round_columns(own, factor.unit[:256, :256], grid, how, own)
    found = slab.entries[:, :256].transpose(0, 2, 1).reshape(-1, 256)[:70]
    left = slab.errors[:, :256].transpose(0, 2, 1).reshape(-1, 256)[:70]
    # Sums are rounded once where the processor has such an instruction, and NumPy has not: some are on the other side
    # of the middle between two levels, and what follows in their row differs.
    same = (found == how.entries(levels)).all(axis=1)
    assert same.mean() > 0.9
    assert np.abs(left - errors)[same].max() < 1e-6


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("type", TYPES)
def test_the_bytes_are_what_was_intended(type, rounds, factor):
    x = weights(65, 512, seed=4)
    slab = slabs.Slab(x, type, factor.order)
    for start, inner in zip((0, 256), factor.inner, strict=True):
        slab.begin(start, factor.unit, inner, rounds)
    for start, corner in zip((0, 256), factor.corners, strict=True):
        slab.again(start, factor.moments, corner)
    values = np.empty_like(x)
    values[:, factor.order] = slab.now.transpose(0, 2, 1).reshape(-1, 512)[:65]
    assert np.array_equal(quants.dequantize(slab.bytes(), type, x.shape), values)
    left = np.empty_like(x)
    left[:, factor.order] = slab.errors.transpose(0, 2, 1).reshape(-1, 512)[:65]
    assert np.abs(left - (x - values)).max() < 1e-6


@pytest.mark.parametrize("type", TYPES)
def test_every_round_and_sweep_lessens_the_error(type, moments):
    x, factor = weights(64, 512, seed=5), factorize(moments, damping=1e-4)
    found = [
        error(x, feedback_rows(x, type, factor, rounds=rounds, sweeps=sweeps), type, moments)
        for rounds, sweeps in ((0, 0), (1, 0), (3, 0), (3, 1), (3, 3))
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    "type", [GGMLType.Q4_K, GGMLType.Q3_K, GGMLType.Q4_1, GGMLType.IQ4_XS, GGMLType.IQ3_XXS, GGMLType.IQ1_M]
)
def test_bytes_depend_neither_on_threads_nor_on_other_rows(type, factor):
    x = weights(600, 512, seed=6)
    whole = feedback_rows(x, type, factor, threads=1)
    assert np.array_equal(feedback_rows(x, type, factor, threads=3), whole)
    for part in (slice(0, 1), slice(7, 72), slice(255, 600)):
        assert np.array_equal(feedback_rows(x[part], type, factor), whole[part])


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.IQ3_XXS])
def test_every_lowering_gains_as_much(type, each_target, moments, factor, monkeypatch):
    function, compiled = library.function, []

    def forced(name, arguments, body):
        compiled.append(name)
        return function(name, arguments, body, each_target)

    x = weights(70, 512, seed=7)
    usual = feedback_rows(x, type, factor)
    monkeypatch.setattr(library, "function", forced)
    caches = (slabs._product, slabs._descend, slabs._refit)
    for cache in caches:
        cache.cache_clear()
    try:
        found = feedback_rows(x, type, factor)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert len({name for name in compiled if name.startswith("feedback")}) == 3
    assert error(x, found, type, moments) == pytest.approx(error(x, usual, type, moments), rel=0.01)


@pytest.mark.parametrize("type", [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.IQ4_NL])
@pytest.mark.parametrize("n", [32, 96, 288, 352])
def test_rows_that_end_within_256_columns(type, n):
    x, given = weights(20, n, seed=8), inputs(n, seed=9)
    moments = given.T @ given
    plain = error(x, quantize_rows(x, GGMLType.F32, type, np.diagonal(moments).astype(np.float32)), type, moments)
    assert error(x, feedback_rows(x, type, factorize(moments)), type, moments) < plain


@pytest.mark.parametrize("type", TYPES)
def test_moments_of_few_inputs_and_of_none(type):
    x = weights(10, 256, seed=10)
    few = inputs(256, seed=11, count=5)
    few[:, 100:] = 0  # columns that were always zero
    for moments in (few.T @ few, np.zeros((256, 256))):
        found = quants.dequantize(feedback_rows(x, type, factorize(moments)), type, x.shape)
        assert np.isfinite(found).all()
        assert np.abs(found - x).max() < np.abs(x).max()


@pytest.mark.parametrize("type", TYPES)
def test_rows_of_zeros_and_of_one_size_stay_what_they_are(type, factor):
    x = np.zeros((3, 512), np.float32)
    x[1, 40] = 1.0
    x[2] = 0.25
    found = quants.dequantize(feedback_rows(x, type, factor), type, x.shape)
    assert (found[0] == 0).all()
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean((found[2] - 0.25) ** 2)) < (0.05 if type in STEPPED else 0.2)


def test_factors_give_the_moments_again(moments):
    factor = factorize(moments, damping=0.01)
    assert sorted(factor.order) == list(range(512))
    assert sorted(factor.order[:256]) in (list(range(256)), list(range(256, 512)))
    product = (factor.unit.astype(np.float64) * factor.variances) @ factor.unit.T
    expected = moments[np.ix_(factor.order, factor.order)] / np.diagonal(moments).mean()
    assert np.abs(product - (expected + 0.01 * np.eye(512))).max() < 1e-5 * np.abs(expected).max()
    assert np.allclose(factor.moments, expected + 0.001 * np.eye(512), rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.triu(factor.unit), factor.unit)
    assert (np.diagonal(factor.unit) == 1).all()
    assert (factor.variances > 0).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((3, 4)), "square"),
        (np.full((32, 32), np.nan), "NaN"),
        (-np.eye(32), "negative"),
        (np.eye(32) - 100 * (1 - np.eye(32)), "not those of any inputs"),
    ],
)
def test_moments_that_are_none(bad, message):
    with pytest.raises(WeightsError, match=message):
        factorize(bad)


def test_a_damping_that_is_none():
    with pytest.raises(WeightsError, match="must be positive"):
        factorize(np.eye(32), damping=0)


def test_rows_that_do_not_fit(factor):
    x = weights(4, 512, seed=12)
    with pytest.raises(WeightsError, match="contiguous float32"):
        feedback_rows(x.astype(np.float64), GGMLType.Q4_K, factor)
    with pytest.raises(WeightsError, match="contiguous float32"):
        feedback_rows(x[:, ::2], GGMLType.Q4_K, factor)
    with pytest.raises(WeightsError, match="512 inputs do not fit rows of 256"):
        feedback_rows(np.ascontiguousarray(x[:, :256]), GGMLType.Q4_K, factor)
    with pytest.raises(WeightsError, match="do not fill"):
        feedback_rows(np.ascontiguousarray(x[:, :288]), GGMLType.Q4_K, factorize(np.eye(288)))
    with pytest.raises(UnsupportedError, match=r"use one of .*Q4_K"):
        feedback_rows(x, GGMLType.TQ1_0, factor)
    assert feedback_rows(x[:0], GGMLType.Q4_K, factor).shape == (0, 288)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30, 2000.0])
@pytest.mark.parametrize("type", TYPES)
def test_what_is_not_finite_or_too_large_is_refused(type, value, factor):
    x = weights(5, 512, seed=13)
    x[3, 77] = value
    with pytest.raises(WeightsError, match="row 3 of the weights holds"):
        feedback_rows(x, type, factor)
