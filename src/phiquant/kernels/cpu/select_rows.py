"""Select: out[i] = x[outputs[i]], the rows whose logits are wanted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "indices", "out", "width")
_LANES = 16


def bind(x: Region, indices: NDArray[np.int32], out: Region, target: Target | None = None) -> NativeOp:
    """Copy rows. The indices, int32 [rows of out], must name rows of x when a step runs. Errors: KernelError."""
    if x.width != out.width or indices.dtype != np.int32 or len(indices) < out.capacity:
        raise KernelError(f"rows of {x.width} channels cannot be picked into {out.width} by {indices.shape} indices")
    block = ARGS.pack(count=out.count, x=x.address, indices=indices.ctypes.data, out=out.address, width=x.width)
    return NativeOp(function("select_rows", 4, _emit, target or host()), block, (x, indices, out))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, indices, out, width = ARGS.read_all(e, block)
    t = vec(F32, _LANES)
    whole = width - width % _LANES
    with tickets(e, counter, e.load(count, I64)) as row:
        index = e.load(indices + 4 * row, I32).sext(I64)
        source, target = x + 4 * width * index, out + 4 * width * row
        with e.loop(0, whole, _LANES) as i:
            e.store(e.load(source + 4 * i, t), target + 4 * i)
        with e.loop(whole, width) as i:
            e.store(e.load(source + 4 * i, F32), target + 4 * i)
