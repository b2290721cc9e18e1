"""Quantizing rows with error feedback: what one column's rounding leaves over is carried into the columns after it.

Needs the second moments of a matrix's inputs, whole and not only their diagonal (which an importance matrix is). The
result is made of the same blocks as any other, for any reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.block import join
from phiquant.quants.feedback import STEPPED, round_columns

__all__ = ["DAMPING", "SUPPORTED", "Factor", "factorize", "feedback_rows"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUPPORTED: frozenset[GGMLType] = frozenset(STEPPED)
"""Types that `feedback_rows` writes."""

DAMPING = 0.01
"""What is added to the diagonal of the moments, as a part of its mean."""


@dataclass(frozen=True)
class Factor:
    """Moments H of a matrix's inputs, damped, as unit diag(variances) unit^T.

    Attributes:
        unit: float32 [n, n], upper triangular with ones on the diagonal.
        variances: float32 [n], positive; scaled so that the mean of H's diagonal is 1.
    """

    unit: Floats
    variances: Floats


def factorize(moments: npt.NDArray[np.floating[Any]], *, damping: float = DAMPING) -> Factor:
    """The factors of moments [n, n], the sum of x^T x over a matrix's inputs x [1, n].

    Inputs that were always zero, and fewer inputs than columns, are fine: `damping` times the mean of the diagonal is
    added to it.

    Raises:
        WeightsError: the moments are not square, not finite, or not those of any inputs.
    """
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise WeightsError(f"moments of inputs must be a square matrix, not of shape {moments.shape}")
    if not damping > 0:
        raise WeightsError(f"the damping of moments must be positive, not {damping:g}")
    diagonal = np.diagonal(moments).astype(np.float64)
    mean = float(diagonal.mean()) if len(diagonal) else 0.0
    if not (np.isfinite(mean) and np.isfinite(moments).all()) or (diagonal < 0).any():
        raise WeightsError("moments of inputs hold NaN, infinity or negative squares; collect them again")
    # A Cholesky factor from the last column upwards: of the matrix turned round, turned back.
    turned = moments[::-1, ::-1].astype(np.float64)
    if mean > 0:
        turned /= mean
    n = len(turned)
    turned.flat[:: n + 1] += damping if mean > 0 else 1.0
    try:
        root = np.linalg.cholesky(turned)[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise WeightsError(
            f"moments of inputs are not those of any inputs even with a damping of {damping:g}; collect them again"
        ) from None
    scale = np.diagonal(root)
    return Factor(np.ascontiguousarray(root / scale, np.float32), np.ascontiguousarray(scale * scale, np.float32))


def feedback_rows(x: Floats, type: GGMLType, factor: Factor, *, threads: int = 0) -> Bytes:
    """Rows of weights as blocks of `type`, chosen for the least error of the products with inputs of these moments.

    Args:
        x: float32 [rows, n], contiguous.
        type: one of `SUPPORTED`.
        factor: of the moments [n, n] of the inputs.
        threads: how many work at once; 0: one for each processor. The bytes do not depend on it.

    Returns:
        uint8 [rows, row_bytes].

    Raises:
        WeightsError: shapes do not fit, or a row holds NaN, infinity or too large values.
        UnsupportedError: a type that is not rounded with feedback.
    """
    if type not in SUPPORTED:
        known = ", ".join(entry.name for entry in sorted(SUPPORTED))
        raise UnsupportedError(f"weights are not rounded to {type.name} with error feedback; use one of {known}")
    if x.ndim != 2 or x.dtype != np.float32 or not x.flags.c_contiguous:
        raise WeightsError(f"rows to quantize must be a contiguous float32 matrix, not {x.dtype} of shape {x.shape}")
    rows, n = x.shape
    if factor.unit.shape != (n, n):
        raise WeightsError(f"moments of {len(factor.unit)} inputs do not fit rows of {n} weights")
    if n % type.block_elements:
        raise WeightsError(f"rows of {n} values do not fill {type.name} blocks of {type.block_elements}")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise WeightsError(f"row {int(finite.argmin())} of the weights holds NaN or infinity; repair it")
    out = np.empty((rows, n // type.block_elements, type.block_bytes), np.uint8)
    entry, how, width = quants.format_of(type), STEPPED[type], type.block_elements
    errors = np.zeros((rows, n), np.float32)
    for start in range(0, n, width):
        columns = slice(start, start + width)
        targets = x[:, columns] + errors[:, :start] @ factor.unit[:start, columns]
        data = quantize_rows(targets, GGMLType.F32, type, factor.variances[columns])
        blocks = data.reshape(-1).view(entry.dtype)
        levels, errors[:, columns] = round_columns(
            targets, factor.unit[columns, columns], how.grid(blocks), how, x[:, columns]
        )
        join(blocks, entry.planes, levels + how.stored)
        out[:, start // width] = blocks.view(np.uint8).reshape(rows, -1)
    return out.reshape(rows, -1)
