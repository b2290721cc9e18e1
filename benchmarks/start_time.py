"""Seconds from the start of `phiquant run` to the first generated token, kernels being compiled already.

python benchmarks/start_time.py MODEL.gguf [--rounds 7] [--cold] [--memory] [--no-results]

With --cold it is the first start ever: every round has an empty cache of kernels. With --memory it is not the time but
the resident memory: after loading, and after a prompt that fills the context of 512 tokens, so that all of the
key-value cache is in use; beside the bytes of the file and of the cache. Peaks are of the whole life of the process.
"""

from __future__ import annotations

import argparse
import json
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


MEMORY = """
import json, os, resource, sys
import numpy as np
from phiquant import LLM

def resident():
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with LLM.load(sys.argv[1], context=512, speculate=False) as llm:
    found = {"loaded": resident(), "peak of loading": peak()}
    ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, 504).tolist()
    llm.generate(ids, max_tokens=8, temperature=0, ignore_eos=True)
    found |= {"used": resident(), "peak": peak()}
    found["cache"] = sum(layer.nbytes for layer in llm.engine._executable._cache.layers)
print(json.dumps(found))
"""


def memory(model: Path) -> dict[str, int]:
    """Bytes in memory of a process of its own; the cache's are all in use in the end."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(model)], stdout=subprocess.PIPE, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure_memory(model: Path) -> list[Result]:
    """Rows for results.csv; also printed."""
    found, file = memory(model), model.stat().st_size
    shared = today(), commit(), processor(), 0
    rows = []
    for name, whole, over in (
        ("loaded", file, "the file"),
        ("peak of loading", file, "the file"),
        ("used", file + found["cache"], "the file and the cache"),
        ("peak", file + found["cache"], "the file and the cache"),
    ):
        ratio = found[name] / whole
        print(f"{model.name}: {name}: {found[name] / 1e9:.3f} GB, {ratio:.3f} times {over} of {whole / 1e9:.3f} GB")
        rows.append(Result(*shared, f"{model.name}: resident memory, {name}, over {over}", ratio, "ratio"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--memory", action="store_true", help="resident memory instead (Linux)")
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    if a.memory:
        rows = measure_memory(a.model)
        if not a.no_results:
            append(rows)
        return
    start(a.model)
    seconds = [(first_start if a.cold else start)(a.model) for _ in range(a.rounds)]
    median = statistics.median(seconds)
    print(f"{a.model.name}: {median:.3f} s to the first token ({' '.join(f'{s:.3f}' for s in sorted(seconds))})")
    if not a.no_results:
        what = f"{a.model.name}: {'first start ever' if a.cold else 'process start'} to first token"
        append([Result(today(), commit(), processor(), 0, what, median, "s")])


if __name__ == "__main__":
    main()
