"""SumSquares: sums[c] += x[t, c]² over the rows in their order, and a count of the rows.

The product of two float32 is exact in float64, so there is one rounding to a row, and one order of them: the bits of
the sums depend neither on threads nor on how a text was cut into steps, nor on whether the processor contracts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, F64, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .route import Routes
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "sums", "counts", "width", "pieces")
_ROUTED = Arguments("x", "sums", "counts", "width", "pieces", "starts", "order", "divisor", "experts")
_LANES, _ROWS = 8, 4
_PIECE = 512  # columns of a ticket: their sums, 4 KB, stay in the first cache while all rows go by


def bind(
    x: Region,
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    target: Target | None = None,
    routes: Routes | None = None,
) -> NativeOp:
    """Add up squares. `sums` float64 [matrices, width of x], `counts` int64 [matrices].

    There is one matrix, or with `routes` one for each expert, which gets the rows that are routed to it; x then has a
    row for each token, or with the count of the routes for each of those. Errors: KernelError if they do not fit.
    """
    matrices = routes.experts if routes else 1
    if (
        sums.dtype != np.float64
        or counts.dtype != np.int64
        or (sums.shape, counts.shape) != ((matrices, x.width), (matrices,))
        or not sums.flags.c_contiguous
    ):
        raise KernelError(f"squares of {x.width} columns do not fit {sums.shape} sums and {counts.shape} counts")
    pieces = -(-x.width // _PIECE)
    shared = {
        "x": x.address,
        "sums": sums.ctypes.data,
        "counts": counts.ctypes.data,
        "width": x.width,
        "pieces": pieces,
    }
    if routes is None:
        block = ARGS.pack(count=x.count, **shared)
        return NativeOp(function("sum_squares", 4, _emit, target or host()), block, (x, sums, counts))
    divisor = 1 if x.count == routes.count else routes.used
    if x.capacity * divisor < routes.capacity:
        raise KernelError(f"{routes.capacity} routes do not fit {x.capacity} rows whose squares are added up")
    block = _ROUTED.pack(
        starts=routes.starts.ctypes.data,
        order=routes.order.ctypes.data,
        divisor=divisor,
        experts=routes.experts,
        **shared,
    )
    kernel = function("sum_squares.routed", 4, _emit_routed, target or host())
    return NativeOp(kernel, block, (x, sums, counts, routes))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, sums, counts, width, pieces = ARGS.read_all(e, block)
    rows = e.load(count, I64)
    with tickets(e, counter, pieces) as piece:
        _piece(e, piece, width, rows, sums, lambda row: x + 4 * width * row)
        with e.when(piece == 0):
            e.store(e.load(counts, I64) + rows, counts)


def _emit_routed(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    x, sums, counts, width, pieces, starts, order, divisor, experts = _ROUTED.read_all(e, block)
    with tickets(e, counter, experts * pieces) as ticket:
        expert, piece = ticket // pieces, ticket % pieces
        first = e.load(starts + 8 * expert, I64)
        rows = e.load(starts + 8 * expert + 8, I64) - first

        def at(row: Value) -> Value:
            return x + 4 * width * e.load(order + 4 * (first + row), I32).sext(I64).udiv(divisor)

        _piece(e, piece, width, rows, sums + 8 * width * expert, at)
        with e.when(piece == 0):
            e.store(e.load(counts + 8 * expert, I64) + rows, counts + 8 * expert)


def _piece(e: Emitter, piece: Value, width: Value, rows: Value, sums: Value, at: Callable[[Value], Value]) -> None:
    """Add the squares of some columns, a ticket's; `at` gives the address of a row."""
    start = piece * _PIECE
    stop = e.min(start + _PIECE, width)
    whole = stop - (stop - start) % _LANES

    def add(row: Value, amount: int) -> None:
        sources = [at(row + i) for i in range(amount)]
        for lanes, first, last in ((_LANES, start, whole), (1, whole, stop)):
            with e.loop(first, last, lanes) as c:
                total = e.load(sums + 8 * c, vec(F64, lanes))
                for source in sources:
                    v = e.load(source + 4 * c, vec(F32, lanes)).fpext(F64)
                    total = total + v * v
                e.store(total, sums + 8 * c)

    together = rows - rows % _ROWS
    with e.loop(0, together, _ROWS) as row:
        add(row, _ROWS)
    with e.loop(together, rows) as row:
        add(row, 1)
