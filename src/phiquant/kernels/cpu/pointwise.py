"""Operations that compute each channel from the channels at its place alone: SwiGLU, GELU, GeGELU.

    out[t, c] = f(x[t, c], x[t, n + c], ...), with n = out.width and as many parts of n channels as f takes

`activations` does them on the way into a matrix multiplication, where nothing else reads what they yield.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import KernelError
from .emit import F32, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, float_bits, tickets
from .target import Target, host

__all__ = ["Pointwise", "bind", "body"]

ARGS = Arguments("count", "x", "out", "width", "pieces", "limit")
_LANES, _PIECE = 16, 1024  # channels of a ticket: a row of a large model is shared out, a ticket costs under 1 %


@dataclass(frozen=True)
class Pointwise:
    """One such operation.

    Attributes:
        name: of the kernel.
        parts: parts of a row of x.
        apply: emits f for (emitter, limit, a value of float32 lanes for each part).
        limit: a float32 that f may know; an argument of the kernel, not a part of it.
    """

    name: str
    parts: int
    apply: Callable[..., Value]
    limit: float = 0.0


def bind(f: Pointwise, x: Region, out: Region, target: Target | None = None) -> NativeOp:
    """Compute rows; `out` may be `x` where it has one part. Errors: KernelError if the widths do not fit."""
    if x.width != f.parts * out.width or x.capacity > out.capacity:
        raise KernelError(f"{f.name} of {x.capacity} rows of {x.width} does not fit {out.capacity} rows of {out.width}")
    block = ARGS.pack(
        count=x.count,
        x=x.address,
        out=out.address,
        width=out.width,
        pieces=-(-out.width // _PIECE),
        limit=float_bits(f.limit),
    )
    return NativeOp(function(f.name, 4, body(f), target or host()), block, (x, out))


def body(f: Pointwise) -> Callable[..., None]:
    """The kernel."""

    def kernel(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        count, x, out, width, pieces, limit = ARGS.read_all(e, block)
        bound = limit.trunc(I32).bits(F32)
        with tickets(e, counter, e.load(count, I64) * pieces) as ticket:
            row, start = ticket // pieces, ticket % pieces * _PIECE
            source, target = x + 4 * f.parts * width * row, out + 4 * width * row
            stop = e.min(start + _PIECE, width)
            whole = stop - (stop - start) % _LANES
            for lanes, first, last in ((_LANES, start, whole), (1, whole, stop)):
                with e.loop(first, last, lanes) as i:
                    parts = [e.load(source + 4 * (p * width + i), vec(F32, lanes)) for p in range(f.parts)]
                    e.store(f.apply(e, bound, *parts), target + 4 * i)

    return kernel
