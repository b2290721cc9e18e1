"""GeGELU: out[t] = a sigmoid(1.702 a) * (b + 1), with a = min(x[t, :n], limit) and b = x[t, n:] within +- limit."""

from __future__ import annotations

from .emit import Emitter, Value
from .pointwise import Pointwise
from .simd import exp

__all__ = ["gegelu"]


def gegelu(limit: float) -> Pointwise:
    """The operation with a limit."""
    return Pointwise("gegelu", 2, _apply, limit)


def _apply(e: Emitter, limit: Value, x: Value, y: Value) -> Value:
    # Of a NaN and a number, min and max yield their second operand: a NaN stays one.
    bound = e.lift(limit, x.type)
    a, b = e.min(bound, x), e.max(-bound, e.min(bound, y))
    return a / (1.0 + exp(e, a * -1.702)) * (b + 1.0)
