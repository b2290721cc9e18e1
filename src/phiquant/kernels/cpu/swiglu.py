"""SwiGLU: out[t] = silu(x[t, :n]) * x[t, n:], silu(v) = v / (1 + exp(-v))."""

from __future__ import annotations

from ...errors import KernelError
from .emit import F32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, tickets
from .simd import exp
from .target import Target, host

__all__ = ["apply_gate", "bind"]

ARGS = Arguments("count", "x", "out", "width", "pieces")
_LANES, _PIECE = 16, 1024  # channels of a ticket: a row of a large model is shared out, a ticket costs under 1 %


def bind(x: Region, out: Region, target: Target | None = None) -> NativeOp:
    """Gate the halves of rows. Errors: KernelError if the widths do not fit."""
    if x.width != 2 * out.width or x.capacity > out.capacity:
        raise KernelError(f"rows of {x.width} channels cannot be gated into {out.width}")
    pieces = -(-out.width // _PIECE)
    block = ARGS.pack(count=x.count, x=x.address, out=out.address, width=out.width, pieces=pieces)
    return NativeOp(function("swiglu", 4, _emit, target or host()), block, (x, out))


def apply_gate(e: Emitter, g: Value, up: Value) -> Value:
    """silu(g) * up, float32 lanes."""
    return g / (1.0 + exp(e, -g)) * up


def _emit(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    count, x, out, width, pieces = ARGS.read_all(e, block)
    t, single = vec(F32, _LANES), vec(F32, 1)
    with tickets(e, counter, e.load(count, I64) * pieces) as ticket:
        row, start = ticket // pieces, ticket % pieces * _PIECE
        gate, target = x + 8 * width * row, out + 4 * width * row
        up = gate + 4 * width
        stop = e.min(start + _PIECE, width)
        whole = stop - (stop - start) % _LANES
        with e.loop(start, whole, _LANES) as i:
            g = e.load(gate + 4 * i, t)
            e.store(apply_gate(e, g, e.load(up + 4 * i, t)), target + 4 * i)
        with e.loop(whole, stop) as i:
            g = e.load(gate + 4 * i, single)
            e.store(apply_gate(e, g, e.load(up + 4 * i, single)), target + 4 * i)
