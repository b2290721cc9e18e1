"""Speed of quantizing with error feedback, in million weights per second of processor time, and what it gains.

    python benchmarks/bench_feedback.py [--types Q4_K,IQ2_S] [--columns 3072,8192] [--rows 512] [--record]

Inputs are random and correlated. Processor time rather than elapsed time, so that other work on the machine counts
less. Printed are the time for the factors of a matrix's inputs, which all matrices that read them share; the speed of
the rows; and the error of the products as a part of that of the same type chosen with an importance, which is the
moments' diagonal.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from phiquant import quants
from phiquant.gguf.types import GGMLType
from phiquant.kernels.feedback import SUPPORTED, factorize, feedback_rows
from phiquant.kernels.quantize import quantize_rows
from results import Result, append, commit, processor, today


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", default=",".join(t.name for t in sorted(SUPPORTED)))
    parser.add_argument("--columns", default="3072", help="widths of matrices, with commas between")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="add the figures to benchmarks/results.csv")
    options = parser.parse_args()
    rng, found = np.random.default_rng(0), []
    for n in map(int, options.columns.split(",")):
        inputs = rng.standard_normal((n, 256), np.float32) @ rng.standard_normal((256, n), np.float32) / 16
        inputs += rng.standard_normal((n, n), np.float32)
        moments = inputs.T @ inputs
        del inputs
        diagonal = np.ascontiguousarray(np.diagonal(moments))
        start = time.process_time()
        factor = factorize(moments)
        what = f"factors of moments of {n} inputs, processor time"
        found.append(Result(today(), commit(), processor(), 1, what, time.process_time() - start, "s"))
        print(f"{what}: {found[-1].figure:.2f} s", flush=True)
        x = rng.standard_normal((options.rows, n), np.float32) * np.float32(0.02)
        for type in (GGMLType[name] for name in options.types.split(",")):
            feedback_rows(x[:1], type, factor)  # kernels are compiled
            start = time.process_time()
            data = feedback_rows(x, type, factor, threads=options.threads)
            speed = x.size / 1e6 / (time.process_time() - start)
            plain = quantize_rows(x, GGMLType.F32, type, diagonal)
            errors = [x - quants.dequantize(blocks, type, x.shape) for blocks in (data, plain)]
            ours, theirs = (float(np.einsum("ij,ij", e @ moments, e)) for e in errors)
            print(f"{type.name:8} {speed:6.2f} M weights/s   error {ours / theirs:.3f} of that with an importance")
            what = f"quantize {type.name} with error feedback, {n} columns, processor time"
            found.append(Result(today(), commit(), processor(), options.threads, what, speed, "M weights/s"))
    if options.record:
        append(found)


if __name__ == "__main__":
    main()
