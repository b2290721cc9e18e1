"""Keep: kept[t] = x[t], the rows of a buffer in memory of the caller's; and which expert each route has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .route import Routes
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "kept", "width", "routes", "experts", "chosen")
_LANES = 16


def bind(
    x: Region,
    kept: NDArray[np.float32],
    chosen: NDArray[np.int32] | None = None,
    routes: Routes | None = None,
    target: Target | None = None,
) -> NativeOp:
    """Copy rows to `kept`, float32 with at least as many rows as x has room for, and its width.

    With `routes` the expert of each route of the step goes to `chosen`, int32 with room for all of them. Errors:
    KernelError if they do not fit.
    """
    if kept.dtype != np.float32 or kept.ndim != 2 or kept.shape[1] != x.width or not kept.flags.c_contiguous:
        raise KernelError(f"rows of {x.width} channels cannot be kept in {kept.shape} numbers of {kept.dtype}")
    if len(kept) < x.capacity:
        raise KernelError(f"{x.capacity} rows cannot be kept where there is room for {len(kept)}")
    if (routes is None) != (chosen is None):
        raise KernelError("experts are kept of routes, and of nothing else")
    none = np.zeros(1, np.int64)
    count, experts, place = int(none.ctypes.data), 0, 0
    if routes is not None and chosen is not None:
        if (
            chosen.dtype != np.int32
            or chosen.ndim != 1
            or len(chosen) < routes.capacity
            or not chosen.flags.c_contiguous
        ):
            raise KernelError(f"{routes.capacity} routes cannot be kept in {chosen.shape} numbers of {chosen.dtype}")
        count, experts, place = routes.count, int(routes.chosen.ctypes.data), int(chosen.ctypes.data)
    block = ARGS.pack(
        count=x.count,
        x=x.address,
        kept=kept.ctypes.data,
        width=x.width,
        routes=count,
        experts=experts,
        chosen=place,
    )
    return NativeOp(function("keep", 4, _emit, target or host()), block, (x, kept, chosen, routes, none))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, kept, width, routes, experts, chosen = ARGS.read_all(e, block)
    t = vec(F32, _LANES)
    whole = width - width % _LANES
    with tickets(e, counter, e.load(count, I64)) as row:
        source, target = x + 4 * width * row, kept + 4 * width * row
        with e.loop(0, whole, _LANES) as i:
            e.store(e.load(source + 4 * i, t), target + 4 * i)
        with e.loop(whole, width) as i:
            e.store(e.load(source + 4 * i, F32), target + 4 * i)
        with e.when(row == 0), e.loop(0, e.load(routes, I64)) as i:
            e.store(e.load(experts + 4 * i, I32), chosen + 4 * i)
