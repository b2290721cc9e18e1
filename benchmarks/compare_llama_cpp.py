"""phiquant and llama.cpp on the same files in one run: prompt processing, decoding, and checkpoint to Q4_K_M.

    python benchmarks/compare_llama_cpp.py CHECKPOINT --peer PYTHON [--converter-python PYTHON --source DIR]

CHECKPOINT is a folder, such as make_synthetic.py writes. PYTHON is the interpreter of an environment with
llama-cpp-python, built for this processor; `--converter-python` one with torch and transformers, for llama.cpp's
converter in `--source`. Both programs load the same file and take turns within seconds, each waiting while the other
works, because the machine's speed drifts by more than they differ; medians of the figures and of the ratios of
neighbouring turns are quoted. Both get the same number of threads, a context of 1024 and batches of 512.
Results are appended to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from results import Result, append, commit, processor, today

HERE = Path(__file__).resolve().parent
OURS = HERE / "run_phiquant.py"
THEIRS = HERE / "run_llama_cpp.py"


@dataclass
class Tally:
    """What the rounds gave for one figure."""

    what: str
    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the ratios of neighbouring turns."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def show(self) -> None:
        mine = statistics.median(self.ours)
        line = f"{self.what}: {mine:.4g} {self.unit} ({_spread(self.ours)})"
        if self.theirs:
            peer = statistics.median(self.theirs)
            line += f"; llama.cpp {peer:.4g} ({_spread(self.theirs)}); ratio {self.ratio:.3f}"
        print(line, flush=True)


def _spread(values: list[float]) -> str:
    return " ".join(f"{v:.4g}" for v in values)


def measured(command: list[str], **environment: str) -> tuple[str, float, int]:
    """Runs a process; its output, seconds, and peak resident bytes (mapped files included)."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}\n{text}")
    return text, seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Runner:
    """A program that has loaded the model and waits for requests."""

    def __init__(self, python: str, script: Path, job: dict[str, object]) -> None:
        command = [python, str(script), json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, kind: str, count: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({kind: count}) + "\n")
        self.process.stdin.flush()
        return self.answer()["speed"]

    def close(self) -> int:
        """Ends the program; its peak resident bytes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_speed(a: argparse.Namespace, model: Path) -> list[Tally]:
    """Prompt and decoding speed, in turns of a few seconds."""
    job = {"model": str(model), "threads": a.threads, "seed": 0}
    own, peer = Runner(sys.executable, OURS, job), Runner(a.peer, THEIRS, job)
    tallies = []
    for kind, count, what in (("prompt", a.prompt, "prompt of"), ("decode", a.decode, "decoding")):
        tally = Tally(f"{what} {count} tokens, {a.type}", "tokens/s")
        for turn in range(a.rounds + 1):  # the first warms up
            for runner in (own, peer) if turn % 2 else (peer, own):
                speed = runner.measure(kind, count)
                time.sleep(0.2)  # until the other's waiting threads sleep
                if turn:
                    (tally.ours if runner is own else tally.theirs).append(speed)
        tallies.append(tally)
    memory = Tally(f"running {a.type}, peak memory", "GB")
    memory.ours.append(own.close() / 1e9)
    memory.theirs.append(peer.close() / 1e9)
    tallies.append(memory)
    for tally in tallies:
        tally.show()
    return tallies


def compare_quantization(a: argparse.Namespace, model: Path) -> list[Tally]:
    """Checkpoint to a quantized file: one step here, two there; `model` is where ours is left."""
    seconds, memory = Tally(f"checkpoint to {a.type}", "s"), Tally(f"checkpoint to {a.type}, peak memory", "GB")
    for _ in range(a.quantize_rounds):
        step = [sys.executable, "-m", "phiquant", "quantize", str(a.checkpoint), str(model), a.type, str(a.threads)]
        _, took, peak = measured([*step, "--quiet"])
        seconds.ours.append(took)
        memory.ours.append(peak / 1e9)
        if a.converter_python is None:
            continue
        half, small = a.work / "peer-F16.gguf", a.work / "peer.gguf"
        script = [
            str(a.source / "convert_hf_to_gguf.py"),
            str(a.checkpoint),
            "--outfile",
            str(half),
            "--outtype",
            "f16",
        ]
        _, first, peak_first = measured([a.converter_python, *script])
        job = {"source": str(half), "out": str(small), "type": a.type, "threads": a.threads}
        _, second, peak_second = measured([a.peer, str(THEIRS), json.dumps(job)])
        print(f"llama.cpp: {first:.1f} s to convert, {second:.1f} s to quantize", flush=True)
        seconds.theirs.append(first + second)
        memory.theirs.append(max(peak_first, peak_second) / 1e9)
        half.unlink()
        small.unlink()
    seconds.show()
    memory.show()
    return [seconds, memory]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", required=True, help="python with llama-cpp-python")
    parser.add_argument("--converter-python", default=None, help="python with torch and transformers")
    parser.add_argument("--source", type=Path, default=None, help="llama.cpp's sources")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quantize-rounds", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--work", type=Path, default=None, help="where files are made; default: a temporary folder")
    parser.add_argument("--no-results", action="store_true", help="do not append to results.csv")
    a = parser.parse_args()
    if a.converter_python and not a.source:
        parser.error("--converter-python needs --source")
    return a


def main() -> None:
    a = arguments()
    own_folder = a.work is None
    a.work = Path(tempfile.mkdtemp(prefix="phiquant-bench-")) if own_folder else a.work
    a.work.mkdir(parents=True, exist_ok=True)
    model = a.work / f"{a.checkpoint.resolve().name}-{a.type}.gguf"
    try:
        tallies: list[Tally] = []
        if a.quantize_rounds or not model.exists():
            a.quantize_rounds = max(a.quantize_rounds, 1)
            tallies += compare_quantization(a, model)
        if a.rounds:
            tallies += compare_speed(a, model)
    finally:
        if own_folder:
            shutil.rmtree(a.work)
    version = measured([a.peer, "-c", "import llama_cpp; print(llama_cpp.__version__)"])[0].strip()
    if a.no_results:
        return
    rows = []
    for tally in tallies:
        mine = statistics.median(tally.ours)
        peer = statistics.median(tally.theirs) if tally.theirs else None
        row = Result(today(), commit(), processor(), a.threads, f"{a.checkpoint.name}: {tally.what}", mine, tally.unit)
        if peer is not None:
            row = Result(*list(vars(row).values())[:7], "llama.cpp", f"llama-cpp-python {version}", peer, tally.ratio)
        rows.append(row)
    append(rows)


if __name__ == "__main__":
    main()
