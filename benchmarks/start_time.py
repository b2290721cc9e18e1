"""Seconds from the start of `phiquant run` to the first generated token, kernels being compiled already.

python benchmarks/start_time.py MODEL.gguf [--rounds 7] [--cold] [--no-results]

With --cold it is the first start ever: every round has an empty cache of kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import Result, append, commit, processor, today

PROMPT = "Once upon a time there was a little girl"


def start(model: Path, cache: str | None = None) -> float:
    """One process, until a byte comes after the repeated prompt."""
    environment = os.environ | ({"PHIQUANT_CACHE_DIR": cache} if cache else {})
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "phiquant", "run", str(model), "-no-cnv", "-p", PROMPT, "-n", "8", "--quiet"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    text = process.stdout.read(len(PROMPT) + 1)
    seconds = time.perf_counter() - begun
    process.stdout.read()
    if process.wait() or len(text) != len(PROMPT) + 1:
        sys.exit("phiquant run failed")
    return seconds


def first_start(model: Path) -> float:
    """The same with no kernel compiled."""
    with tempfile.TemporaryDirectory() as cache:
        return start(model, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    start(a.model)
    seconds = [(first_start if a.cold else start)(a.model) for _ in range(a.rounds)]
    median = statistics.median(seconds)
    print(f"{a.model.name}: {median:.3f} s to the first token ({' '.join(f'{s:.3f}' for s in sorted(seconds))})")
    if not a.no_results:
        what = f"{a.model.name}: {'first start ever' if a.cold else 'process start'} to first token"
        append([Result(today(), commit(), processor(), 0, what, median, "s")])


if __name__ == "__main__":
    main()
