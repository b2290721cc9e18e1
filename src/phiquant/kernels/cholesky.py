"""Systems of equations with moments, block by block: LAPACK's own routines take several times as long for wide ones."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["cholesky", "in_blocks", "solve"]

Floats = TypeVar("Floats", bound=npt.NDArray[np.floating[Any]])

_WIDTH = 256


def in_blocks(n: int) -> list[slice]:
    """Of 256 columns each; the last has what is left."""
    return [slice(start, min(start + _WIDTH, n)) for start in range(0, n, _WIDTH)]


def cholesky(a: Floats) -> Floats:
    """The lower triangular factor of a symmetric matrix, in place of it; LinAlgError if it is not positive definite."""
    for at in in_blocks(len(a)):
        rest, done = slice(at.stop, None), slice(0, at.start)
        a[at.start :, at] -= a[at.start :, done] @ a[at, done].T
        a[at, at] = np.linalg.cholesky(a[at, at])
        a[rest, at] = a[rest, at] @ np.linalg.inv(a[at, at]).T
        a[at, rest] = 0
    return a


def solve(root: Floats, rows: Floats) -> Floats:
    """The X of X (root root^T) = rows, in place of `rows` [m, n]; `root` [n, n] is a lower triangular factor."""
    blocks = in_blocks(len(root))
    inverses = [np.linalg.inv(root[at, at]) for at in blocks]
    for at, inverse in zip(blocks, inverses, strict=True):
        done = slice(0, at.start)
        rows[:, at] = (rows[:, at] - rows[:, done] @ root[at, done].T) @ inverse.T
    for at, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        rest = slice(at.stop, None)
        rows[:, at] = (rows[:, at] - rows[:, rest] @ root[rest, at]) @ inverse
    return rows
