"""Quantizing rows with error feedback: what one column's rounding leaves over is carried into the columns after it.

Needs the second moments of a matrix's inputs, whole and not only their diagonal (which an importance matrix is). The
result is made of the same blocks as any other, for any reader.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cholesky import damped_root, in_blocks
from phiquant.kernels.cpu.feedback_product import ROWS
from phiquant.kernels.cpu.team import available_threads
from phiquant.kernels.feedback_slab import FED, PANELS, Corner, Inner, Slab

__all__ = ["DAMPING", "SUPPORTED", "Factor", "check_rows", "factorize", "feedback_rows"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUPPORTED: frozenset[GGMLType] = frozenset(FED)
"""Types that `feedback_rows` writes."""

DAMPING = 0.03
"""What is added to the diagonal of the moments for the first sweep, as a part of its mean. Errors are carried less far
with more of it; the sweeps after the first use a tenth of it and lose nothing.
"""

ROUNDS = 3
"""How often scales and levels of a block are fitted to one another before the next one."""

SWEEPS = 1
"""How often all blocks of a row are gone through once more."""

_LARGEST = 1024.0  # magnitude of a weight: scales of half precision hold many times that, which feedback can make of it
_WIDTH = 256  # columns that are chosen together


@dataclass(frozen=True)
class Factor:
    """Moments of a matrix's inputs, scaled so that the mean of their diagonal is 1.

    Rows and columns stand in the order that columns of weights are rounded in, those of large inputs first: whole
    blocks of 256, within them sub-blocks of 32, 16 and 8.

    Attributes:
        order: int64 [n], the column that stands at each place.
        unit: float32 [n, n], upper triangular with ones on the diagonal.
        variances: float32 [n], positive: unit diag(variances) unit^T are the damped moments.
        moments: float32 [n, n], damped by a tenth as much.
    """

    order: npt.NDArray[np.int64]
    unit: Floats
    variances: Floats
    moments: Floats

    @cached_property
    def corners(self) -> tuple[Corner, ...]:
        """Of the moments, for every 256 columns."""
        return tuple(Corner.of(self.moments[at, at]) for at in in_blocks(len(self.unit), _WIDTH))

    @cached_property
    def inner(self) -> tuple[Inner, ...]:
        """Of the factors, for every 256 columns."""
        return tuple(Inner.of(self.unit[at, at], self.variances[at]) for at in in_blocks(len(self.unit), _WIDTH))


def factorize(
    moments: npt.NDArray[np.floating[Any]], *, damping: float = DAMPING, by_activation: bool = True
) -> Factor:
    """The factors of moments [n, n], the sum of x^T x over a matrix's inputs x [1, n].

    Inputs that were always zero, and fewer inputs than columns, are fine: `damping` times the mean of the diagonal is
    added to it. `by_activation`: columns are rounded in the order of their inputs' squares; else as they stand.

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
    order = _order(diagonal) if by_activation else np.arange(len(diagonal))
    scaled = moments[np.ix_(order, order)].astype(np.float32)
    scaled *= 1 / (mean or 1.0)
    damping = damping if mean > 0 else 1.0
    at = np.s_[:: len(scaled) + 1]
    # A Cholesky factor from the last column upwards: of the matrix turned round, turned back.
    root = damped_root(np.ascontiguousarray(scaled[::-1, ::-1]), damping, damping)[::-1, ::-1]
    scale = np.diagonal(root)
    unit, variances = np.ascontiguousarray(root / scale, np.float32), scale.astype(np.float32) ** 2
    scaled.flat[at] += damping / 10
    return Factor(order, unit, variances, scaled)


def _order(squares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Columns by the squares of their inputs, largest first, blocks and sub-blocks kept together; an odd block last.

    Errors in the first columns find most others to make up for them.
    """
    order = np.arange(len(squares))
    whole = len(squares) // _WIDTH * _WIDTH
    for part, sizes in ((slice(0, whole), (_WIDTH, 32, 16, 8)), (slice(whole, None), (32, 16, 8))):
        group = order[part][None]
        if group.size % sizes[0]:
            continue  # no format has such rows
        for size in sizes:
            pieces = group.reshape(len(group), group.shape[1] // size, size)
            first = np.argsort(-squares[pieces].sum(axis=2), axis=1, kind="stable")
            group = np.take_along_axis(pieces, first[:, :, None], axis=1).reshape(-1, size)
        order[part] = group.reshape(-1)
    return order


def check_rows(x: Floats) -> None:
    """WeightsError where a row holds what no scale, or what is carried on from it, would be safe with."""
    good = np.isfinite(x).all(axis=1)
    if not good.all():
        raise WeightsError(f"row {int(good.argmin())} of the weights holds NaN or infinity; repair it")
    if x.size and max(float(x.max()), -float(x.min())) > _LARGEST:
        row = int(np.abs(x).max(axis=1).argmax())
        raise WeightsError(
            f"row {row} of the weights holds values of magnitude {np.abs(x[row]).max():g}, and error feedback takes "
            f"them up to {_LARGEST:g}; quantize this tensor without it"
        )


def _step(rows: int, threads: int) -> int:
    """Rows of a slab: as many for each thread, whole panels, at most `PANELS` of them."""
    panels = -(-rows // ROWS)
    slabs = -(-panels // (PANELS * threads)) * threads
    return -(-panels // slabs) * ROWS


def feedback_rows(
    x: Floats, type: GGMLType, factor: Factor, *, threads: int = 0, rounds: int = ROUNDS, sweeps: int = SWEEPS
) -> Bytes:
    """Rows of weights as blocks of `type`, chosen for the least error of the products with inputs of these moments.

    Args:
        x: float32 [rows, n], contiguous.
        type: one of `SUPPORTED`.
        factor: of the moments [n, n] of the inputs.
        threads: how many work at once; 0: one for each processor. The bytes of a row depend neither on it nor on the
            rows beside it.
        rounds: how often scales and levels of a block are fitted to one another before the next one.
        sweeps: how often all blocks are gone through once more; each takes twice as long as what comes before.

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
    check_rows(x)
    if not x.size:
        return np.empty((rows, type.row_bytes(n)), np.uint8)
    count = threads or available_threads()
    step, starts = _step(rows, count), range(0, n, _WIDTH)

    def work(first: int) -> Bytes:
        slab = Slab(x[first : first + step], type, factor.order)
        try:
            return choose(slab)
        except WeightsError as error:  # what is carried on grew out of bounds
            raise WeightsError(f"rows from {first} on, with what feedback adds to them: {error}") from None

    def choose(slab: Slab) -> Bytes:
        for start, inner in zip(starts, factor.inner, strict=True):
            slab.begin(start, factor.unit, inner, rounds)
        for _ in range(sweeps):
            for start, corner in zip(starts, factor.corners, strict=True):
                slab.again(start, factor.moments, corner)
        return slab.bytes()

    with ThreadPoolExecutor(min(count, -(-rows // step))) as pool:
        return np.concatenate(list(pool.map(work, range(0, rows, step))))
