"""What observing costs: the sums of squares of a step's rows, beside the multiplication that reads the same rows.

python benchmarks/bench_sum_squares.py [--rows 512] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from bench_matmul import Team, weight
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import matmul, sum_squares
from phiquant.kernels.cpu.operation import Region

SHAPES = ((3072, 9216), (8192, 3072), (256, 1536))  # inputs, outputs: attn_qkv and ffn_down of Phi-3.5-mini; a tiny one


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    team, rng, n = Team(arguments.threads), np.random.default_rng(0), arguments.rows
    count = np.array([n], np.int64)
    for inputs, outputs in SHAPES:
        x, out = rng.standard_normal((n, inputs)).astype(np.float32), np.zeros((n, outputs), np.float32)
        regions = [Region(a, count.ctypes.data) for a in (x, out)]
        packed = matmul.prepare(weight(GGMLType.F16, outputs, inputs, rng), threads=arguments.threads)
        scratch = np.zeros(matmul.scratch_bytes(packed, n), np.uint8)
        multiply = matmul.bind(packed, *regions, add=False, scratch=scratch, threads=arguments.threads)
        observe = [sum_squares.bind(regions[0], np.zeros((1, inputs)), np.zeros(1, np.int64))]
        pairs = [(team.run(observe), team.run(multiply)) for _ in range(arguments.repeat)][1:]
        seconds, whole = (statistics.median(figures) for figures in zip(*pairs, strict=True))
        share = statistics.median(a / b for a, b in pairs)
        print(
            f"{n} rows of {inputs}: {1e3 * seconds:.2f} ms, {x.nbytes / seconds / 1e9:.1f} GB/s; "
            f"times {outputs} columns of F16: {1e3 * whole:.1f} ms; {share:.1%} of it"
        )


if __name__ == "__main__":
    main()
