"""Executes a Program in NumPy, one operation after the other: the living definition of what each operation means.

Sums run in float64 and results are rounded to float32 once, so that what another backend gives differs from this one by
its own rounding alone. Nothing here is fast, and nothing is clever.
"""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import KernelError
from phiquant.kernels import ops
from phiquant.kernels.cache_types import check_cache
from phiquant.kernels.reference.activations import activation_block, round_activations
from phiquant.quants import dequantize, quantize

__all__ = ["ReferenceBackend", "ReferenceExecutable"]

Floats = NDArray[np.float32]

# Rows of a matrix that are widened to float64 at a time: bounds memory for vocabularies of 200 k.
ROWS: Final = 8192


class ReferenceBackend:
    """The NumPy backend; it takes every type that `quants` reads."""

    name = "reference"

    def prepare(self, program: ops.Program, capacity: ops.Capacity) -> "ReferenceExecutable":
        """Widen the weights to float32 and allocate the cache."""
        return ReferenceExecutable(program, capacity)


class ReferenceExecutable:
    """A Program with its weights as float32 arrays and its cache; `ops.Executable` says what the methods do."""

    threads = 1  # of ours; NumPy's own are its affair

    def __init__(self, program: ops.Program, capacity: ops.Capacity) -> None:
        self.program, self.capacity = program, capacity
        self._weights: dict[int, Floats] = {}
        for operation in program.operations:
            if isinstance(operation, ops.Embed | ops.RMSNorm | ops.MatMul):
                w = operation.weight
                if id(w) not in self._weights:  # a tied embedding is used twice
                    self._weights[id(w)] = dequantize(w.data, w.type, w.shape)
        a = program.attention
        check_cache(capacity.cache_type, a.head_size)
        row = capacity.cache_type.row_bytes(a.kv_width)
        shape = (2, program.layers, capacity.pages, capacity.page_tokens, row)
        self._cache = np.zeros(shape, np.uint8)  # keys, then values; a row holds the heads of a token
        self._cancelled = threading.Event()
        self._execute: dict[type, Callable[[Any, ops.Step], None]] = {
            ops.Embed: self._embed,
            ops.RMSNorm: self._rms_norm,
            ops.MatMul: self._matmul,
            ops.RotateStore: self._rotate_store,
            ops.Attention: self._attention,
            ops.SwiGLU: self._swiglu,
            ops.Select: self._select,
            ops.SumSquares: self._sum_squares,
        }
        self._rows: dict[int, Floats] = {}

    def run(self, step: ops.Step) -> Floats:
        """Execute; the logits [outputs, vocabulary]."""
        step.check(self.program, self.capacity)
        self._cancelled.clear()
        counts = {"tokens": len(step.tokens), "outputs": len(step.outputs)}
        self._rows = {id(b): np.full((counts[b.rows], b.width), np.nan, np.float32) for b in self.program.buffers}
        for operation in self.program.operations:
            if self._cancelled.is_set():
                raise KernelError("the step was cancelled")
            self._execute[type(operation)](operation, step)
        logits = self._rows[id(self.program.logits)]
        self._rows = {}
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the cache, all layers."""
        self._cache[:, :, target] = self._cache[:, :, source]

    def cancel(self) -> None:
        """From any thread: end the running step; its `run` raises KernelError."""
        self._cancelled.set()

    def close(self) -> None:
        """Let go of weights and cache."""
        self._weights.clear()
        self._cache = self._cache[:, :, :0]

    def _embed(self, op: ops.Embed, step: ops.Step) -> None:
        self._rows[id(op.out)][:] = self._weights[id(op.weight)][step.tokens]

    def _rms_norm(self, op: ops.RMSNorm, step: ops.Step) -> None:
        x = self._rows[id(op.x)].astype(np.float64)
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + op.epsilon)
        self._rows[id(op.out)][:] = x * scale * self._weights[id(op.weight)]

    def _matmul(self, op: ops.MatMul, step: ops.Step) -> None:
        """The product of rounded activations and dequantized weights, which is what exact integer sums amount to."""
        x = self._rows[id(op.x)]
        block = activation_block(op.weight.type)
        if block:
            levels, scale = round_activations(x, block)
            wide = levels.astype(np.float64) * np.repeat(scale, block, axis=1)
        else:
            wide = x.astype(np.float64)
        weights, out = self._weights[id(op.weight)], self._rows[id(op.out)]
        for row in range(0, len(weights), ROWS):
            product = (wide @ weights[row : row + ROWS].T.astype(np.float64)).astype(np.float32)
            if op.add:
                out[:, row : row + ROWS] += product
            else:
                out[:, row : row + ROWS] = product

    def _rotate_store(self, op: ops.RotateStore, step: ops.Step) -> None:
        a = self.program.attention
        n, size = len(step.tokens), self.capacity.page_tokens
        q, k, v = np.split(self._rows[id(op.qkv)], [a.q_width, a.q_width + a.kv_width], axis=1)
        self._rows[id(op.q_out)][:] = _rotate(q, a.heads, a, step)
        page = step.pages[step.slots, step.positions // size]
        place = step.positions % size
        for part, x in enumerate((_rotate(k, a.kv_heads, a, step).reshape(n, -1), v)):
            self._cache[part, op.layer, page, place] = quantize(x, self.capacity.cache_type)

    def _attention(self, op: ops.Attention, step: ops.Step) -> None:
        a = self.program.attention
        q = self._rows[id(op.q)].astype(np.float64).reshape(-1, a.kv_heads, a.heads // a.kv_heads, a.head_size)
        out = self._rows[id(op.out)]
        for token, (slot, position) in enumerate(zip(step.slots, step.positions, strict=True)):
            last = int(position) + 1
            first = max(0, last - a.window) if a.window else 0
            k, v = (self._visible(part, op.layer, step.pages[slot], first, last) for part in (0, 1))
            scores = np.einsum("hgd,khd->hgk", q[token], k) * a.scale
            weights = np.exp(scores - scores.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            out[token] = np.einsum("hgk,khd->hgd", weights, v).reshape(-1)

    def _visible(self, part: int, layer: int, pages: NDArray[np.int32], first: int, last: int) -> NDArray[np.float64]:
        """Keys (part 0) or values (1) of positions `first` to `last` - 1: [keys, kv_heads, head_size]."""
        a, size = self.program.attention, self.capacity.page_tokens
        positions = np.arange(first, last)
        rows = self._cache[part, layer, pages[positions // size], positions % size]
        wide = dequantize(rows, self.capacity.cache_type, (len(positions), a.kv_heads, a.head_size))
        return wide.astype(np.float64)

    def _swiglu(self, op: ops.SwiGLU, step: ops.Step) -> None:
        gate, up = np.split(self._rows[id(op.x)].astype(np.float64), 2, axis=1)
        self._rows[id(op.out)][:] = gate / (1 + np.exp(-np.maximum(gate, -700))) * up

    def _select(self, op: ops.Select, step: ops.Step) -> None:
        self._rows[id(op.out)][:] = self._rows[id(op.x)][step.outputs]

    def _sum_squares(self, op: ops.SumSquares, step: ops.Step) -> None:
        """Row by row, because the order of the additions is part of the definition."""
        for row in self._rows[id(op.x)].astype(np.float64):
            op.sums[0] += row * row  # the product of two float32 is exact
            op.counts[0] += 1


def _rotate(x: Floats, heads: int, a: ops.AttentionShape, step: ops.Step) -> Floats:
    """Heads [n, heads * head_size] with their leading channels rotated, in float32."""
    x = x.reshape(len(x), heads, a.head_size).copy()
    half = a.rotary // 2
    cos, sin = step.cos[:, None, :], step.sin[:, None, :]
    first, second = x[:, :, :half].copy(), x[:, :, half : a.rotary].copy()
    x[:, :, :half] = first * cos - second * sin
    x[:, :, half : a.rotary] = second * cos + first * sin
    return x.reshape(len(x), -1)
