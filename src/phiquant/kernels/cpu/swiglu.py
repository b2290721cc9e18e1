"""SwiGLU: out[t] = silu(x[t, :n]) * x[t, n:], silu(v) = v / (1 + exp(-v))."""

from __future__ import annotations

from .emit import Emitter, Value
from .pointwise import Pointwise
from .simd import exp

__all__ = ["SWIGLU"]


def _apply(e: Emitter, limit: Value, gate: Value, up: Value) -> Value:
    return gate / (1.0 + exp(e, -gate)) * up


SWIGLU = Pointwise("swiglu", 2, _apply)
