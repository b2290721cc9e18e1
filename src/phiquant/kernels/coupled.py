"""Rounding a matrix for what its products are used for: what some rows leave over is carried into those after them.

With the moments H of the inputs and M of what errors in the products cost, an error E of the matrix [rows, columns]
costs tr(M E H E^T). Feedback within a row does justice to H, carrying over from row to row to M: with M = U^T D U, of
a U with ones on its diagonal and nothing above it, the cost is the sum of those of the rows of U E, so each row is
rounded after U times the errors of those before it were added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from phiquant.errors import WeightsError
from phiquant.kernels.cholesky import damped_root, in_blocks
from phiquant.kernels.cpu.feedback_product import ROWS

__all__ = ["DAMPING", "Coupling", "coupled_rows"]

DAMPING: Final = 0.3
"""What is added to the diagonal of the moments, as a part of its mean: they are known of few tokens."""

_PARTS: Final = 12  # that rows are cut into, if there are enough

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Coupling:
    """How much errors of rows make up for one another: of all rows, or of those of each head among themselves.

    Attributes:
        order: int64 [heads, n], the row that is rounded at each place; those whose errors cost most first.
        unit: float32 [heads, n, n], lower triangular with ones on the diagonal.
    """

    order: npt.NDArray[np.int64]
    unit: Floats

    @classmethod
    def of(cls, moments: npt.NDArray[np.floating[Any]], *, damping: float = DAMPING) -> Coupling:
        """Of moments [heads, n, n] of what errors in the products cost. WeightsError if they are no moments."""
        diagonals = np.einsum("hii->hi", moments)
        if not np.isfinite(moments).all() or (diagonals < 0).any():
            raise WeightsError("moments of derivatives hold NaN, infinity or negative squares; collect them again")
        order = np.argsort(-diagonals, axis=1, kind="stable")
        unit = np.empty(moments.shape, np.float32)
        for head, (rows, mean) in enumerate(zip(order, diagonals.mean(axis=1), strict=True)):
            # U^T D U is a Cholesky factorization from the last row upwards: of the matrix turned round, turned back.
            turned = rows[::-1]
            scaled = moments[head][np.ix_(turned, turned)].astype(np.float32)
            scaled *= np.float32(1 / (mean or 1.0))
            root = damped_root(scaled, damping, damping if mean > 0 else 1.0)[::-1, ::-1]
            unit[head] = (root / np.diagonal(root)).T
        order += np.arange(len(order))[:, None] * order.shape[1]
        return cls(order, unit)


def coupled_rows(x: Floats, coupling: Coupling, rounded: Callable[[Floats], tuple[Bytes, Floats]]) -> Bytes:
    """Rows of a matrix, rounded part by part.

    Args:
        x: float32 [rows, columns].
        coupling: of as many rows, head after head.
        rounded: makes of float32 [n, columns] the bytes of n rows [n, row_bytes], and what these are as float32.

    Returns:
        uint8 [rows, row_bytes].
    """
    heads, n = coupling.order.shape
    together = -(-len(x) // (_PARTS * ROWS)) * ROWS  # as many as fill the kernels' panels
    errors, out = np.empty((heads, n, x.shape[1]), np.float32), None
    for at in in_blocks(n, max(1, together // heads)):
        rows = coupling.order[:, at]
        wanted = x[rows]
        target = wanted + coupling.unit[:, at, : at.start] @ errors[:, : at.start]
        made, values = rounded(target.reshape(-1, x.shape[1]))
        errors[:, at] = wanted - values.reshape(wanted.shape)
        out = np.empty((len(x), made.shape[1]), np.uint8) if out is None else out
        out[rows.reshape(-1)] = made
    assert out is not None
    return out
