"""What a matrix has to make up for: rounding before it changed its inputs, and the sum that its products go into.

Of the model as it is, a matrix W read x' where it now reads x, so W x lacks W (x' - x). Where products are added to the
residual stream, all that the stream lacks of the unrounded one counts, whatever it comes from. With d for either, the
matrix that makes up for it best is

    W + sum(d x^T) (sum(x x^T) + damping)^-1

and how much of that change is more than chance the two halves of the text tell: what one half asks for is tried on the
other one.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.moments import Moments, check_finite
from phiquant.gguf import GGMLType
from phiquant.kernels.cholesky import damped_root, in_blocks, solve
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.ops import Weight

__all__ = ["DAMPING", "Shortfall"]

DAMPING: Final = 0.1
"""What is added to the diagonal of the moments, as a part of its mean: measured best of 0.03 to 3."""

_WIDTH: Final = 1024  # columns of the moments that are added to at a time
_TRIED: Final = 256  # rows of a matrix that tell how much of a change holds

Floats = NDArray[np.float32]


@dataclass(eq=False)
class Shortfall:
    """Of matrices that read the same rows, over the two halves of a text.

    Attributes:
        squares: float32 [columns, columns], sums of x x^T, of both together; what is right of its blocks of `_WIDTH`
            columns is left out until it is asked for.
        products: float32 [2, lacking, columns], sums of d x^T; of what the inputs lack, or the stream.
        counts: int64 [1], rows that were read.
        inputs: whether `products` are of the inputs: then lacking is columns.
    """

    squares: Floats
    products: Floats
    counts: NDArray[np.int64]
    inputs: bool

    @classmethod
    def of_inputs(cls, columns: int) -> "Shortfall":
        """Of no rows; what the inputs lack is to be added."""
        squares, products = (np.zeros((*halves, columns, columns), np.float32) for halves in ((), (2,)))
        return cls(squares, products, np.zeros(1, np.int64), True)

    @classmethod
    def of_stream(cls, columns: int, width: int) -> "Shortfall":
        """Of no rows; what the stream lacks is to be added."""
        squares, products = np.zeros((columns, columns), np.float32), np.zeros((2, width, columns), np.float32)
        return cls(squares, products, np.zeros(1, np.int64), False)

    def add(self, rows: Floats, lacks: Floats, half: int) -> None:
        """Take in inputs [rows, columns] of the first half of a text or the second, and what they lack [rows, lacking].

        The more rows at once the better: a sum is added to as many numbers as the moments have.
        """
        for at in in_blocks(len(self.squares), _WIDTH):
            self.squares[at.start :, at] += rows[:, at.start :].T @ rows[:, at]
        self.products[half] += lacks.T @ rows
        self.counts += len(rows)

    @property
    def moments(self) -> Moments:
        """Of the inputs, of the whole text."""
        self._complete()
        return Moments(self.squares[None], self.counts)

    def _complete(self) -> None:
        for at in in_blocks(len(self.squares), _WIDTH):
            self.squares[at, at.stop :] = self.squares[at.stop :, at].T

    def targets(self, weights: tuple[Weight, ...], name: str) -> tuple[Weight, ...]:
        """The matrices, F32, changed so that they make up for what is lacking, as far as that is more than chance.

        WeightsError if a sum is no number; `name` of a matrix.
        """
        self._complete()
        for found in (self.squares, self.products):
            check_finite(found, name)
        mean = float(np.diagonal(self.squares).mean()) or 1.0
        root = damped_root(self.squares, DAMPING, DAMPING * mean).astype(np.float32, copy=False)
        widened = [dequantize_rows(w.data.reshape(w.rows, -1), w.type, w.rows, w.columns) for w in weights]
        shares = [self._share(matrix, root) for matrix in widened]
        whole = self.products.sum(axis=0)
        for matrix, share in zip(widened, shares, strict=True):
            if share > 0:
                change = solve(root, matrix @ whole if self.inputs else whole.copy())
                matrix += change * np.float32(share)
        return tuple(
            Weight(w.name, GGMLType.F32, w.shape, matrix.reshape(-1).view(np.uint8))
            for w, matrix in zip(weights, widened, strict=True)
        )

    def _share(self, matrix: Floats, root: Floats) -> float:
        """How much of the change holds on the half of the text that did not ask for it, from 0 to 1.

        The s for which s times the change leaves the least of what the other half lacks, both ways together, is
        signal / (signal + chance); the change that the whole text asks for has half as much chance in it.
        """
        if not np.isfinite(matrix).all():
            return 0.0  # what rounds it says so, with the row
        some = np.linspace(0, len(matrix) - 1, min(_TRIED, len(matrix)), dtype=np.int64)
        asked = [matrix[some] @ part if self.inputs else part[some] for part in self.products]
        found = use = 0.0
        for mine, other in ((0, 1), (1, 0)):
            change = solve(root, asked[mine].copy())  # half of it, as the other half is in the moments too
            found += float(np.vdot(change, asked[other]))
            use += float(np.vdot(change @ self.squares, change))
        held = min(max(found / use, 0.0), 1.0) if use > 0 else 0.0
        return 2 * held / (1 + held)
