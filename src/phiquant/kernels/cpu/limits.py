"""What this machine can do at most: multiplications in registers, and reading memory.

A speed says little without them: prompts are bound by the one, decoding by the other, and on a shared machine both
drift. So they are measured beside whatever is measured, in the same minute.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...gguf.closing import Closing
from .emit import F32, I8, I32, I64, Emitter, Value, vec
from .library import function
from .operation import NativeOp, aligned
from .simd import dot_quads
from .target import Target, host
from .team import Team, available_threads, native_program

__all__ = ["Limits", "peak", "reading"]

ROUNDS, CHAINS = 1_000_000, 12
TICKET: Final = 1 << 20
_AHEAD: Final = 1024  # bytes from what is read to what is prefetched
_SINK_BYTES: Final = 4096  # for each thread, so that results are used


def peak(kind: str, target: Target, sink: NDArray[np.uint8]) -> tuple[NativeOp, float]:
    """An operation that computes in registers only, and its operations per thread.

    Args:
        kind: "dot" (products of 8 bits added up in 32) or "fma" (float32).
        target: the processor.
        sink: 4096 bytes for each thread, of which nothing is ever read.
    """
    lanes = target.vector_bytes // 4

    def body(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        element = I32 if kind == "dot" else F32
        a = e.load(block + 8, vec(element, lanes))
        sums = [e.var(e.load(block + 8 * c, vec(element, lanes))) for c in range(CHAINS)]
        with e.loop(0, ROUNDS):
            for s in sums:
                if kind == "dot":
                    # The operand changes every time, or its product would be computed once, before the loop.
                    total, octets = s.get(), vec(I8, 4 * lanes)
                    s.set(dot_quads(e, total, a.bits(octets), total.bits(octets), below=16))
                else:
                    s.set(e.fma(a, s.get(), s.get()))
        for s in sums:
            e.store(s.get(), e.load(block, I64) + thread * _SINK_BYTES)

    block = np.zeros(64, np.int64)
    block[0] = sink.ctypes.data
    per_instruction = 2 * lanes * (4 if kind == "dot" else 1)
    op = NativeOp(function(f"limits.{kind}", 4, body, target), block, (sink,))
    return op, float(ROUNDS * CHAINS * per_instruction)


def reading(data: NDArray[np.uint8], target: Target, sink: NDArray[np.uint8], *, prefetched: bool) -> NativeOp:
    """An operation that reads whole megabytes of memory once, in tickets, and adds them up; `sink` as for `peak`."""

    def body(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        at, total = e.load(block, I64), e.load(block + 8, I64)
        sums = [e.var(e.const(vec(I32, 16), 0)) for _ in range(4)]
        with e.forever() as done:
            ticket = e.atomic_add(counter, 1)
            done(ticket >= total)
            base = at + ticket * TICKET
            with e.loop(0, TICKET, 256) as i:
                if prefetched:
                    for j in range(4):
                        e.prefetch(base + i + (_AHEAD + 64 * j))
                for j, s in enumerate(sums):
                    s.set(s.get() + e.load(base + i + 64 * j, vec(I32, 16), align=64))
        whole = sums[0].get() + sums[1].get() + sums[2].get() + sums[3].get()
        e.store(whole, e.load(block + 16, I64) + thread * _SINK_BYTES)

    block = np.array([data.ctypes.data, data.size // TICKET, sink.ctypes.data], np.int64)
    name = "limits.read_prefetched" if prefetched else "limits.read"
    return NativeOp(function(name, 4, body, target), block, (data, sink))


class Limits(Closing):
    """Measures both limits with a team of threads; use it with `with`, or close it.

    Args:
        threads: 0 for as many as the process may use.
        nbytes: how much memory to read, at least a megabyte; far more than the caches hold.
        target: the processor, the host by default.
    """

    def __init__(self, threads: int = 0, nbytes: int = 1 << 30, target: Target | None = None) -> None:
        self.threads = threads or available_threads()
        target = target or host()
        sink = aligned(_SINK_BYTES * self.threads)
        memory = aligned(nbytes)
        memory[:] = 1  # or every page would be the same page of zeros
        self._dot, self._operations = peak("dot", target, sink)
        self._readings = [reading(memory, target, sink, prefetched=p) for p in (False, True)]
        self._nbytes = nbytes // TICKET * TICKET
        self._team = Team(self.threads)

    def dot_products(self) -> float:
        """Operations per second of dot products of 8 bits, a multiplication and an addition counting as two.

        The best of three tries: whatever disturbs one of them is no limit.
        """
        return self._operations * self.threads / min(self._seconds(self._dot) for _ in range(3))

    def read_bandwidth(self) -> float:
        """Bytes per second of reading memory: the better of plain and prefetched."""
        return self._nbytes / min(map(self._seconds, self._readings))

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def _seconds(self, operation: NativeOp) -> float:
        program = native_program([operation])
        with self._team.step():
            begin = time.perf_counter()
            self._team.run(program)
            return time.perf_counter() - begin
