"""Second moments of what matrices are given: H = sum of x x^T over the rows x that they read.

They are added up in float32, products of at most 2048 rows at a time: against float64 throughout that is off by 1e-6 of
the diagonal, where factors of H have a hundredth of its mean added to it.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import WeightsError

__all__ = ["FLOOR", "Moments", "check_finite"]

FLOOR: Final = 256
"""Tokens of the layer's average that the moments of every expert are given besides its own: an expert to which few or
no tokens are routed is rounded by these, one that has thousands by its own."""

Floats = NDArray[np.float32]


@dataclass(eq=False)
class Moments:
    """Of matrices that read the same rows: `sums` float32 [matrices, columns, columns], `counts` int64 [matrices]."""

    sums: Floats
    counts: NDArray[np.int64]

    @classmethod
    def none(cls, matrices: int, columns: int) -> "Moments":
        """Of no rows."""
        return cls(np.zeros((matrices, columns, columns), np.float32), np.zeros(matrices, np.int64))

    def add(self, rows: Floats, experts: NDArray[np.int32] | None = None) -> None:
        """Take rows in, float32 [rows, columns]; of experts, each row for the one that it is routed to.

        `experts`: int32 [routes]; as many as rows, or several for each row in turn.
        """
        if experts is None:
            self._add(0, rows)
            return
        used = len(experts) // max(len(rows), 1)
        for expert in np.unique(experts):
            self._add(int(expert), rows[np.flatnonzero(experts == expert) // used])

    def _add(self, matrix: int, rows: Floats) -> None:
        self.sums[matrix] += rows.T @ rows  # of one array with itself: half the work
        self.counts[matrix] += len(rows)

    def of(self, matrix: int) -> Floats:
        """Those of one matrix [columns, columns]; of experts with `FLOOR` tokens of the average in it."""
        mine: Floats = self.sums[matrix]
        if len(self.counts) > 1:
            mine = mine + self.sums.sum(axis=0) * np.float32(FLOOR / max(int(self.counts.sum()), 1))
        return mine

    @classmethod
    def together(cls, *parts: tuple["Moments", float]) -> "Moments":
        """Of one matrix, those of several texts: the means of each, so much of them."""
        sums = [found.sums * np.float32(share / max(int(found.counts[0]), 1)) for found, share in parts]
        return cls(np.sum(sums, axis=0), np.ones(1, np.int64))

    def with_identity(self, share: float) -> "Moments":
        """These with `share` times the mean of the diagonal added to it: as if inputs along every axis had come too."""
        sums = self.sums.copy()
        diagonals = np.einsum("mii->mi", sums)
        diagonals += np.float32(share) * diagonals.mean(axis=1, keepdims=True)
        return Moments(sums, self.counts)

    def importance(self, matrix: int) -> Floats:
        """Mean squares of the columns [columns], as an importance matrix has them."""
        count = int(self.counts[matrix]) + (FLOOR if len(self.counts) > 1 else 0)
        squares: Floats = np.diagonal(self.of(matrix)) / np.float32(max(count, 1))
        return squares

    def check(self, name: str) -> None:
        """WeightsError if something that is not a number came by; `name` of a matrix."""
        check_finite(np.einsum("mii->mi", self.sums), name)


def check_finite(sums: Floats, name: str) -> None:
    """WeightsError if something that is not a number came into sums over what the matrix of that name reads."""
    if not np.isfinite(sums).all():
        raise WeightsError(
            f"The inputs of {name} are not finite: the model computes NaN or infinity on this text; check the file "
            "with another one of the same model."
        )
