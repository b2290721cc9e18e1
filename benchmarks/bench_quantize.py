"""Speed of quantizing on one core, in million weights per second of processor time, beside llama.cpp's quantizers.

    python benchmarks/bench_quantize.py [--types Q4_K,Q6_K] [--source BF16] [--importance] [--record]

Repetitions of both are interleaved and medians are printed. Processor time rather than elapsed time, so that other work
on the machine counts less. llama.cpp is called through its shared library, the one built for this processor where
`make bench-types` makes it, else the one of `make interop`; without it only our own figures are printed. Types that
need an importance are given one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from phiquant import quants
from phiquant.gguf.types import GGMLType
from phiquant.kernels.dequantize import FLOATS, dequantize_rows
from phiquant.kernels.quantize import quantize_rows
from results import Result, append, commit, processor, today

COLUMNS = 3072
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phiquant"
PYTHON = Path(os.environ.get("PHIQUANT_INTEROP_PYTHON", HOME / "interop/bin/python"))
NATIVE = Path(os.environ.get("PHIQUANT_LLAMA_CPP_NATIVE", HOME / "llama.cpp-native")) / "bin"
_FIND = """
import importlib.metadata as m, importlib.util, json, pathlib
home = pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent
print(json.dumps([m.version("llama_cpp_python"), [str(p) for p in home.rglob("libggml-base.*") if p.suffix != ".0"]]))
"""


def llama_cpp() -> tuple[str, Callable[..., object]] | None:
    """Version and ggml_quantize_chunk, if it is installed; out of the build for this processor if there is one."""
    if not PYTHON.exists():
        return None
    version, files = json.loads(subprocess.run([PYTHON, "-c", _FIND], capture_output=True, check=True).stdout)
    native = [str(path) for path in NATIVE.glob("libggml-base.*")]
    chunk = ctypes.CDLL(min(native or files, key=len)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return version, chunk


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", default=",".join(t.name for t in sorted(quants.QUANTIZABLE) if t.is_quantized))
    parser.add_argument("--source", default="BF16", choices=[t.name for t in FLOATS])
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--rows", type=int, default=128, help=f"of {COLUMNS} weights, quantized in one call")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="add the figures to benchmarks/results.csv")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((options.rows, COLUMNS)) * 0.02).astype(np.float32)
    random = rng.random(COLUMNS, np.float32)
    source = GGMLType[options.source]
    rows = quantize_rows(x, GGMLType.F32, source)
    peer = llama_cpp()
    wide = dequantize_rows(rows, source, options.rows, COLUMNS)
    found = []
    for type in (GGMLType[name] for name in options.types.split(",")):
        out = np.empty((options.rows, type.row_bytes(COLUMNS)), np.uint8)
        importance = random if options.importance or type in quants.IMPORTANCE_REQUIRED else None
        quantize_rows(rows[:1], source, type, importance)
        ours, theirs = [], []
        for _ in range(options.repeat):
            ours.append(seconds(lambda type=type, w=importance: quantize_rows(rows, source, type, w)))
            if peer is not None:
                weights = None if importance is None else importance.ctypes.data
                arguments = (int(type), wide.ctypes.data, out.ctypes.data, 0, options.rows, COLUMNS, weights)
                theirs.append(seconds(lambda arguments=arguments: peer[1](*arguments)))
        speed = x.size / 1e6 / statistics.median(ours)
        line = f"{type.name:7} {speed:8.1f} M weights/s"
        how = "" if importance is None else " with importance"
        what = f"quantize {type.name} from {source.name}{how}, processor time"
        result = Result(today(), commit(), processor(), 1, what, speed, "M weights/s")
        if peer is not None:
            other = x.size / 1e6 / statistics.median(theirs)
            line += f"   llama.cpp {other:8.1f}   {speed / other:5.1f} x"
            result = Result(*list(vars(result).values())[:7], "llama.cpp (from F32)", peer[0], other, speed / other)
        print(line, flush=True)
        found.append(result)
    if options.record:
        append(found)


if __name__ == "__main__":
    main()
