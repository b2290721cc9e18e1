"""Speed of mixtures of experts: bytes/s of the experts that a few tokens use, operations/s at many tokens.

    python benchmarks/bench_expert_matmul.py [--types Q4_K,Q2_K] [--tokens 1,2,4,512] [--threads 2]

The sizes are those of Phi-3.5-MoE's ffn_up_exps: 16 matrices of 6400 x 4096, two of them for a token, chosen at random.
What is beside a figure was measured in the same run, in turns: the bandwidth of reading memory, and the dense matrix
multiplication of the same work (few tokens: one column, matrices as large as two experts; many: as many products).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from bench_matmul import weight
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import expert_matmul, matmul, route
from phiquant.kernels.cpu.limits import reading
from phiquant.kernels.cpu.operation import NativeOp, Region, StepHeader, aligned
from phiquant.kernels.cpu.target import host
from phiquant.kernels.cpu.team import Team, native_program
from phiquant.kernels.ops import Weight

EXPERTS, USED, ROWS, COLUMNS = 16, 2, 6400, 4096
FEW, STEPS = 16, 12  # up to so many tokens are bound by memory; steps in a row, each with routes of its own


class Bench:
    """Operations to be timed, and what keeps their memory alive."""

    def __init__(self, threads: int) -> None:
        self.team, self.keep, self.rng = Team(threads), [], np.random.default_rng(0)
        self.threads = threads

    def seconds(self, operations: list[NativeOp]) -> float:
        """Of one thread, its processor time, which other work does not lengthen."""
        program, clock = native_program(operations), time.thread_time if self.threads == 1 else time.perf_counter
        with self.team.step():
            begin = clock()
            self.team.run(program)
            return clock() - begin

    def routes(self, tokens: int) -> tuple[route.Routes, StepHeader, NativeOp]:
        """Random ones, chosen by the operation itself."""
        header = StepHeader()
        header.set("tokens", tokens)
        header.set("routes", tokens * USED)
        made = route.Routes.of(EXPERTS, USED, tokens, header.address("routes"))
        logits = self.rng.standard_normal((tokens, EXPERTS)).astype(np.float32)
        op = route.bind(Region(logits, header.address("tokens")), made, 0.01)
        self.seconds([op])
        self.keep.append((made, header, op))
        return made, header, op

    def experts(self, packed: matmul.Packed, tokens: int) -> tuple[list[NativeOp], int]:
        """A step, and how many experts it uses."""
        routes, header, _ = self.routes(tokens)
        x = self.rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
        out = np.zeros((tokens * USED, ROWS), np.float32)
        scratch = np.zeros(expert_matmul.scratch_bytes(packed, tokens * USED), np.uint8)
        regions = Region(x, header.address("tokens")), Region(out, header.address("routes"))
        made = expert_matmul.bind(packed, routes, *regions, scratch=scratch, threads=self.threads)
        return made, len(np.unique(routes.chosen))

    def dense(self, packed: matmul.Packed, rows: int) -> list[NativeOp]:
        count = np.array([rows], np.int64)
        x, out = (np.zeros((rows, width), np.float32) for width in (COLUMNS, packed.rows))
        x[:] = self.rng.standard_normal(x.shape)
        scratch = np.zeros(matmul.scratch_bytes(packed, rows), np.uint8)
        regions = [Region(a, count.ctypes.data) for a in (x, out)]
        self.keep.append(count)
        return matmul.bind(packed, *regions, add=False, scratch=scratch, threads=self.threads)


def _several(w: Weight, count: int) -> Weight:
    """A matrix as large as some experts together."""
    return Weight(w.name, w.type, (count * w.rows, w.columns), w.data[: count * w.data.size // w.matrices])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default="Q4_K,Q2_K")
    parser.add_argument("--tokens", default="1,2,4,512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    bench, target = Bench(arguments.threads), host()
    sink = aligned(4096 * arguments.threads)
    memory: NDArray[np.uint8] = aligned(512 << 20)
    memory[:] = 1
    limit = [reading(memory, target, sink, prefetched=p) for p in (False, True)]
    for name in arguments.types.split(","):
        w = weight(GGMLType[name], EXPERTS * ROWS, COLUMNS, bench.rng)
        w = Weight(w.name, w.type, (EXPERTS, ROWS, COLUMNS), w.data)
        packed = expert_matmul.prepare(w, threads=arguments.threads)
        size = packed.data.size // EXPERTS
        for tokens in (int(t) for t in arguments.tokens.split(",")):
            if tokens <= FEW:
                steps = [bench.experts(packed, tokens) for _ in range(STEPS)]
                operations, used = [op for made, _ in steps for op in made], sum(n for _, n in steps)
                # From memory too: they take turns.
                whole = [matmul.prepare(_several(w, USED), threads=arguments.threads) for _ in range(EXPERTS // USED)]
                beside = [op for i in range(STEPS) for op in bench.dense(whole[i % len(whole)], 1)]
                dense_bytes = STEPS * USED * size
                figures = []
                bench.seconds(operations)
                bench.seconds(beside)
                for _ in range(arguments.repeat):
                    bandwidth = memory.size / min(bench.seconds([op]) for op in limit)
                    got, plain = used * size / bench.seconds(operations), dense_bytes / bench.seconds(beside)
                    figures.append((got / 1e9, bandwidth / 1e9, got / bandwidth, got / plain))
                rate, bandwidth, share, ratio = (statistics.median(f) for f in zip(*figures, strict=True))
                print(
                    f"{name} {tokens} tokens, {used / STEPS:.1f} experts: {rate:.1f} of {bandwidth:.1f} GB/s "
                    f"({share:.0%}), {ratio:.2f} of the dense matrix's",
                    flush=True,
                )
                del whole, beside
                continue
            made, _ = bench.experts(packed, tokens)
            beside = bench.dense(matmul.prepare(_several(w, 1), threads=arguments.threads), tokens * USED)
            _, _, choose = bench.routes(tokens)
            amount = 2.0 * tokens * USED * ROWS * COLUMNS
            bench.seconds(made)
            bench.seconds(beside)
            times = [tuple(map(bench.seconds, (made, beside, [choose]))) for _ in range(arguments.repeat)]
            rate, ratio = statistics.median(amount / t[0] for t in times), statistics.median(t[1] / t[0] for t in times)
            routing = statistics.median(t[2] for t in times)
            print(
                f"{name} {tokens} tokens: {rate / 1e9:.0f} GOP/s, {ratio:.2f} of the dense matrix's; routing takes "
                f"{1e6 * routing:.0f} us",
                flush=True,
            )
    bench.team.close()


if __name__ == "__main__":
    main()
