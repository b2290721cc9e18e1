"""The CPU backend: runs the steps of a bound Program with a team of threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError, RequestError
from .. import ops
from . import attention, library, matmul
from .binding import Binder, Progress, Report
from .embed import Embedding
from .operation import NativeOp
from .target import host
from .team import Team, native_program

__all__ = ["CpuBackend", "CpuExecutable"]

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
        report = Report(self._progress)
        library.on_compile.append(report.compiling)
        try:
            return CpuExecutable(Binder(program, capacity, report))
        except MemoryError:
            raise KernelError(
                "there is not enough memory for weights, cache and buffers; ask for a shorter context, smaller batches "
                f"or fewer sequences than {capacity}"
            ) from None
        finally:
            library.on_compile.remove(report.compiling)


@dataclass(frozen=True)
class _Cost:
    """Of one native operation: bytes of its weights, multiplications per token or output, and which of them.

    `spared` is the share of the weights that a token does not use: several use all but a power of it.
    """

    nbytes: int
    products: int
    outputs: bool
    spared: float = 0.0


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

    def __init__(self, made: Binder) -> None:
        self.program, self.capacity = made.program, made.capacity
        self._team = Team(made.threads)
        self._header, self._tables, self._cache = made.header, made.tables, made.cache
        self._logits = made.regions[id(made.program.logits)].array
        self._hidden = made.regions[id(made.program.hidden)].array if made.program.hidden else self._logits
        self._keep = made
        natives: list[NativeOp] = []
        costs: list[_Cost] = []
        self._attentions: dict[ops.BlockSparse | None, list[int]] = {}  # native operations that see the same keys
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
                self._attentions.setdefault(op.sparse, []).append(len(natives))
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
        dense = 8 * shape.head_size * shape.kv_heads * tile_costs / speed
        alone: dict[int, list[tuple[int, int]]] = {}  # attention to many keys is divided into ranges of tiles
        for sparse, mine in self._attentions.items():
            per_tile = dense if sparse is None else dense * attention.sparse_share(self._tables.tiles[:tiles], sparse)
            seconds[mine] = attending = float(per_tile.sum())
            if attending > _PART_SECONDS:
                ends = np.flatnonzero(np.diff(np.cumsum(per_tile) // _PART_SECONDS)) + 1
                ranges = list(zip([0, *ends.tolist()], [*ends.tolist(), tiles], strict=True))
                alone.update((i, ranges) for i in mine)
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
                    for first, last in alone[i]:
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
