"""GELU: out[t] = x[t] / 2 * (1 + tanh(u)), u = sqrt(2 / pi) (x[t] + 0.044715 x[t]³).

Since (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), it is x / (1 + exp(-2 u)): no tanh, and for negative x no difference of
what is nearly equal.
"""

from __future__ import annotations

import math

from .emit import Emitter, Value
from .pointwise import Pointwise
from .simd import exp, multiply_add

__all__ = ["GELU"]

_FACTOR = -2 * math.sqrt(2 / math.pi)


def _apply(e: Emitter, limit: Value, x: Value) -> Value:
    exponent = x * multiply_add(e, x * x, e.const(x.type, 0.044715 * _FACTOR), e.const(x.type, _FACTOR))
    return x / (1.0 + exp(e, exponent))


GELU = Pointwise("gelu", 1, _apply)
