"""Speed of matrix multiplication for every weight type: operations/s at many columns, bytes/s at one.

    python benchmarks/bench_matmul.py [--types Q4_K,Q6_K] [--columns 1,8,128,512] [--threads 2] [--lowering avx2]
        [--bf16-dot]

Every figure is a median over interleaved repetitions, beside the limits of the machine measured in the same run: the
peak of the dot product instruction (operands in registers), of FMA, and the bandwidth of reading memory.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from phiquant import quants
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import matmul
from phiquant.kernels.cpu.limits import peak, reading
from phiquant.kernels.cpu.operation import NativeOp, Region, aligned
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.ops import Weight

ROWS, COLUMNS = 3072, 3072
_SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
_KEPT: list[NDArray[np.int64]] = []  # numbers of columns that operations point to


class Team:
    """Threads that run native operations together; waiting is asleep, so only long operations are timed fairly."""

    def __init__(self, threads: int) -> None:
        self.threads, self.counter = threads, np.zeros(2, np.int64)
        self.start, self.end = threading.Barrier(threads), threading.Barrier(threads)
        self.ops: list[NativeOp] = []
        for i in range(1, threads):
            threading.Thread(target=self._work, args=(i,), daemon=True).start()

    def _work(self, i: int) -> None:
        while True:
            self._share(i)

    def _share(self, i: int) -> None:
        self.start.wait()
        for n, op in enumerate(self.ops):
            _SIGNATURE(op.kernel)(op.block.ctypes.data, i, self.threads, self.counters[n].ctypes.data)
            self.end.wait()

    def run(self, ops: list[NativeOp]) -> float:
        """Seconds of the last operation: of one thread, its processor time, which other work does not lengthen."""
        self.ops, self.counters = ops, np.zeros((len(ops), 8), np.int64)
        if self.threads == 1:
            took = 0.0
            for n, op in enumerate(ops):
                t = time.thread_time()
                _SIGNATURE(op.kernel)(op.block.ctypes.data, 0, 1, self.counters[n].ctypes.data)
                took = time.thread_time() - t
            return took
        self.start.wait()
        for n, op in enumerate(ops):
            t = time.perf_counter()
            _SIGNATURE(op.kernel)(op.block.ctypes.data, 0, self.threads, self.counters[n].ctypes.data)
            self.end.wait()
            took = time.perf_counter() - t
        return took


def weight(kind: GGMLType, rows: int, columns: int, rng: np.random.Generator) -> Weight:
    """Random bytes with finite scales: speed does not depend on the values."""
    row = kind.row_bytes(columns)
    data = rng.integers(0, 256, rows * row, np.uint8)
    blocks = data.reshape(-1, kind.block_bytes)
    if kind.is_quantized:
        dtype = quants.block_dtype(kind)
        for name in dtype.names or ():
            if dtype[name] == np.float16:
                blocks.reshape(-1).view(dtype)[name] = 0.01
        if kind is GGMLType.MXFP4:
            blocks[:, 0] = 120
    elif kind is GGMLType.F32:
        data = rng.standard_normal(rows * columns, np.float32).view(np.uint8)
    else:
        data.reshape(-1, 2)[:, 1] = 0x30
    return Weight(kind.name, kind, (rows, columns), data)


def _standard(target: Target, threads: int, counts: list[int], rng: np.random.Generator) -> dict[int, list[NativeOp]]:
    """Q4_K's operations for each number of columns: what other types are measured against."""
    made = {}
    packed = matmul.prepare(weight(GGMLType.Q4_K, ROWS, COLUMNS, rng), threads=threads, target=target)
    for n in counts:
        count = np.array([n], np.int64)
        x, out = rng.standard_normal((n, COLUMNS)).astype(np.float32), np.zeros((n, ROWS), np.float32)
        scratch = np.zeros(matmul.scratch_bytes(packed, n), np.uint8)
        regions = [Region(a, count.ctypes.data) for a in (x, out)]
        made[n] = matmul.bind(packed, *regions, add=False, scratch=scratch, threads=threads)
        _KEPT.append(count)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default=",".join(t.name for t in matmul.FORMATS))
    parser.add_argument("--columns", default="1,4,16,128,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lowering", default=None)
    parser.add_argument("--bf16-dot", action="store_true", help="BF16 by dot products, beside the peak of FMA")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    target, threads, rng = host(arguments.lowering), arguments.threads, np.random.default_rng(0)
    team, counts = Team(threads), [int(c) for c in arguments.columns.split(",")]
    sink = aligned(4096 * threads)
    dot, dot_ops = peak("dot", target, sink)
    fma, fma_ops = peak("fma", target, sink)
    standard = _standard(target, threads, [n for n in counts if n > 8], rng)
    memory = reading(aligned(256 << 20), target, sink, prefetched=False)
    memory.keep[0][:] = 1

    def rate(f: Callable[[], float], amount: float) -> float:
        return statistics.median(amount / f() for _ in range(arguments.repeat)) / 1e9

    for name in arguments.types.split(","):
        kind = GGMLType[name]
        if kind not in matmul.FORMATS:
            raise SystemExit(f"no kernel for {name}")
        w = weight(kind, ROWS, COLUMNS, rng)
        t = time.perf_counter()
        packed = matmul.prepare(w, threads=threads, target=target, bf16_dot=arguments.bf16_dot)
        t = time.perf_counter()
        matmul.prepare(w, threads=threads, target=target, bf16_dot=arguments.bf16_dot)
        line = [f"{name:5s} pack {w.data.size / (time.perf_counter() - t) / 1e9:4.1f} GB/s"]
        line.append(f"size x {packed.data.size / w.data.size:.3f}")
        for n in counts:
            count = np.array([n], np.int64)
            # One column: enough copies of the matrix that it comes from memory.
            copies = max(1, (300 << 20) // w.data.size) if n <= 8 else 1
            p = packed
            if copies > 1:
                big = Weight(name, kind, (ROWS * copies, COLUMNS), np.tile(w.data, copies))
                p = matmul.prepare(big, threads=threads, target=target, bf16_dot=arguments.bf16_dot)
                del big
            x = rng.standard_normal((n, COLUMNS)).astype(np.float32)
            out = np.zeros((n, p.rows), np.float32)
            scratch = np.zeros(matmul.scratch_bytes(p, n), np.uint8)
            regions = [Region(a, count.ctypes.data) for a in (x, out)]
            t = time.perf_counter()
            ops = matmul.bind(p, *regions, add=False, scratch=scratch, threads=threads)
            compiled = time.perf_counter() - t
            if compiled > 0.05:
                line.append(f"compile {compiled:.2f} s")
            team.run(ops)
            if n <= 8:
                figures = []
                for _ in range(arguments.repeat):
                    limit = memory.keep[0].size / team.run([memory]) / 1e9
                    figures.append((p.data.size / team.run(ops) / 1e9, limit))
                got, limit = (statistics.median(f) for f in zip(*figures, strict=True))
                share = statistics.median(a / b for a, b in figures) * w.data.size / packed.data.size
                line.append(f"{n} col {got:5.1f} of {limit:5.1f} GB/s ({share:.0%} over the file's bytes)")
            else:
                op, amount = (dot, dot_ops) if kind.is_quantized else (fma, fma_ops)
                figures = []
                for _ in range(arguments.repeat):
                    limit = amount * threads / team.run([op]) / 1e9
                    beside = team.run(standard[n])
                    took = team.run(ops)
                    figures.append((2.0 * n * p.rows * p.columns / took / 1e9, limit, beside / took))
                got, limit, ratio = (statistics.median(f) for f in zip(*figures, strict=True))
                share = statistics.median(f[0] / f[1] for f in figures)
                line.append(f"{n} col {got:5.0f} of {limit:4.0f} GOP/s ({share:.0%}), {ratio:.2f} of Q4_K's")
        print("; ".join(line), flush=True)


if __name__ == "__main__":
    main()
