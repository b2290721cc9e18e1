"""SumSquares: sums[c] += x[t, c]² over the rows in their order, and a count of the rows.

The product of two float32 is exact in float64, so there is one rounding to a row, and one order of them: the bits of
the sums depend neither on threads nor on how a text was cut into steps, nor on whether the processor contracts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, F64, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "sums", "counts", "width", "pieces")
_LANES, _ROWS = 8, 4
_PIECE = 512  # columns of a ticket: their sums, 4 KB, stay in the first cache while all rows go by


def bind(x: Region, sums: NDArray[np.float64], counts: NDArray[np.int64], target: Target | None = None) -> NativeOp:
    """Add up squares. `sums` float64 [1, width of x], `counts` int64 [1]. Errors: KernelError if they are not that."""
    if (
        sums.dtype != np.float64
        or counts.dtype != np.int64
        or (sums.shape, counts.shape) != ((1, x.width), (1,))
        or not sums.flags.c_contiguous
    ):
        raise KernelError(f"squares of {x.width} columns do not fit {sums.shape} sums and {counts.shape} counts")
    pieces = -(-x.width // _PIECE)
    block = ARGS.pack(
        count=x.count,
        x=x.address,
        sums=sums.ctypes.data,
        counts=counts.ctypes.data,
        width=x.width,
        pieces=pieces,
    )
    return NativeOp(function("sum_squares", 4, _emit, target or host()), block, (x, sums, counts))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, sums, counts, width, pieces = ARGS.read_all(e, block)
    rows = e.load(count, I64)
    together = rows - rows % _ROWS
    with tickets(e, counter, pieces) as piece:
        start = piece * _PIECE
        stop = e.min(start + _PIECE, width)
        whole = stop - (stop - start) % _LANES

        def add(row: Value, amount: int) -> None:
            """Some rows, to the sums of this piece."""
            for lanes, first, last in ((_LANES, start, whole), (1, whole, stop)):
                with e.loop(first, last, lanes) as c:
                    total = e.load(sums + 8 * c, vec(F64, lanes))
                    for i in range(amount):
                        v = e.load(x + 4 * (width * (row + i) + c), vec(F32, lanes)).fpext(F64)
                        total = total + v * v
                    e.store(total, sums + 8 * c)

        with e.loop(0, together, _ROWS) as row:
            add(row, _ROWS)
        with e.loop(together, rows) as row:
            add(row, 1)
        with e.when(piece == 0):
            e.store(e.load(counts, I64) + rows, counts)
