"""Rows of a matrix that make up for one another's errors: what errors cost, and the definition row by row."""

import numpy as np
import pytest

from phiquant.errors import WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.coupled import DAMPING, Coupling, coupled_rows
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.feedback import Factor, factorize, feedback_rows

pytestmark = pytest.mark.cpu

TYPE = GGMLType.Q4_K
Matrix = np.ndarray


def moments_of(n: int, seed: int, heads: int = 1) -> Matrix:
    """Of vectors of which some directions are far larger than others: float32 [heads, n, n]."""
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((heads, n, n)) * np.arange(1, n + 1)[:, None] ** -0.7
    x = chance.standard_normal((heads, 4 * n, n)) @ mixing
    return (x.swapaxes(1, 2) @ x).astype(np.float32)


def weights(rows: int, columns: int) -> Matrix:
    return (np.random.default_rng(5).standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def factor() -> Factor:
    return factorize(moments_of(256, 1)[0])


def by_feedback(factor: Factor):
    def rounded(rows: Matrix) -> tuple[Matrix, Matrix]:
        made = feedback_rows(np.ascontiguousarray(rows), TYPE, factor, threads=1)
        return made, dequantize_rows(made, TYPE, *rows.shape)

    return rounded


def cost(errors: Matrix, of_rows: Matrix, of_columns: Matrix) -> float:
    """tr(M E H E^T), head after head."""
    parts = errors.astype(np.float64).reshape(len(of_rows), -1, errors.shape[1])
    return float(np.einsum("hij,hjc,cd,hid->", of_rows, parts, of_columns, parts, optimize=True))


def test_unit_and_order_are_a_factorization_from_the_last_row_upwards() -> None:
    moments = moments_of(48, 2, heads=3)
    coupling = Coupling.of(moments)
    for head in range(3):
        order = coupling.order[head] - 48 * head
        assert sorted(order) == list(range(48))
        assert (np.diff(np.diagonal(moments[head])[order]) <= 0).all(), "those that cost most come first"
        unit = coupling.unit[head].astype(np.float64)
        assert (np.diagonal(unit) == 1).all()
        assert (np.triu(unit, 1) == 0).all()
        damped = moments[head].astype(np.float64)
        damped += np.eye(48) * DAMPING * np.diagonal(damped).mean()
        middle = np.linalg.inv(unit).T @ damped[np.ix_(order, order)] @ np.linalg.inv(unit)
        off = np.abs(middle - np.diag(np.diagonal(middle))).max()
        assert off < 1e-4 * np.diagonal(middle).max()


@pytest.mark.parametrize(("heads", "rows", "most"), [(1, 256, 0.75), (4, 256, 0.75), (1, 1056, 0.7)])
def test_errors_cost_less(factor: Factor, heads: int, rows: int, most: float) -> None:
    x, of_columns = weights(rows, 256), moments_of(256, 1)[0]
    of_rows = moments_of(rows // heads, 3, heads)
    alone = by_feedback(factor)(x)[1]
    made = coupled_rows(x, Coupling.of(of_rows), by_feedback(factor))
    together = dequantize_rows(made, TYPE, *x.shape)
    assert cost(x - together, of_rows, of_columns) < most * cost(x - alone, of_rows, of_columns)
    assert np.square(x - together).sum() < 3 * np.square(x - alone).sum()


def test_heads_do_not_know_of_one_another(factor: Factor) -> None:
    x, of_rows = weights(256, 256), moments_of(64, 4, heads=4)
    whole = coupled_rows(x, Coupling.of(of_rows), by_feedback(factor))
    for head in range(4):
        # As large parts as the four heads together have: 16 rows of each.
        part = x[64 * head :][:64]
        padded = np.concatenate([part, np.zeros((192, 256), np.float32)])
        alone = np.concatenate([of_rows[head : head + 1], np.tile(np.eye(64, dtype=np.float32), (3, 1, 1))])
        expected = coupled_rows(padded, Coupling.of(alone), by_feedback(factor))[:64]
        assert np.array_equal(whole[64 * head :][:64], expected)


def test_rows_are_rounded_after_what_those_before_them_left() -> None:
    x, of_rows = weights(128, 32), moments_of(128, 6)

    def coarse(rows: Matrix) -> tuple[Matrix, Matrix]:
        levels = np.rint(rows * 200).astype(np.int8)
        return levels.view(np.uint8), levels / np.float32(200)

    coupling = Coupling.of(of_rows)
    made = coupled_rows(x, coupling, coarse).view(np.int8) / np.float32(200)
    order, unit = coupling.order[0], coupling.unit[0]
    first, then = order[:64], order[64:]
    assert np.array_equal(made[first], coarse(x[first])[1])
    assert np.array_equal(made[then], coarse(x[then] + unit[64:, :64] @ (x - made)[first])[1])


def test_without_coupling_it_is_feedback_alone(factor: Factor) -> None:
    x = weights(200, 256)
    made = coupled_rows(x, Coupling.of(np.eye(200, dtype=np.float32)[None]), by_feedback(factor))
    assert np.array_equal(made, feedback_rows(x, TYPE, factor, threads=1))
    nothing = coupled_rows(x, Coupling.of(np.zeros((1, 200, 200), np.float32)), by_feedback(factor))
    assert np.array_equal(made, nothing), "no derivatives came by"


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_what_is_no_moment_is_refused(wrong: float) -> None:
    moments = moments_of(32, 7)
    moments[0, 3, 3] = wrong
    with pytest.raises(WeightsError, match="moments of derivatives"):
        Coupling.of(moments)
