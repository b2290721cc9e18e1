"""Part of a recorded model run forwards and then backwards in NumPy, on whole sequences: derivatives of a loss.

The definitions are those of `kernels.ops`, but for two roundings that are left out: that of activations to 8 bits and
that of the key-value cache. Derivatives go through the experts that were chosen, not through the choice.

Every operation leaves behind how its derivative is taken; what that needs is kept until then, so a pass holds what a
stage computes, and between stages only the residual stream need be kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.attending import Attending
from phiquant.calibrate.tuned import Tuned
from phiquant.errors import UnsupportedError
from phiquant.kernels.ops import (
    GELU,
    Attention,
    Buffer,
    Combine,
    ExpertMatMul,
    GeGELU,
    LayerNorm,
    MatMul,
    Operation,
    RMSNorm,
    RotateStore,
    Route,
    Select,
    SwiGLU,
)

__all__ = ["Pass"]

Array = NDArray[Any]  # float32; float64 where a test asks for it
Back = Callable[[], None]

_CUBIC: Final = 0.044715
_ROOT: Final = math.sqrt(2 / math.pi)


class Pass:
    """One pass over operations between which nothing but buffers, routes and keys and values is passed on.

    Args:
        operations: to be run.
        tuned: the weights, and where derivatives by them are added up.
        attending: shape, rotation and mask of attention.
        record: whether `backward` will follow.
    """

    def __init__(
        self, operations: Iterable[Operation], tuned: Tuned, attending: Attending, *, record: bool = True
    ) -> None:
        self._operations, self._tuned, self._attending, self._record = tuple(operations), tuned, attending, record
        self._values: dict[int, Array] = {}
        self._by: dict[int, Array] = {}  # derivatives of the loss by buffers
        self._cached: dict[int, tuple[Array, Array]] = {}  # keys and values of a layer
        self._by_cached: dict[int, tuple[Array, Array]] = {}
        self._routes: dict[int, tuple[NDArray[np.int64], Array]] = {}  # chosen and their weights [n, used]
        self._by_weights: dict[int, Array] = {}
        self._tape: list[Back] = []
        self._runs: dict[type, Callable[[Any], Back]] = {
            RMSNorm: self._rms_norm,
            LayerNorm: self._layer_norm,
            MatMul: self._matmul,
            RotateStore: self._rotate_store,
            Attention: self._attention,
            SwiGLU: self._swiglu,
            GELU: self._gelu,
            GeGELU: self._gegelu,
            Route: self._route,
            ExpertMatMul: self._expert_matmul,
            Combine: self._combine,
            Select: self._select,
        }

    def forward(self, entry: Buffer, rows: Array, out: Buffer) -> Array:
        """What `out` holds at the end, if `entry` holds the rows [tokens, width] of whole sequences at the beginning.

        UnsupportedError for an operation that no derivative is known of.
        """
        self._values[id(entry.base)] = rows
        for operation in self._operations:
            run = self._runs.get(type(operation))
            if run is None:
                raise UnsupportedError(
                    f"the model has an operation, {type(operation).__name__}, of which no derivative is known; leave "
                    "out --distill, and for error feedback pass --curvature-tokens 0"
                )
            back = run(operation)
            if self._record:
                self._tape.append(back)
        return self._values[id(out.base)]

    def backward(self, out: Buffer, by_out: Array, entry: Buffer) -> Array:
        """The derivative of a loss by `entry`, of that by `out`, after `forward`; those by weights are added up."""
        self._by = {id(out.base): by_out}
        self._values.clear()
        while self._tape:
            self._tape.pop()()
        return self._by.pop(id(entry.base))

    def _of(self, buffer: Buffer) -> Array:
        values = self._values[id(buffer.base)]
        return values if buffer.whole is None else values[:, buffer.first : buffer.first + buffer.width]

    def _set(self, buffer: Buffer, values: Array) -> None:
        """Values into a buffer. What was in it stays as it is, for whatever kept it."""
        if buffer.whole is None:
            self._values[id(buffer)] = values
            return
        old = self._values.get(id(buffer.base))
        whole = np.zeros((len(values), buffer.base.width), values.dtype) if old is None else old.copy()
        whole[:, buffer.first : buffer.first + buffer.width] = values
        self._values[id(buffer.base)] = whole

    def _take(self, buffer: Buffer) -> Array:
        """The derivative by a buffer, before which it held something else."""
        if buffer.whole is None:
            return self._by.pop(id(buffer))
        columns = np.s_[:, buffer.first : buffer.first + buffer.width]
        whole = self._by[id(buffer.base)]
        part: Array = whole[columns].copy()
        whole[columns] = 0
        return part

    def _add(self, buffer: Buffer, by: Array) -> None:
        whole = self._by.get(id(buffer.base))
        if whole is None and buffer.whole is None:
            self._by[id(buffer)] = by
            return
        if whole is None:
            whole = self._by[id(buffer.base)] = np.zeros((len(by), buffer.base.width), by.dtype)
        whole[:, buffer.first : buffer.first + buffer.width] += by

    def _rms_norm(self, op: RMSNorm) -> Back:
        x, weight = self._of(op.x), self._tuned.vector(op.weight)
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + op.epsilon)
        self._set(op.out, x * scale * weight)

        def back() -> None:
            by, normal = self._take(op.out), x * scale
            self._tuned.add_vector(op.weight, (by * normal).sum(axis=0))
            by = by * weight
            self._add(op.x, scale * (by - normal * (by * normal).mean(axis=1, keepdims=True)))

        return back

    def _layer_norm(self, op: LayerNorm) -> Back:
        x, weight = self._of(op.x), self._tuned.vector(op.weight)
        x = x - x.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + op.epsilon)
        self._set(op.out, x * scale * weight + self._tuned.vector(op.bias))

        def back() -> None:
            by, normal = self._take(op.out), x * scale
            self._tuned.add_vector(op.weight, (by * normal).sum(axis=0))
            self._tuned.add_vector(op.bias, by.sum(axis=0))
            by = by * weight
            by -= by.mean(axis=1, keepdims=True)
            self._add(op.x, scale * (by - normal * (by * normal).mean(axis=1, keepdims=True)))

        return back

    def _matmul(self, op: MatMul) -> Back:
        x = self._of(op.x)
        out = self._product(op, x)
        if op.bias is not None:
            out += self._tuned.vector(op.bias)
        if op.add:
            out += self._of(op.out)
        self._set(op.out, out)

        def back() -> None:
            by = self._by[id(op.out.base)] if op.add else self._take(op.out)
            if op.bias is not None:
                self._tuned.add_vector(op.bias, by.sum(axis=0))
            self._tuned.add_product(op.weight, by, x)
            self._add(op.x, self._turned(op, by))

        return back

    def _product(self, op: MatMul | ExpertMatMul, x: Array, expert: int = 0) -> Array:
        """x W^T"""
        out = np.empty((len(x), op.weight.rows), x.dtype)
        for part, rows in self._tuned.rows(op.weight, expert):
            out[:, part] = x @ rows.T
        return out

    def _turned(self, op: MatMul | ExpertMatMul, by: Array, expert: int = 0) -> Array:
        """by W"""
        out = np.zeros((len(by), op.weight.columns), by.dtype)
        for part, rows in self._tuned.rows(op.weight, expert):
            out += by[:, part] @ rows
        return out

    def _rotate_store(self, op: RotateStore) -> Back:
        shape = self._attending.shape
        at = [shape.q_width, shape.q_width + shape.kv_width]
        q, k, v = np.split(self._of(op.qkv), at, axis=1)
        self._set(op.q_out, self._attending.rotated(q))
        self._cached[op.layer] = self._attending.rotated(k), v

        def back() -> None:
            by_k, by_v = self._by_cached.pop(op.layer)
            parts = self._attending.rotated_back(self._take(op.q_out)), self._attending.rotated_back(by_k), by_v
            self._add(op.qkv, np.concatenate(parts, axis=1))

        return back

    def _attention(self, op: Attention) -> Back:
        q, (k, v) = self._of(op.q), self._cached[op.layer]
        self._set(op.out, self._attending.attended(q, k, v, op.sparse))

        def back() -> None:
            by_q, *by_cached = self._attending.back(q, k, v, op.sparse, self._take(op.out))
            self._by_cached[op.layer] = by_cached[0], by_cached[1]
            self._add(op.q, by_q)

        return back

    def _swiglu(self, op: SwiGLU) -> Back:
        gate, up = np.split(self._of(op.x), 2, axis=1)
        sigmoid = _sigmoid(gate)
        self._set(op.out, gate * sigmoid * up)

        def back() -> None:
            by = self._take(op.out)
            by_gate = by * up * sigmoid * (1 + gate * (1 - sigmoid))
            self._add(op.x, np.concatenate([by_gate, by * gate * sigmoid], axis=1))

        return back

    def _gelu(self, op: GELU) -> Back:
        x = self._of(op.x)
        tanh = np.tanh(_ROOT * (x + _CUBIC * x * x * x))
        self._set(op.out, x / 2 * (1 + tanh))

        def back() -> None:
            slope = (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * (_ROOT * (1 + 3 * _CUBIC * x * x))
            self._add(op.x, self._take(op.out) * slope)

        return back

    def _gegelu(self, op: GeGELU) -> Back:
        gate, linear = np.split(self._of(op.x), 2, axis=1)
        inside = gate < op.limit, np.abs(linear) < op.limit
        a, b = np.minimum(gate, op.limit), np.clip(linear, -op.limit, op.limit)
        sigmoid = _sigmoid(1.702 * a)
        self._set(op.out, a * sigmoid * (b + 1))

        def back() -> None:
            by = self._take(op.out)
            by_gate = by * (b + 1) * sigmoid * (1 + 1.702 * a * (1 - sigmoid)) * inside[0]
            self._add(op.x, np.concatenate([by_gate, by * a * sigmoid * inside[1]], axis=1))

        return back

    def _route(self, op: Route) -> Back:
        logits = self._of(op.logits)
        left, every = np.ones(logits.shape, bool), np.arange(len(logits))
        chosen = np.empty((len(logits), op.used), np.int64)
        shares = []
        for choice in range(op.used):
            scores = np.where(left, np.maximum(logits, np.finfo(logits.dtype).min), -np.inf)
            expert = chosen[:, choice] = scores.argmax(axis=1)
            top = logits[every, expert][:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                near = left & ~((top - logits) / np.maximum(np.abs(logits), top) > 2 * op.jitter)
            share = np.where(near, np.exp(np.minimum(logits - top, 0)), 0)
            shares.append(share / share.sum(axis=1, keepdims=True))
            left[every, expert] = False
        weights = np.stack([share[every, chosen[:, i]] for i, share in enumerate(shares)], axis=1)
        self._routes[id(op)] = chosen, weights

        def back() -> None:
            by_weights = self._by_weights.pop(id(op)) * weights
            by = np.zeros_like(logits)
            for i, share in enumerate(shares):
                by[every, chosen[:, i]] += by_weights[:, i]
                by -= by_weights[:, i, None] * share
            self._add(op.logits, by)

        return back

    def _expert_matmul(self, op: ExpertMatMul) -> Back:
        chosen, x = self._routes[id(op.route)][0].reshape(-1), self._of(op.x)
        out = np.empty((len(chosen), op.weight.rows), x.dtype)
        divisor = 1 if op.x.rows == "routes" else op.route.used

        def each() -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
            """Experts, their routes, and which rows of x these read: none twice for one expert."""
            for expert in np.unique(chosen):
                routes = np.flatnonzero(chosen == expert)
                yield int(expert), routes, routes // divisor

        for expert, routes, rows in each():
            out[routes] = self._product(op, x[rows], expert)
        self._set(op.out, out)

        def back() -> None:
            by, by_x = self._take(op.out), np.zeros_like(x)
            for expert, routes, rows in each():
                self._tuned.add_product(op.weight, by[routes], x[rows], expert)
                by_x[rows] += self._turned(op, by[routes], expert)
            self._add(op.x, by_x)

        return back

    def _combine(self, op: Combine) -> Back:
        weights = self._routes[id(op.route)][1]
        x = self._of(op.x).reshape(len(weights), op.route.used, -1)
        self._set(op.out, self._of(op.out) + np.einsum("tu,tuc->tc", weights, x))

        def back() -> None:
            by = self._by[id(op.out.base)]
            self._by_weights[id(op.route)] = np.einsum("tc,tuc->tu", by, x)
            self._add(op.x, (weights[:, :, None] * by[:, None]).reshape(-1, by.shape[1]))

        return back

    def _select(self, op: Select) -> Back:
        self._set(op.out, self._of(op.x))  # of every token

        def back() -> None:
            self._add(op.x, self._take(op.out))

        return back


def _sigmoid(x: Array) -> Array:
    values: Array = 1 / (1 + np.exp(-np.maximum(x, -80)))
    return values
