"""Peak memory (ru_maxrss) of `phiquant quantize` on the largest tensors there are, and the cost of the checksum.

    python benchmarks/bench_memory.py [FOLDER] [--types Q4_K_M,IQ3_S] [--threads 2,16] [--small] [--record]

Three files are made in FOLDER, one after the other, each of F16 weights: an embedding of 200,064 rows of 3,072, the
three stacks of 16 experts of a layer of Phi-3.5-MoE (6,400 x 4,096 each), and a matrix whose single rows are larger
than all that a run holds of a tensor. Each is quantized by a process of its own, whose peak the system tells.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from phiquant.gguf import GGMLType, GGUFWriter, ValueType
from phiquant.gguf.checksum import PIECE, Checksum, Summed, pieces
from phiquant.kernels.quantize import quantize_rows
from results import Result, append, commit, processor, today

LIMIT = 1.5e9  # bytes, whatever the model
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "embedding 200,064 x 3,072": {"token_embd.weight": (200_064, 3_072)},
    "3 stacks of 16 experts 6,400 x 4,096": {
        "blk.0.ffn_gate_exps.weight": (16, 6_400, 4_096),
        "blk.0.ffn_up_exps.weight": (16, 6_400, 4_096),
        "blk.0.ffn_down_exps.weight": (16, 4_096, 6_400),
    },
    "2 rows of 134,217,728": {"blk.0.ffn_up.weight": (2, 1 << 27)},
}


def write_model(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """A GGUF file of these tensors in F16, holding the same random numbers again and again."""
    numbers = (np.random.default_rng(0).standard_normal(PIECE, np.float32) * 0.02).astype(np.float16)
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phimoe", ValueType.STRING)
        writer.add("phimoe.block_count", 1, ValueType.UINT32)
        writer.add("phimoe.attention.head_count", 32, ValueType.UINT32)
        writer.add("phimoe.expert_count", 16, ValueType.UINT32)
        for name, shape in tensors.items():
            writer.add_tensor(name, shape, GGMLType.F16)
        writer.begin()
        for name, shape in tensors.items():
            for piece in pieces(shape):
                count = piece.rows * piece.columns
                writer.write(name, numbers[:count], piece.start(GGMLType.F16, shape[-1]))
        writer.commit()


def peak(*command: str) -> tuple[int, float]:
    """Peak resident bytes of a command, and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "phiquant", *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - started


def checksum_share(kind: GGMLType, repeat: int = 15) -> float:
    """Processor time of summing a piece up, over that of quantizing it: medians, interleaved."""
    columns = 4096
    x = (np.random.default_rng(1).standard_normal((PIECE // columns, columns)) * 0.02).astype(np.float16)
    tensor = Summed("t", x.shape, kind)
    (piece,) = pieces(x.shape)
    quantizing, summing = [], []
    for _ in range(repeat):
        start = time.thread_time()
        data = quantize_rows(x, GGMLType.F16, kind).reshape(-1)
        middle = time.thread_time()
        Checksum([tensor]).add("t", piece, data)
        quantizing.append(middle - start)
        summing.append(time.thread_time() - middle)
    return statistics.median(summing) / statistics.median(quantizing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--types", default="Q4_K_M")
    parser.add_argument("--threads", default="2,16")
    parser.add_argument("--small", action="store_true", help="a hundredth of the rows, to try the script")
    parser.add_argument("--record", action="store_true", help="add the figures to benchmarks/results.csv")
    options = parser.parse_args()
    found = []

    def note(what: str, threads: int, figure: float, unit: str) -> None:
        print(f"{what}, {threads} threads: {figure:.4g} {unit}", flush=True)
        found.append(Result(today(), commit(), processor(), threads, what, figure, unit))

    worst = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
        for what, tensors in SHAPES.items():
            if options.small:
                tensors = {name: (*shape[:-2], max(1, shape[-2] // 100), shape[-1]) for name, shape in tensors.items()}
            write_model(source, tensors)
            for kind in options.types.split(","):
                for threads in map(int, options.threads.split(",")):
                    used, seconds = peak("quantize", "--quiet", str(source), str(target), kind, str(threads))
                    note(f"peak memory, quantize to {kind}, {what}", threads, used / 1e6, "MB")
                    print(f"    {seconds:.1f} s for {source.stat().st_size / 1e9:.2f} GB", flush=True)
                    worst = max(worst, used)
            source.unlink()
    for kind in (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0):
        note(f"checksum, share of quantizing {kind.name} from F16, processor time", 1, 100 * checksum_share(kind), "%")
    if options.record:
        append(found)
    if worst > LIMIT:
        raise SystemExit(f"peak memory of {worst / 1e6:.0f} MB is above {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
