"""Systems of equations with moments, block by block: LAPACK's own routines take several times as long for wide ones."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from phiquant.errors import WeightsError

__all__ = ["cholesky", "damped_root", "in_blocks", "solve"]

Floats = TypeVar("Floats", bound=npt.NDArray[np.floating[Any]])

_WIDTH = 256  # columns that are eliminated together


def in_blocks(n: int, width: int) -> list[slice]:
    """Of so many columns each; the last has what is left."""
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


def damped_root(moments: npt.NDArray[np.float32], damping: float, added: float) -> npt.NDArray[np.floating[Any]]:
    """The lower triangular factor of moments [n, n] with `added` on their diagonal, which stay as they are.

    In float32, or in float64 where that is too little. WeightsError if they are those of no inputs; `damping` is what
    the user is told of: `added` as a part of the diagonal's mean.
    """
    for precision in (np.float32, np.float64):
        damped: npt.NDArray[np.floating[Any]] = moments.astype(precision)
        damped.flat[:: len(damped) + 1] += added
        try:
            return cholesky(damped)
        except np.linalg.LinAlgError:
            continue
    raise WeightsError(
        f"moments of inputs are not those of any inputs even with a damping of {damping:g}; collect them again"
    )


def cholesky(a: Floats) -> Floats:
    """The lower triangular factor of a symmetric matrix, in place of it; LinAlgError if it is not positive definite."""
    for at in in_blocks(len(a), _WIDTH):
        rest, done = slice(at.stop, None), slice(0, at.start)
        a[at.start :, at] -= a[at.start :, done] @ a[at, done].T
        a[at, at] = np.linalg.cholesky(a[at, at])
        a[rest, at] = a[rest, at] @ np.linalg.inv(a[at, at]).T
        a[at, rest] = 0
    return a


def solve(root: Floats, rows: Floats) -> Floats:
    """The X of X (root root^T) = rows, in place of `rows` [m, n]; `root` [n, n] is a lower triangular factor."""
    blocks = in_blocks(len(root), _WIDTH)
    inverses = [np.linalg.inv(root[at, at]) for at in blocks]
    for at, inverse in zip(blocks, inverses, strict=True):
        done = slice(0, at.start)
        rows[:, at] = (rows[:, at] - rows[:, done] @ root[at, done].T) @ inverse.T
    for at, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        rest = slice(at.stop, None)
        rows[:, at] = (rows[:, at] - rows[:, rest] @ root[rest, at]) @ inverse
    return rows
