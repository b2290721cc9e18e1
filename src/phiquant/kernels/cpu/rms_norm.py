"""RMSNorm: out[t] = x[t] / sqrt(mean(x[t]²) + epsilon) * weight, in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, float_bits, tickets
from .simd import multiply_add, reduce
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "weight", "out", "width", "epsilon")
_LANES, _CHAINS = 16, 4


def bind(x: Region, weight: NDArray[np.float32], epsilon: float, out: Region, target: Target | None = None) -> NativeOp:
    """Normalise rows; `out` may be `x`. Errors: KernelError if the widths differ."""
    if weight.ndim != 1 or weight.dtype != np.float32 or not x.width == out.width == len(weight):
        raise KernelError(f"a norm over {x.width} channels cannot have {weight.shape} weights and {out.width} results")
    if x.capacity > out.capacity:
        raise KernelError("a norm has room for fewer rows of results than it reads")
    weight = weight.copy()  # not read from the file again
    block = ARGS.pack(
        count=x.count,
        x=x.address,
        weight=weight.ctypes.data,
        out=out.address,
        width=x.width,
        epsilon=float_bits(epsilon),
    )
    return NativeOp(function("rms_norm", 4, _emit, target or host()), block, (x, weight, out))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, weight, out, width, epsilon = ARGS.read_all(e, block)
    t, step = vec(F32, _LANES), _LANES * _CHAINS
    whole = width - width % step
    with tickets(e, counter, e.load(count, I64)) as row:
        source, target = x + 4 * width * row, out + 4 * width * row
        sums = [e.var(e.const(t, 0.0)) for _ in range(_CHAINS)]
        with e.loop(0, whole, step) as i:
            for chain, total in enumerate(sums):
                v = e.load(source + 4 * (i + _LANES * chain), t)
                total.set(multiply_add(e, v, v, total.get()))
        a, b, c, d = (s.get() for s in sums)
        tail = e.var(reduce(e, (a + b) + (c + d)))
        with e.loop(whole, width) as i:
            v = e.load(source + 4 * i, F32)
            tail.set(multiply_add(e, v, v, tail.get()))
        mean = tail.get() / width.to_float() + epsilon.trunc(I32).bits(F32)
        scale = 1.0 / e.sqrt(mean)
        with e.loop(0, whole, _LANES) as i:
            e.store(e.load(source + 4 * i, t) * scale * e.load(weight + 4 * i, t), target + 4 * i)
        with e.loop(whole, width) as i:
            e.store(e.load(source + 4 * i, F32) * scale * e.load(weight + 4 * i, F32), target + 4 * i)
