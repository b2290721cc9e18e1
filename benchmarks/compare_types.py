"""Every file type: time to quantize beside llama-quantize, prompt and decoding speed beside llama.cpp, on one F16 file.

    python benchmarks/compare_types.py F16.gguf --tools DIR [--types Q4_K_M,IQ4_XS] [--peer PYTHON] [--no-quantize-peer]

F16.gguf is a conversion of what make_synthetic.py writes. DIR holds llama.cpp's tools and libraries, built for this
processor (scripts/build_llama_cpp.sh). PYTHON is the interpreter of an environment with llama-cpp-python, which is made
to use those libraries; without it no speeds are compared. The importance matrix is random: it costs the same time as a
real one. Quantizing takes turns, each program alone; engines take turns of seconds (see compare_llama_cpp.py). Results
are appended to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from compare_llama_cpp import OURS, THEIRS, Runner, Tally, measured
from phiquant.convert.filetypes import DEFAULT_TYPES
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.gguf import FileType, GGUFFile
from results import Result, append, commit, processor, today

PLAIN = {FileType.F32, FileType.F16, FileType.BF16}
PEER_LACKS = {FileType.NVFP4}  # as a file type


def random_importance(model: Path, out: Path) -> None:
    """An importance matrix that fits a model, with no meaning."""
    rng = np.random.default_rng(0)
    entries = {}
    with GGUFFile.open(model) as file:
        for info in file.tensors.values():
            if len(info.shape) == 2 and info.name.endswith(".weight"):
                sums = rng.random((1, info.shape[-1]), np.float32) ** 4 + np.float32(1e-3)
                entries[info.name] = Statistic(sums * 512, np.full(1, 512, np.int64))
    ImportanceMatrix(entries, 1, 512, ("random",)).write_gguf(out)


def compare_quantization(a: argparse.Namespace, name: str, importance: Path, out: Path) -> list[Tally]:
    """Seconds and peak memory of both programs."""
    seconds, memory = Tally(f"F16 to {name}", "s"), Tally(f"F16 to {name}, peak memory", "GB")
    ours = [sys.executable, "-m", "phiquant", "quantize", str(a.model), str(out), name, str(a.threads), "--quiet"]
    theirs = [str(a.tools / "llama-quantize"), "--imatrix", str(importance), str(a.model)]
    other = out.with_name("peer.gguf")
    for _ in range(a.quantize_rounds):
        _, took, peak = measured([*ours, "--imatrix", str(importance)])
        seconds.ours.append(took)
        memory.ours.append(peak / 1e9)
        if a.quantize_peer and FileType[name] not in PEER_LACKS:
            _, took, peak = measured([*theirs, str(other), name, str(a.threads)], LD_LIBRARY_PATH=str(a.tools))
            seconds.theirs.append(took)
            memory.theirs.append(peak / 1e9)
            other.unlink()
    return [seconds, memory]


def compare_speed(a: argparse.Namespace, name: str, model: Path) -> list[Tally]:
    """Tokens a second of both engines on one file, in turns."""
    job = {"model": str(model), "threads": a.threads, "seed": 0}
    os.environ["LLAMA_CPP_LIB_PATH"] = str(a.tools)
    own, peer = Runner(sys.executable, OURS, job), Runner(a.peer, THEIRS, job)
    tallies = []
    for kind, count, what in (("prompt", a.prompt, "prompt of"), ("decode", a.decode, "decoding")):
        tally = Tally(f"{what} {count} tokens, {name}", "tokens/s")
        for turn in range(a.rounds + 1):  # the first warms up
            for runner in (own, peer) if turn % 2 else (peer, own):
                speed = runner.measure(kind, count)
                time.sleep(0.2)  # until the other's waiting threads sleep
                if turn:
                    (tally.ours if runner is own else tally.theirs).append(speed)
        tallies.append(tally)
    memory = Tally(f"running {name}, peak memory", "GB")
    memory.ours.append(own.close() / 1e9)
    memory.theirs.append(peer.close() / 1e9)
    return [*tallies, memory]


def arguments() -> argparse.Namespace:
    usual = [kind.name for kind in DEFAULT_TYPES if kind not in PLAIN]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="an F16 GGUF file")
    parser.add_argument("--tools", type=Path, required=True, help="llama.cpp's tools and libraries")
    parser.add_argument("--peer", default=None, help="python with llama-cpp-python")
    parser.add_argument("--types", default=",".join(usual))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quantize-rounds", type=int, default=1)
    parser.add_argument("--quantize-peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--work", type=Path, default=None, help="where files are made; default: a temporary folder")
    parser.add_argument("--no-results", action="store_true", help="do not append to results.csv")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    work = Path(tempfile.mkdtemp(prefix="phiquant-bench-", dir=a.work))
    version = "native"
    try:
        importance = work / "imatrix.gguf"
        random_importance(a.model, importance)
        if a.peer:
            version = measured([a.peer, "-c", "import llama_cpp; print(llama_cpp.__version__)"])[0].strip()
        for name in a.types.split(","):
            out = work / f"model-{name}.gguf"
            tallies = compare_quantization(a, name, importance, out)
            if a.peer and a.rounds:
                tallies += compare_speed(a, name, out)
            size = out.stat().st_size
            out.unlink()
            rows = []
            for tally in tallies:
                tally.show()
                mine, what = statistics.median(tally.ours), f"{a.model.stem}: {tally.what}"
                row = (today(), commit(), processor(), a.threads, what, mine, tally.unit)
                if tally.theirs:
                    peer = statistics.median(tally.theirs)
                    rows.append(Result(*row, "llama.cpp", f"native build of {version}", peer, tally.ratio))
                else:
                    rows.append(Result(*row))
            print(f"{name}: {size / 1e9:.3f} GB", flush=True)
            if not a.no_results:
                append(rows)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
