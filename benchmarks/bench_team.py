"""What a team of threads costs: the barrier after every operation, and waking the team up for a step.

python benchmarks/bench_team.py [--threads 2] [--rounds 201] [--no-results]

The barrier: operations that do nothing, many in one call, per operation. Waking: a call with one such operation after
the team has slept, beside the same call right after another one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from phiquant.kernels.cpu.emit import Emitter, Value
from phiquant.kernels.cpu.library import function
from phiquant.kernels.cpu.operation import NativeOp
from phiquant.kernels.cpu.team import Team, native_program
from results import Result, append, commit, processor, today

OPERATIONS = 1000


def _nothing(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    """An operation without work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    empty = NativeOp(function("benchmark.nothing", 4, _nothing), np.zeros(1, np.int64))
    many, one = native_program([empty] * OPERATIONS), native_program([empty])
    barriers, calls, wakings = [], [], []
    team = Team(a.threads)

    def took(program: object) -> float:
        begin = time.perf_counter()
        with team.step():
            team.run(program)  # type: ignore[arg-type]
        return time.perf_counter() - begin

    try:
        for _ in range(a.rounds):
            barriers.append(took(many) / OPERATIONS)
            calls.append(took(one))
            time.sleep(0.02)
            wakings.append(took(one))
    finally:
        team.close()
    rows = []
    for what, values in (("barrier", barriers), ("a call", calls), ("a call after sleep", wakings)):
        figure = statistics.median(values) * 1e6
        print(f"{what}: {figure:.2f} us (from {min(values) * 1e6:.2f} to {max(values) * 1e6:.2f})")
        rows.append(Result(today(), commit(), processor(), a.threads, f"team: {what}", figure, "us"))
    if not a.no_results:
        append(rows)


if __name__ == "__main__":
    main()
