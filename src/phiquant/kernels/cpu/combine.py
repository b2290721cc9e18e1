"""Combine: out[t] += Σ weight of r * x[r] over the routes r of t, in the order in which they were chosen."""

from __future__ import annotations

from ...errors import KernelError
from .emit import F32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .route import Routes
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "weights", "out", "width", "used", "pieces")
_LANES, _PIECE = 16, 1024  # channels of a ticket


def bind(routes: Routes, x: Region, out: Region, target: Target | None = None) -> NativeOp:
    """Add up rows [routes, width] in [tokens, width]. Errors: KernelError if they do not fit."""
    if x.width != out.width or min(x.capacity, routes.capacity) < out.capacity * routes.used or x.count != routes.count:
        raise KernelError(
            f"rows of {x.width} channels, {routes.used} to a token, cannot be combined in {out.capacity} of {out.width}"
        )
    block = ARGS.pack(
        count=out.count,
        x=x.address,
        weights=routes.weights.ctypes.data,
        out=out.address,
        width=x.width,
        used=routes.used,
        pieces=-(-x.width // _PIECE),
    )
    return NativeOp(function("combine", 4, _emit, target or host()), block, (routes, x, out))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, weights, out, width, used, pieces = ARGS.read_all(e, block)
    with tickets(e, counter, e.load(count, I64) * pieces) as ticket:
        token, start = ticket // pieces, ticket % pieces * _PIECE
        first, target = token * used, out + token * width * 4
        stop = e.min(start + _PIECE, width)
        whole = stop - (stop - start) % _LANES
        for lanes, begin, end in ((_LANES, start, whole), (1, whole, stop)):
            with e.loop(begin, end, lanes) as c:
                total = e.var(e.load(target + 4 * c, vec(F32, lanes)))
                with e.loop(first, first + used) as route:
                    v = e.load(x + 4 * (route * width + c), vec(F32, lanes))
                    total.set(total.get() + e.splat(e.load(weights + 4 * route, F32), lanes) * v)
                e.store(total.get(), target + 4 * c)
