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
from phiquant.gguf.types import GGMLType
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
            for w in vars(operation).values():
                if isinstance(w, ops.Weight) and id(w) not in self._weights:  # a tied embedding is used twice
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
            ops.LayerNorm: self._layer_norm,
            ops.MatMul: self._matmul,
            ops.RotateStore: self._rotate_store,
            ops.Attention: self._attention,
            ops.SwiGLU: self._swiglu,
            ops.GELU: self._gelu,
            ops.GeGELU: self._gegelu,
            ops.Route: self._route,
            ops.ExpertMatMul: self._expert_matmul,
            ops.Combine: self._combine,
            ops.Select: self._select,
            ops.SumSquares: self._sum_squares,
            ops.Keep: self._keep,
        }
        self._rows: dict[int, Floats] = {}
        self._routes: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def run(self, step: ops.Step) -> Floats:
        """Execute; the logits [outputs, vocabulary], or hidden states [outputs, width]."""
        step.check(self.program, self.capacity)
        self._cancelled.clear()
        n = len(step.tokens)
        counts = {"tokens": n, "outputs": len(step.outputs), "routes": n * self.program.routes}
        self._rows = {id(b): np.full((counts[b.rows], b.width), np.nan, np.float32) for b in self.program.buffers}
        for operation in self.program.operations[: -1 if step.hidden else None]:
            if self._cancelled.is_set():
                raise KernelError("the step was cancelled")
            self._execute[type(operation)](operation, step)
        wanted = self.program.hidden if step.hidden and self.program.hidden else self.program.logits
        rows = self._rows[id(wanted)]
        self._rows, self._routes = {}, {}
        return rows

    def _of(self, buffer: ops.Buffer) -> Floats:
        """The rows of a buffer, a view of those of the whole."""
        return self._rows[id(buffer.base)][:, buffer.first : buffer.first + buffer.width]

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the cache, all layers."""
        self._cache[:, :, target] = self._cache[:, :, source]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the cache, all layers."""
        return self._cache[:, :, 0].nbytes

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page's bytes: keys, then values, layer by layer."""
        return self._cache[:, :, page].flatten()

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """Put such bytes back. KernelError if they do not fit."""
        if data.shape != (self.page_bytes,):
            raise KernelError(f"a page has {self.page_bytes} bytes, not {data.size}")
        self._cache[:, :, page] = data.reshape(self._cache[:, :, page].shape)

    def cancel(self) -> None:
        """From any thread: end the running step; its `run` raises KernelError."""
        self._cancelled.set()

    def close(self) -> None:
        """Let go of weights and cache."""
        self._weights.clear()
        self._cache = self._cache[:, :, :0]

    def _embed(self, op: ops.Embed, step: ops.Step) -> None:
        self._of(op.out)[:] = self._weights[id(op.weight)][step.tokens] * np.float32(op.scale)

    def _rms_norm(self, op: ops.RMSNorm, step: ops.Step) -> None:
        x = self._of(op.x).astype(np.float64)
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + op.epsilon)
        self._of(op.out)[:] = x * scale * self._weights[id(op.weight)]

    def _layer_norm(self, op: ops.LayerNorm, step: ops.Step) -> None:
        x = self._of(op.x).astype(np.float64)
        x = x - x.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + op.epsilon)
        self._of(op.out)[:] = x * scale * self._weights[id(op.weight)] + self._weights[id(op.bias)]

    def _matmul(self, op: ops.MatMul, step: ops.Step) -> None:
        weights, out = self._weights[id(op.weight)], self._of(op.out)
        bias = np.zeros(len(weights), np.float32) if op.bias is None else self._weights[id(op.bias)]
        wide = self._rounded(self._of(op.x), op.weight.type)
        for row in range(0, len(weights), ROWS):
            product = _product(wide, weights[row : row + ROWS]) + bias[row : row + ROWS]
            if op.add:
                out[:, row : row + ROWS] += product
            else:
                out[:, row : row + ROWS] = product

    def _rounded(self, x: Floats, type: GGMLType) -> NDArray[np.float64]:
        """Activations as a product with weights of that type takes them."""
        if type is GGMLType.BF16 and self.capacity.bf16_dot:
            return dequantize(quantize(x, type), type, x.shape).astype(np.float64)
        block = activation_block(type)
        if not block:
            return x.astype(np.float64)
        levels, scale = round_activations(x, block)
        return levels.astype(np.float64) * np.repeat(scale, block, axis=1)

    def _rotate_store(self, op: ops.RotateStore, step: ops.Step) -> None:
        a = self.program.attention
        n, size = len(step.tokens), self.capacity.page_tokens
        q, k, v = np.split(self._of(op.qkv), [a.q_width, a.q_width + a.kv_width], axis=1)
        self._of(op.q_out)[:] = _rotate(q, a.heads, a, step)
        page = step.pages[step.slots, step.positions // size]
        place = step.positions % size
        for part, x in enumerate((_rotate(k, a.kv_heads, a, step).reshape(n, -1), v)):
            self._cache[part, op.layer, page, place] = quantize(x, self.capacity.cache_type)

    def _attention(self, op: ops.Attention, step: ops.Step) -> None:
        a = self.program.attention
        q = self._of(op.q).astype(np.float64).reshape(-1, a.kv_heads, a.heads // a.kv_heads, a.head_size)
        out = self._of(op.out)
        for token, (slot, position) in enumerate(zip(step.slots, step.positions, strict=True)):
            last = int(position) + 1
            first = max(0, last - a.window) if a.window else 0
            k, v = (self._visible(part, op.layer, step.pages[slot], first, last) for part in (0, 1))
            scores = np.einsum("hgd,khd->hgk", q[token], k) * a.scale
            if op.sparse is not None:
                seen = _seen(op.sparse, int(position), a.heads)
                scores = np.where(seen.reshape(a.kv_heads, -1, last), scores, -np.inf)
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
        gate, up = np.split(self._of(op.x).astype(np.float64), 2, axis=1)
        self._of(op.out)[:] = gate / (1 + np.exp(-np.maximum(gate, -700))) * up

    def _gelu(self, op: ops.GELU, step: ops.Step) -> None:
        x = self._of(op.x).astype(np.float64)
        self._of(op.out)[:] = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def _gegelu(self, op: ops.GeGELU, step: ops.Step) -> None:
        a, b = np.split(self._of(op.x).astype(np.float64), 2, axis=1)
        a, b = np.minimum(a, op.limit), np.clip(b, -op.limit, op.limit)
        self._of(op.out)[:] = a / (1 + np.exp(-np.maximum(1.702 * a, -700))) * (b + 1)

    def _route(self, op: ops.Route, step: ops.Step) -> None:
        logits = self._of(op.logits).astype(np.float64)
        left, every = np.ones(logits.shape, bool), np.arange(len(logits))
        chosen = np.empty((len(logits), op.used), np.int64)
        weights = np.empty((len(logits), op.used))
        for choice in range(op.used):
            # Below every float32, so that an expert that is left comes before one that is not, even with -inf.
            scores = np.where(left, np.maximum(logits, np.finfo(np.float64).min), -np.inf)
            expert = chosen[:, choice] = scores.argmax(axis=1)
            top = logits[every, expert][:, None]
            # A top score of zero or below has no relative distance; as in the original, the quotient's sign decides.
            with np.errstate(divide="ignore", invalid="ignore"):
                near = left & ~((top - logits) / np.maximum(np.abs(logits), top) > 2 * op.jitter)
            weights[:, choice] = 1 / np.where(near, np.exp(np.minimum(logits - top, 0)), 0).sum(axis=1)
            left[every, expert] = False
        self._routes[id(op)] = chosen, weights

    def _expert_matmul(self, op: ops.ExpertMatMul, step: ops.Step) -> None:
        chosen = self._routes[id(op.route)][0].reshape(-1)
        x = self._of(op.x) if op.x.rows == "routes" else np.repeat(self._of(op.x), op.route.used, axis=0)
        out, weights = self._of(op.out), self._weights[id(op.weight)]
        for expert in np.unique(chosen):
            rows = np.flatnonzero(chosen == expert)
            out[rows] = _product(self._rounded(x[rows], op.weight.type), weights[expert])

    def _combine(self, op: ops.Combine, step: ops.Step) -> None:
        """Choice by choice, because the order of the additions is part of the definition."""
        x = self._of(op.x).reshape(len(step.tokens), op.route.used, -1)
        weights = self._routes[id(op.route)][1].astype(np.float32)
        for choice in range(op.route.used):
            self._of(op.out)[:] += weights[:, choice, None] * x[:, choice]

    def _select(self, op: ops.Select, step: ops.Step) -> None:
        self._of(op.out)[:] = self._of(op.x)[step.outputs]

    def _sum_squares(self, op: ops.SumSquares, step: ops.Step) -> None:
        """Row by row, because the order of the additions is part of the definition."""
        x = self._of(op.x).astype(np.float64)
        if op.route is None:
            matrices = np.zeros(len(x), np.int64)
        else:
            matrices = self._routes[id(op.route)][0].reshape(-1)
            x = x if op.x.rows == "routes" else np.repeat(x, op.route.used, axis=0)
        for row, matrix in zip(x, matrices, strict=True):
            op.sums[matrix] += row * row  # the product of two float32 is exact
            op.counts[matrix] += 1

    def _keep(self, op: ops.Keep, step: ops.Step) -> None:
        x = self._of(op.x)
        op.kept[: len(x)] = x
        if op.route is not None and op.chosen is not None:
            chosen = self._routes[id(op.route)][0].reshape(-1)
            op.chosen[: len(chosen)] = chosen


def _rotate(x: Floats, heads: int, a: ops.AttentionShape, step: ops.Step) -> Floats:
    """Heads [n, heads * head_size] with their leading channels rotated, in float32."""
    x = x.reshape(len(x), heads, a.head_size).copy()
    half = a.rotary // 2
    cos, sin = step.cos[:, None, :], step.sin[:, None, :]
    here, there = (slice(0, half), slice(half, a.rotary))
    if a.neighbours:
        here, there = (slice(0, a.rotary, 2), slice(1, a.rotary, 2))
    first, second = x[:, :, here].copy(), x[:, :, there].copy()
    x[:, :, here] = first * cos - second * sin
    x[:, :, there] = second * cos + first * sin
    return x.reshape(len(x), -1)


def _product(x: NDArray[np.float64], weights: Floats) -> Floats:
    """Of rounded activations and dequantized weights, which is what exact integer sums amount to."""
    return (x @ weights.T.astype(np.float64)).astype(np.float32)


def _seen(sparse: ops.BlockSparse, position: int, heads: int) -> NDArray[np.bool_]:
    """Whether head h of the token at a position sees each key up to it: [heads, position + 1]."""
    own, keys, head = position // sparse.block, np.arange(position + 1) // sparse.block, np.arange(heads)[:, None]
    seen: NDArray[np.bool_] = (own - keys < sparse.local) | ((keys + head + 1) % sparse.stride == 0)
    return seen
