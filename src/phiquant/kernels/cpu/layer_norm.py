"""LayerNorm: out[t] = (x[t] - m) / sqrt(mean((x[t] - m)²) + epsilon) * weight + bias, m = mean(x[t]), in float32.

Three passes over a row, which stays in the first cache. The first yields the mean m0 as float32, to some roundings of
the sum; the second, of d = x - m0, the sum of squares and the sum that is left over, so that

    m = m0 + mean(d)        mean((x - m)²) = mean(d²) - mean(d)²

Where a row lies far from zero beside its spread, d is nearly exact and mean(d) makes good what m0 lacks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import F32, I32, I64, Emitter, Value, Variable, vec
from .library import function
from .operation import Arguments, NativeOp, Region, float_bits, tickets
from .simd import multiply_add, reduce
from .target import Target, host

__all__ = ["bind"]

ARGS = Arguments("count", "x", "weight", "bias", "out", "width", "epsilon")
_LANES, _CHAINS = 16, 4
_STEP = _LANES * _CHAINS


def bind(
    x: Region,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    epsilon: float,
    out: Region,
    target: Target | None = None,
) -> NativeOp:
    """Normalise rows; `out` may be `x`. Errors: KernelError if the widths differ."""
    floats = weight.dtype == np.float32 == bias.dtype
    if not floats or not x.width == out.width or not weight.shape == bias.shape == (x.width,):
        raise KernelError(
            f"a norm over {x.width} channels cannot have {weight.shape} weights, {bias.shape} biases and {out.width} "
            "results"
        )
    if x.capacity > out.capacity:
        raise KernelError("a norm has room for fewer rows of results than it reads")
    weight, bias = weight.copy(), bias.copy()  # not read from the file again
    block = ARGS.pack(
        count=x.count,
        x=x.address,
        weight=weight.ctypes.data,
        bias=bias.ctypes.data,
        out=out.address,
        width=x.width,
        epsilon=float_bits(epsilon),
    )
    return NativeOp(function("layer_norm", 4, _emit, target or host()), block, (x, weight, bias, out))


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, weight, bias, out, width, epsilon = ARGS.read_all(e, block)
    channels = width.to_float()
    whole = width - width % _STEP
    with tickets(e, counter, e.load(count, I64)) as row:
        source, target = x + 4 * width * row, out + 4 * width * row

        sums = _chains(e)
        with e.loop(0, whole, _STEP) as i:
            for chain, total in enumerate(sums):
                total.set(total.get() + e.load(source + 4 * (i + _LANES * chain), vec(F32, _LANES)))
        tail = e.var(_combined(e, sums))
        with e.loop(whole, width) as i:
            tail.set(tail.get() + e.load(source + 4 * i, F32))
        first = tail.get() / channels

        squares, rests = _chains(e), _chains(e)
        with e.loop(0, whole, _STEP) as i:
            for chain, (square, rest) in enumerate(zip(squares, rests, strict=True)):
                d = e.load(source + 4 * (i + _LANES * chain), vec(F32, _LANES)) - first
                square.set(multiply_add(e, d, d, square.get()))
                rest.set(rest.get() + d)
        square, rest = e.var(_combined(e, squares)), e.var(_combined(e, rests))
        with e.loop(whole, width) as i:
            d = e.load(source + 4 * i, F32) - first
            square.set(multiply_add(e, d, d, square.get()))
            rest.set(rest.get() + d)
        off = rest.get() / channels
        # Of equal channels the difference may come out below zero by a rounding.
        variance = e.max(0.0, square.get() / channels - off * off)
        scale = 1.0 / e.sqrt(variance + epsilon.trunc(I32).bits(F32))

        for kind, step, start, stop in ((vec(F32, _LANES), _LANES, e.integer(0), whole), (F32, 1, whole, width)):
            with e.loop(start, stop, step) as i:
                d = e.load(source + 4 * i, kind) - first - off
                scaled = d * scale * e.load(weight + 4 * i, kind)
                e.store(scaled + e.load(bias + 4 * i, kind), target + 4 * i)


def _chains(e: Emitter) -> list[Variable]:
    return [e.var(e.const(vec(F32, _LANES), 0.0)) for _ in range(_CHAINS)]


def _combined(e: Emitter, chains: list[Variable]) -> Value:
    a, b, c, d = (chain.get() for chain in chains)
    return reduce(e, (a + b) + (c + d))
