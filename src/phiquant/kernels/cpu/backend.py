"""The CPU backend: binds a Program to native kernels, and runs its steps with a team of threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError, RequestError
from .. import ops
from . import (
    ahead,
    attention,
    combine,
    expert_matmul,
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
from .gegelu import gegelu
from .gelu import GELU
from .memory import release
from .operation import NativeOp, Region, StepHeader, aligned
from .pointwise import Pointwise
from .swiglu import SWIGLU
from .target import host
from .team import Team, available_threads, native_program, prepare_team

__all__ = ["CpuBackend", "CpuExecutable"]

Progress = Callable[[str], None]

# A rough guess of what a part of a step takes, from which long steps are cut: a native call hears no Ctrl-C.
_PART_SECONDS = 0.05
_BYTES_PER_SECOND, _PRODUCTS_PER_SECOND = 20e9, 100e9  # memory; multiplications of one thread


class CpuBackend:
    """Kernels compiled for this processor. `progress` is told, in a line, what takes its time in `prepare`."""

    name = "cpu"

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def prepare(self, program: ops.Program, capacity: ops.Capacity) -> CpuExecutable:
        """Compile kernels or find them in the cache, repack the weights, allocate buffers and cache.

        Raises:
            KernelError: there is no kernel for a shape or a type, or memory is short.
            RequestError: `capacity` asks for dot products of BF16, which this processor lacks.
        """
        if capacity.bf16_dot and not host().has_bfloat_dot:
            raise RequestError(f"dot products of BF16 were asked for (bf16_dot), but {matmul.NO_BFLOAT_DOT}")
        report = _Report(self._progress)
        library.on_compile.append(report.compiling)
        try:
            return CpuExecutable(_Binder(program, capacity, report))
        except MemoryError:
            raise KernelError(
                "there is not enough memory for weights, cache and buffers; ask for a shorter context, smaller batches "
                f"or fewer sequences than {capacity}"
            ) from None
        finally:
            library.on_compile.remove(report.compiling)


class _Report:
    """Tells what is going on, not too often, from any thread."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell, self._lock, self._compiled, self._last = tell, threading.Lock(), False, time.monotonic()
        self.total = self._done = 0

    def compiling(self, name: str) -> None:
        with self._lock:
            if self._tell and not self._compiled:
                self._tell("compiling kernels for this processor, once")
            self._compiled = True

    def arranged(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._tell and time.monotonic() - self._last > 2.0:
                self._last = time.monotonic()
                self._tell(f"arranging weights: {self._done / 1e9:.1f} of {self.total / 1e9:.1f} GB")


@dataclass(frozen=True)
class _Cost:
    """Of one native operation: bytes of its weights, multiplications per token or output, and which of them.

    `spared` is the share of the weights that a token does not use: several use all but a power of it.
    """

    nbytes: int
    products: int
    outputs: bool
    spared: float = 0.0


class _Binder:
    """Everything an executable consists of, made from a Program."""

    def __init__(self, program: ops.Program, capacity: ops.Capacity, report: _Report) -> None:
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
        self.before = _before(program)
        self.done_before = {id(op) for op in self.before.values()}
        self.rounded = _rounded(program, self.packed)
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


def _before(program: ops.Program) -> dict[int, ops.SwiGLU | ops.GELU | ops.GeGELU]:
    """By the matrix multiplication that comes next and alone reads its output, every pointwise operation for which so.

    Such a multiplication does it itself, on the way: what lies between is neither written nor read.
    """
    operations = program.operations
    found = {}
    for i, (op, after) in enumerate(itertools.pairwise(operations)):
        if not isinstance(op, ops.SwiGLU | ops.GELU | ops.GeGELU):
            continue
        if isinstance(after, ops.MatMul | ops.ExpertMatMul) and after.x is op.out:
            read = op.out is program.logits or _read(op.out, operations[i + 2 :])
            if not read and after.out.base is not op.x:  # which the multiplication then reads
                found[id(after)] = op
    return found


def _read(buffer: ops.Buffer, operations: Sequence[ops.Operation]) -> bool:
    """Whether a buffer, or some of its columns, is read before it is written again as a whole."""
    for op in operations:
        named = {name: b for name, b in vars(op).items() if isinstance(b, ops.Buffer) and b.base is buffer}
        out = named.pop("out", None)
        if named or (out and (getattr(op, "add", False) or isinstance(op, ops.Combine))):
            return True
        if out is buffer:
            return False
    return False


def _rounded(program: ops.Program, packed: Mapping[int, matmul.Packed]) -> set[int]:
    """Every matrix multiplication that finds its activations in the scratch memory as the one just before left them.

    It reads the same buffer, which that one has not written, for a matrix that takes it in the same form, and by the
    same routes if it is one of experts. (What is done before a multiplication yields what only that one reads, so
    neither of the two does that.)
    """
    found = set()
    for before, op in itertools.pairwise(program.operations):
        if isinstance(op, ops.MatMul | ops.ExpertMatMul) and type(before) is type(op) and before.x is op.x:
            forms = [(packed[id(o.weight)].format.activations, getattr(o, "route", None)) for o in (before, op)]
            if forms[0] == forms[1] and before.out.base is not op.x.base:
                found.add(id(op))
    return found


def _cost(op: ops.Operation, natives: int, routes: int) -> list[_Cost]:
    """Of each of the native operations of `op`; `routes` as in Program."""
    if isinstance(op, ops.MatMul | ops.ExpertMatMul):
        w, outputs = op.weight, op.x.rows == "outputs"
        used = op.route.used if isinstance(op, ops.ExpertMatMul) else 1
        products = w.rows * w.columns * used
        return [_Cost(w.data.nbytes // natives, products // natives, outputs, 1 - used / w.matrices)] * natives
    widths = [b.width * (routes if b.rows == "routes" else 1) for b in vars(op).values() if isinstance(b, ops.Buffer)]
    return [_Cost(0, 4 * sum(widths), False)] * natives


class CpuExecutable:
    """A Program bound to this processor; `ops.Executable` says what the methods do. Steps run one at a time."""

    def __init__(self, made: _Binder) -> None:
        self.program, self.capacity = made.program, made.capacity
        self._team = Team(made.threads)
        self._header, self._tables, self._cache = made.header, made.tables, made.cache
        self._logits = made.regions[id(made.program.logits)].array
        self._hidden = made.regions[id(made.program.hidden)].array if made.program.hidden else self._logits
        self._keep = made
        natives: list[NativeOp] = []
        costs: list[_Cost] = []
        self._attentions: list[int] = []
        self._segments: list[Embedding | range] = []
        for op, bound in zip(made.program.operations, made.bound, strict=True):
            if isinstance(bound, Embedding):
                self._segments.append(bound)
                continue
            start, last = len(natives), self._segments[-1] if self._segments else None
            if isinstance(last, range):
                start = last.start
                self._segments.pop()
            if isinstance(op, ops.Attention):
                self._attentions.append(len(natives))
            natives += bound
            costs += _cost(op, len(bound), made.program.routes)
            self._segments.append(range(start, len(natives)))
        self._native = native_program(natives)
        # Hidden states are there before the last operation, which makes logits of them and does nothing else.
        final = made.bound[-1] if made.bound else []
        self._before_logits = len(natives) - (0 if isinstance(final, Embedding) else len(final))
        self._bytes = np.array([c.nbytes for c in costs], np.float64)
        self._products = np.array([c.products for c in costs], np.float64)
        self._spared = np.array([c.spared for c in costs], np.float64)
        self._of_outputs = np.array([c.outputs for c in costs], bool)

    @property
    def threads(self) -> int:
        """Native threads, the caller's included."""
        return self._team.threads

    def run(self, step: ops.Step) -> NDArray[np.float32]:
        """Execute; the logits [outputs, vocabulary], or hidden states [outputs, width], valid until the next run.

        Raises:
            TokenError, ContextError: the step reaches beyond vocabulary, cache or capacity.
            KernelError: the step is malformed, was cancelled, or a kernel failed.
        """
        step.check(self.program, self.capacity)
        n, m = len(step.tokens), len(step.outputs)
        with self._team.step():
            tiles, tile_costs = self._load(step)
            stop = self._before_logits if step.hidden else None
            for part in self._parts(n, m, tiles, tile_costs, stop):
                if isinstance(part, Embedding):
                    part.run(n)
                    continue
                operations, first, last = part
                self._header.set("first_tile", first)
                self._header.set("last_tile", last)
                self._team.run(self._native[operations.start : operations.stop])
        return self._hidden[:m] if step.hidden else self._logits[:m]

    def _load(self, step: ops.Step) -> tuple[int, NDArray[np.int64]]:
        """Copy the arrays of a step to where the kernels look for them."""
        t, n, m = self._tables, len(step.tokens), len(step.outputs)
        shape = self.program.attention
        made = attention.tile(step.positions, step.slots, shape.heads // shape.kv_heads, shape.window, t.tiles)
        t.tokens[:n], t.positions[:n], t.slots[:n], t.outputs[:m] = (
            step.tokens,
            step.positions,
            step.slots,
            step.outputs,
        )
        t.pages[: len(step.pages), : step.pages.shape[1]] = step.pages
        t.cos[:n], t.sin[:n] = step.cos, step.sin
        self._header.set("tokens", n)
        self._header.set("outputs", m)
        self._header.set("routes", n * self.program.routes)
        return made

    def _parts(
        self, n: int, m: int, tiles: int, tile_costs: NDArray[np.int64], stop: int | None = None
    ) -> Iterator[Embedding | tuple[range, int, int]]:
        """The step in native calls that each take about `_PART_SECONDS`, as far as operations can be divided.

        It ends before native operation `stop`, if there is one.
        """
        shape, speed = self.program.attention, _PRODUCTS_PER_SECOND * self.threads
        rows = np.where(self._of_outputs, m, n)
        nbytes = self._bytes * (1 - self._spared**rows)
        seconds = np.where(rows > 0, np.maximum(nbytes / _BYTES_PER_SECOND, self._products * rows / speed), 0)
        per_tile = 8 * shape.head_size * shape.kv_heads * tile_costs / speed
        attending = float(per_tile.sum())
        seconds[self._attentions] = attending
        # Attention to many keys is divided into ranges of tiles.
        alone = set(self._attentions) if attending > _PART_SECONDS else set()
        ends = np.flatnonzero(np.diff(np.cumsum(per_tile) // _PART_SECONDS)) + 1
        ranges = list(zip([0, *ends.tolist()], [*ends.tolist(), tiles], strict=True))
        costs = seconds.tolist()
        for segment in self._segments:
            if isinstance(segment, Embedding):
                yield segment
                continue
            if stop is not None:
                segment = range(segment.start, min(segment.stop, stop))
            start, spent = segment.start, 0.0
            for i in segment:
                if i > start and (i in alone or spent + costs[i] > _PART_SECONDS):
                    yield range(start, i), 0, tiles
                    start, spent = i, 0.0
                if i in alone:
                    for first, last in ranges:
                        yield range(i, i + 1), first, last
                    start = i + 1
                else:
                    spent += costs[i]
            if start < segment.stop:
                yield range(start, segment.stop), 0, tiles

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page of the cache, all layers."""
        with self._team.step():
            self._cache.copy_page(source, target)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the cache, all layers."""
        return len(self._cache.layers) * self._cache.page_bytes

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page's bytes, layer by layer."""
        with self._team.step():
            return self._cache.read_page(page)

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """Put such bytes back. KernelError if they do not fit."""
        with self._team.step():
            self._cache.write_page(page, data)

    def cancel(self) -> None:
        """From any thread: end the running step early; its `run` raises KernelError."""
        self._team.cancel()

    def close(self) -> None:
        """End the threads; the memory goes with the object."""
        self._team.close()
