"""Factors and systems of equations, block by block, against LAPACK's."""

import numpy as np
import pytest

from phiquant.errors import WeightsError
from phiquant.kernels.cholesky import cholesky, damped_root, in_blocks, solve

WIDTHS = [1, 255, 256, 257, 700]  # within a block of 256 columns, a whole one, several


def moments(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((2 * n + 8, n))
    return x.T @ x / len(x)


def test_blocks_are_all_columns_once() -> None:
    assert [column for block in in_blocks(700, 256) for column in range(700)[block]] == list(range(700))
    assert in_blocks(0, 256) == []


@pytest.mark.parametrize("n", WIDTHS)
def test_the_factor_is_lapacks(n: int) -> None:
    a = moments(n)
    np.testing.assert_allclose(cholesky(a.copy()), np.linalg.cholesky(a), atol=1e-10)


@pytest.mark.parametrize("n", WIDTHS)
def test_what_is_solved_gives_the_rows_again(n: int) -> None:
    a, rows = moments(n), np.random.default_rng(1).standard_normal((5, n))
    np.testing.assert_allclose(solve(cholesky(a.copy()), rows.copy()) @ a, rows, atol=1e-9)


def test_moments_that_single_precision_is_too_little_for() -> None:
    a = np.full((300, 300), 1e8, np.float32)  # of one direction; what is added is lost beside it in float32
    kept = a.copy()
    root = damped_root(a, 0.1, 1.0)
    assert root.dtype == np.float64
    np.testing.assert_allclose(root @ root.T, a.astype(np.float64) + np.eye(300), rtol=1e-9)
    np.testing.assert_array_equal(a, kept)


def test_what_is_no_moments_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"damping of 0\.1; collect them again"):
        damped_root(-np.eye(4, dtype=np.float32), 0.1, 0.1)
