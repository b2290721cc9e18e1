"""Loads and frees the bundled model many times, two at once: resident memory must stay flat, and no thread be left.

    python benchmarks/load_cycles.py [--cycles 1000] [--no-results]

Each cycle loads two engines, generates with both and closes them. Memory is compared after a tenth of the cycles, when
caches are warm, and at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path

from phiquant import LLM
from phiquant.convert import quantize
from results import Result, append, commit, processor, today

MODEL = Path(__file__).resolve().parent.parent / "models" / "phi3-tiny"
ALLOWED = 8e6  # bytes that resident memory may grow by: pages that the allocator keeps, not leaks


def resident() -> int:
    """Bytes in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def native_threads() -> int:
    """Threads of this process, Python's and others."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def cycle(path: Path) -> None:
    """Two engines at once, and both gone."""
    with LLM.load(path, context=256, threads=2) as one, LLM.load(path, context=256, threads=2) as two:
        texts = {llm.generate("Once upon a time", max_tokens=4, temperature=0).text for llm in (one, two)}
    assert len(texts) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        quantize(MODEL, path, "Q4_K_M", quiet=True)
        before = native_threads()
        warm = 0
        for i in range(a.cycles):
            cycle(path)
            if i == a.cycles // 10:
                warm = resident()
            if i % 100 == 99:
                print(f"{i + 1}: {resident() / 1e6:.1f} MB, {native_threads()} threads", flush=True)
    grown, left = resident() - warm, native_threads() - before
    print(f"memory grew by {grown / 1e6:.2f} MB from cycle {a.cycles // 10} to {a.cycles}, {left} threads are left")
    if not a.no_results:
        what = f"phi3-tiny: growth of memory over {a.cycles - a.cycles // 10} cycles of loading two engines"
        append([Result(today(), commit(), processor(), 2, what, grown / 1e6, "MB")])
    if grown > ALLOWED or left > 0 or threading.active_count() > 1:
        sys.exit("something is left behind")


if __name__ == "__main__":
    main()
