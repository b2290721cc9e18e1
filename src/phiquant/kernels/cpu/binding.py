"""Binding a Program: memory for its buffers, its weights arranged, a native kernel for every operation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .. import ops
from . import (
    ahead,
    attention,
    combine,
    expert_matmul,
    keep,
    layer_norm,
    library,
    matmul,
    pointwise,
    rms_norm,
    rotate_store,
    route,
    select_rows,
    sum_squares,
)
from .cache import KVCache, StepTables
from .embed import Embedding
from .fusion import done_before, rounded
from .gegelu import gegelu
from .gelu import GELU
from .memory import release
from .operation import NativeOp, Region, StepHeader, aligned
from .pointwise import Pointwise
from .swiglu import SWIGLU
from .team import available_threads, prepare_team

__all__ = ["Binder", "Progress", "Report"]

Progress = Callable[[str], None]


class Report:
    """Tells what is going on, not too often, from any thread."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell, self._lock, self._compiled, self._last = tell, threading.Lock(), False, time.monotonic()
        self.total = self._done = 0

    def compiling(self, name: str) -> None:
        """A kernel is being compiled."""
        with self._lock:
            if self._tell and not self._compiled:
                self._tell("compiling kernels for this processor, once")
            self._compiled = True

    def arranged(self, nbytes: int) -> None:
        """So many bytes of weights more are as kernels want them."""
        with self._lock:
            self._done += nbytes
            if self._tell and time.monotonic() - self._last > 2.0:
                self._last = time.monotonic()
                self._tell(f"arranging weights: {self._done / 1e9:.1f} of {self.total / 1e9:.1f} GB")


class Binder:
    """Everything an executable consists of, made from a Program."""

    def __init__(self, program: ops.Program, capacity: ops.Capacity, report: Report) -> None:
        self.program, self.capacity, self.report = program, capacity, report
        self.threads = capacity.threads or available_threads()
        self.header = StepHeader()
        self.tables = StepTables.of(program.attention, capacity)
        self.cache = KVCache(program.attention, program.layers, capacity)
        rows = {
            "tokens": capacity.tokens,
            "outputs": capacity.outputs,
            "routes": capacity.tokens * program.routes,
        }
        self.regions = {
            id(b): Region(self._rows(rows[b.rows], b.width), self.header.address(b.rows)) for b in program.buffers
        }
        self.routes = {
            id(op): route.Routes.of(op.logits.width, op.used, capacity.tokens, self.header.address("routes"))
            for op in program.operations
            if isinstance(op, ops.Route)
        }
        self.shared = attention.scratch(self.cache, self.threads)
        products = [op for op in program.operations if isinstance(op, ops.MatMul | ops.ExpertMatMul)]
        weights = {id(op.weight): op.weight for op in products}  # a matrix that is used twice is packed once
        report.total = sum(w.data.nbytes for w in weights.values())
        self.packed = {
            key: matmul.outline(w, pack_now=capacity.pack, bf16_dot=capacity.bf16_dot) for key, w in weights.items()
        }
        needs = [
            matmul.scratch_bytes(self.packed[id(op.weight)], rows[op.x.rows])
            if isinstance(op, ops.MatMul)
            else expert_matmul.scratch_bytes(self.packed[id(op.weight)], rows["routes"])
            for op in products
        ]
        self.scratch = aligned(max(needs, default=0))  # operations run one after the other, so all share it
        rooms = [matmul.buffer_bytes(packed, self.threads) for packed in self.packed.values()]
        self.buffers = aligned(max(rooms, default=0))
        self.before = done_before(program)
        self.done_before = {id(op) for op in self.before.values()}
        self.rounded = rounded(program, self.packed)
        with ahead.compiling(self._kernels(), self.threads):
            self.packed = {key: self._pack(w) for key, w in weights.items()}
            self.bound = [self._bind(op) for op in program.operations]

    def _kernels(self) -> list[Callable[[], object]]:
        """What makes the kernels that will be needed, those that pack first: all is bound once for nothing."""
        with library.asking() as asked:
            if self.capacity.pack:
                for packed in self.packed.values():
                    matmul.packing_kernel(packed)
            bound = [self._bind(op) for op in self.program.operations]
        embeddings = [operation.compile for operation in bound if isinstance(operation, Embedding)]
        return [*(request.make for request in asked.values()), *embeddings, prepare_team]

    def _pack(self, weight: ops.Weight) -> matmul.Packed:
        c = self.capacity
        prepare = matmul.prepare if len(weight.shape) == 2 else expert_matmul.prepare
        packed = prepare(weight, threads=self.threads, pack_now=c.pack, bf16_dot=c.bf16_dot)
        if not np.may_share_memory(packed.data, weight.data):
            release(weight.data)  # or the model would be in memory twice
        self.report.arranged(weight.data.nbytes)
        return packed

    @staticmethod
    def _rows(rows: int, width: int) -> NDArray[np.float32]:
        return aligned(4 * rows * width).view(np.float32).reshape(rows, width)

    def _region(self, buffer: ops.Buffer) -> Region:
        whole = self.regions[id(buffer.base)]
        return whole if buffer.whole is None else whole.columns(buffer.first, buffer.width)

    def _bind(self, op: ops.Operation) -> Embedding | list[NativeOp]:
        at = {name: self._region(b) for name, b in vars(op).items() if isinstance(b, ops.Buffer)}
        match op:
            case ops.Embed():
                return Embedding(op.weight, self.tables.tokens, at["out"], op.scale)
            case ops.RMSNorm():
                return [rms_norm.bind(at["x"], _floats(op.weight), op.epsilon, at["out"])]
            case ops.LayerNorm():
                return [layer_norm.bind(at["x"], _floats(op.weight), _floats(op.bias), op.epsilon, at["out"])]
            case ops.MatMul():
                before = self.before.get(id(op))
                return matmul.bind(
                    self.packed[id(op.weight)],
                    self._region(before.x) if before else at["x"],
                    at["out"],
                    add=op.add,
                    scratch=self.scratch,
                    threads=self.threads,
                    buffers=self.buffers,
                    bias=_floats(op.bias) if op.bias else None,
                    before=_pointwise(before) if before else None,
                    rounded=id(op) in self.rounded,
                )
            case ops.Route():
                return [route.bind(at["logits"], self.routes[id(op)], op.jitter)]
            case ops.ExpertMatMul():
                before = self.before.get(id(op))
                return expert_matmul.bind(
                    self.packed[id(op.weight)],
                    self.routes[id(op.route)],
                    self._region(before.x) if before else at["x"],
                    at["out"],
                    scratch=self.scratch,
                    threads=self.threads,
                    buffers=self.buffers,
                    before=_pointwise(before) if before else None,
                    rounded=id(op) in self.rounded,
                )
            case ops.Combine():
                return [combine.bind(self.routes[id(op.route)], at["x"], at["out"])]
            case ops.RotateStore():
                return [rotate_store.bind(at["qkv"], at["q_out"], self.tables, self.cache, op.layer)]
            case ops.Attention():
                return [
                    attention.bind(
                        at["q"],
                        at["out"],
                        self.tables,
                        self.header,
                        self.cache,
                        op.layer,
                        self.shared,
                        self.threads,
                        sparse=op.sparse,
                    )
                ]
            case ops.SwiGLU() | ops.GELU() | ops.GeGELU():
                return [] if id(op) in self.done_before else [pointwise.bind(_pointwise(op), at["x"], at["out"])]
            case ops.Select():
                return [select_rows.bind(at["x"], self.tables.outputs, at["out"])]
            case ops.SumSquares():
                routes = self.routes[id(op.route)] if op.route else None
                return [sum_squares.bind(at["x"], op.sums, op.counts, routes=routes)]
            case ops.Keep():
                routes = self.routes[id(op.route)] if op.route else None
                return [keep.bind(at["x"], op.kept, op.chosen, routes)]
        raise KernelError(f"the CPU backend does not know the operation {type(op).__name__}")


def _floats(weight: ops.Weight) -> NDArray[np.float32]:
    return weight.data.view(np.float32)


def _pointwise(op: ops.SwiGLU | ops.GELU | ops.GeGELU) -> Pointwise:
    match op:
        case ops.SwiGLU():
            return SWIGLU
        case ops.GELU():
            return GELU
        case ops.GeGELU():
            return gegelu(op.limit)
