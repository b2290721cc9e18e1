"""Where the time of a step goes: every native operation timed by itself, beside the machine's limits.

    python benchmarks/step_profile.py MODEL.gguf [--prompt 256] [--depth 0] [--threads 2] [--rounds 5] [--no-results]

Operations run one at a time in a step that is otherwise the usual one; what an empty call costs is taken off. Medians.
The shares of matrix multiplication, attention and everything else go to results.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phiquant import LLM
from phiquant.kernels import ops
from phiquant.kernels.cpu.backend import CpuExecutable
from phiquant.kernels.cpu.embed import Embedding
from phiquant.kernels.cpu.limits import Limits
from phiquant.kernels.cpu.team import native_program
from results import Result, append, commit, processor, today

PARTS = {"MatMul": "matrix multiplication", "ExpertMatMul": "matrix multiplication", "Attention": "attention"}


class Profile:
    """Stands in for the run of an executable."""

    def __init__(self, executable: CpuExecutable) -> None:
        self.executable = executable
        self.seconds: dict[str, list[float]] = {}
        self.work: dict[str, tuple[float, float]] = {}  # operations per row, bytes
        made = executable._keep
        self.steps: list[tuple[str, object]] = []
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for op, bound in zip(made.program.operations, made.bound, strict=True):
            if isinstance(bound, Embedding):
                self.steps.append(("Embed", bound))
                continue
            for native in bound:
                name, last = type(op).__name__, native is bound[-1]
                if isinstance(op, ops.MatMul):
                    kind = op.weight.name.split(".")[-2]
                    name = f"MatMul {kind} {op.weight.type.name}" if last else "rounding of activations"
                    if last:
                        totals[name][0] += 2.0 * op.weight.rows * op.weight.columns
                        totals[name][1] += op.weight.data.nbytes
                self.steps.append((name, native_program([native])))
        self.work = {name: (a, b) for name, (a, b) in totals.items()}

    def run(self, step: ops.Step) -> NDArray[np.float32]:
        e = self.executable
        step.check(e.program, e.capacity)
        took: dict[str, float] = defaultdict(float)
        with e._team.step():
            tiles, _ = e._load(step)
            e._header.set("first_tile", 0)
            e._header.set("last_tile", tiles)
            empty = native_program([])
            begin = time.perf_counter()
            for _ in range(100):
                e._team.run(empty)
            call = (time.perf_counter() - begin) / 100
            for name, what in self.steps:
                begin = time.perf_counter()
                if isinstance(what, Embedding):
                    what.run(len(step.tokens))
                    took[name] += time.perf_counter() - begin
                else:
                    e._team.run(what)
                    took[name] += max(0.0, time.perf_counter() - begin - call)
        for name, seconds in took.items():
            self.seconds.setdefault(name, []).append(seconds)
        return e._logits[: len(step.outputs)]


def table(profile: Profile, rows: int, limits: Limits) -> None:
    """Print operations by time."""
    dot, read = (statistics.median(f() for _ in range(3)) for f in (limits.dot_products, limits.read_bandwidth))
    medians = {name: statistics.median(values) for name, values in profile.seconds.items()}
    whole = sum(medians.values())
    print(f"{rows} tokens: {whole * 1e3:.1f} ms; dot products {dot / 1e9:.0f} GOP/s, reading {read / 1e9:.1f} GB/s")
    print("| operation | ms | share | of the limit |\n| --- | --: | --: | --- |")
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        bound = ""
        if name in profile.work:
            operations, nbytes = profile.work[name]
            outputs = 1 if name.split()[1] == "output" or "token_embd" in name else rows
            if rows > 16 and outputs > 1:
                bound = f"{operations * outputs / seconds / dot:.0%} of the dot products"
            else:
                bound = f"{nbytes / seconds / read:.0%} of the bandwidth"
        print(f"| {name} | {seconds * 1e3:.2f} | {seconds / whole:.1%} | {bound} |")


def shares(profile: Profile) -> dict[str, float]:
    """Of the time of a step, in percent."""
    found = dict.fromkeys(("matrix multiplication", "attention", "everything else"), 0.0)
    for name, values in profile.seconds.items():
        kind = name.split()[0]
        found[PARTS.get(kind, "everything else")] += statistics.median(values)
    whole = sum(found.values())
    return {name: 100 * seconds / whole for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    with (
        LLM.load(a.model, context=a.depth + a.prompt + 64, threads=a.threads, speculate=False, batch=a.prompt) as llm,
        Limits(a.threads) as limits,
    ):
        executable = llm.engine._executable
        assert isinstance(executable, CpuExecutable)
        before = rng.integers(100, 30000, a.depth).tolist()
        if before:
            llm.generate(before, max_tokens=1, ignore_eos=True)
        usual = executable.run
        for rows in (a.prompt, 1):
            profile = Profile(executable)
            for turn in range(a.rounds + 1):
                fresh = rng.integers(100, 30000, rows).tolist()
                executable.run = profile.run if turn else usual  # type: ignore[method-assign]
                llm.generate([*before, *fresh], max_tokens=1, temperature=0, ignore_eos=True)
            executable.run = usual  # type: ignore[method-assign]
            table(profile, rows, limits)
            behind = f" after {a.depth}" if a.depth else ""
            step = (f"a prompt of {rows} tokens" if rows > 1 else "a token") + behind
            for name, share in shares(profile).items():
                print(f"{name}: {share:.1f} % of {step}")
                what = f"{a.model.name}: {name}, share of {step}"
                if not a.no_results:
                    append([Result(today(), commit(), processor(), a.threads, what, share, "%")])


if __name__ == "__main__":
    main()
