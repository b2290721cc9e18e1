"""Embed: out[t] = scale * row tokens[t] of the weight, widened to float32.

This is the one operation that runs from Python: its rows are gathered from the mapped file, so that a vocabulary of
200,000 tokens is never unpacked, nor even read, as a whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from ..dequantize import dequantize_rows
from ..ops import Weight
from .operation import Region

__all__ = ["Embedding"]


class Embedding:
    """The rows of a weight, looked up. Errors: KernelError if the weight does not fit `out`."""

    def __init__(self, weight: Weight, tokens: NDArray[np.int32], out: Region, scale: float = 1.0) -> None:
        if len(weight.shape) != 2 or weight.columns != out.width or len(tokens) < out.capacity:
            raise KernelError(f"{weight.name} of shape {weight.shape} does not fit rows of {out.width} channels")
        if not out.array.flags.c_contiguous:
            raise KernelError(f"rows of {weight.name} are looked up into a buffer, not into some columns of one")
        self._weight, self._tokens, self._out, self._scale = weight, tokens, out, np.float32(scale)
        self._rows = weight.data.reshape(weight.rows, -1)

    def run(self, count: int) -> None:
        """Look up the first `count` tokens, which must be rows of the weight."""
        w = self._weight
        picked = self._rows[self._tokens[:count]]
        rows = dequantize_rows(picked, w.type, count, w.columns)
        np.multiply(rows, self._scale, out=self._out.array[:count])

    def compile(self) -> None:
        """Make the kernel, or find it in the cache, by looking up a row for nothing."""
        w = self._weight
        dequantize_rows(self._rows[:1], w.type, 1, w.columns)
