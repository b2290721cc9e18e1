"""Every file type on the bundled model: size, quality with and without an importance matrix, time, speed; as a table.

    python benchmarks/format_table.py [--types Q4_K_M,IQ2_M] [--windows 8] [--peer PYTHON] [--out docs/formats]

Writes table.md and, where matplotlib is installed, size-quality.svg into the folder. The original is F32; the matrix is
collected on calibration.txt and quality measured on evaluation.txt, both beside the model. With PYTHON, an interpreter
with llama-cpp-python, llama.cpp makes the same file too, with the same matrix (without one where it is of no use), and
its quality is measured on our engine. What cannot be made or run by this version is left out, and said. Run it on an
idle machine: it takes some minutes, and the times are of this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phiquant import LLM
from phiquant.calibrate import collect
from phiquant.convert import Importance, Report, convert, quantize
from phiquant.convert.filetypes import DEFAULT_TYPES
from phiquant.convert.imatrix import ImportanceMatrix
from phiquant.errors import PhiquantError
from phiquant.eval import divergence, perplexity
from phiquant.gguf import FileType, GGUFFile
from results import commit, processor, today

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "phi3-tiny"
WINDOW = 512
SPEED_PROMPT, SPEED_DECODE, SPEED_ROUNDS = 256, 64, 3

_PEER = """
import ctypes, json, sys
import numpy as np, llama_cpp as L
job = json.loads(sys.argv[1])
log = L.llama_log_callback(lambda level, text, data: sys.stderr.buffer.write(text) if level >= 4 else None)
L.llama_log_set(log, ctypes.c_void_p(0))
p = L.llama_model_quantize_default_params()
p.ftype, p.nthread = job["ftype"], job["threads"]
if job["importance"]:
    with np.load(job["importance"]) as file:
        values = {name: np.ascontiguousarray(file[name], np.float32) for name in file.files}
    entries = (L.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, array) in zip(entries, values.items()):
        entry.name, entry.size = name.encode(), array.size
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    p.imatrix = entries
sys.exit(L.llama_model_quantize(job["source"].encode(), job["out"].encode(), ctypes.byref(p)))
"""


class Remembered:
    """A model whose logits are computed once: both measurements read the same windows."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def tokenize(self, text: str) -> list[int]:
        return self.llm.tokenize(text)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self.llm.logits(ids)
        return self._known[key]


@dataclass(frozen=True)
class Quality:
    """Against the original: perplexity with its standard error, KL divergence in nats, share of equal top tokens."""

    perplexity: float
    error: float
    divergence: float
    top1: float


@dataclass
class Row:
    """One file type; None is what was not measured."""

    name: str
    bytes: int = 0
    bits: float = 0.0
    block_bits: float = 0.0
    plain: Quality | None = None
    weighed: Quality | None = None
    seconds: float | None = None
    prompt: float | None = None
    decode: float | None = None
    twin: Quality | None = None
    equal: float | None = None
    notes: list[str] = field(default_factory=list)


class Measurement:
    """What all types share: the original and its logits, the matrix, the text, the folder of files."""

    def __init__(self, a: argparse.Namespace, work: Path) -> None:
        self.a, self.work = a, work
        self.source = work / "original-F32.gguf"
        convert(MODEL, self.source, "f32", quiet=True)
        begin = time.perf_counter()
        text = (MODEL / "calibration.txt").read_text(encoding="utf-8")
        self.matrix = collect(self.source, text, chunks=a.chunks, dataset="calibration.txt", threads=a.threads)
        self.collecting = time.perf_counter() - begin
        self.original = Remembered(LLM.load(self.source, context=WINDOW, threads=a.threads))
        self.text = (MODEL / "evaluation.txt").read_text(encoding="utf-8")
        self.importance = Importance(self.matrix, "calibration.txt")
        self.values = work / "importance.npz"
        np.savez(self.values, **flat(self.matrix))

    def quality(self, llm: LLM) -> Quality:
        """Of a model, on the first windows of the text."""
        model, windows = Remembered(llm), self.a.windows
        far = divergence(self.original, model, self.text, window=WINDOW, limit=WINDOW * windows)
        bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
        value = perplexity(model, self.text, window=WINDOW, windows=windows, bos=bos)
        return Quality(value.value, value.error, far.mean, far.top1)

    def row(self, kind: FileType) -> Row | None:
        """Make the files of a type and measure them; None if it cannot be made."""
        row, made = Row(kind.name), dict[str, Path]()
        for how, importance in (("plain", None), ("weighed", self.importance)):
            out = self.work / f"{kind.name}-{how}.gguf"
            try:
                row.seconds, report = self.quantize(kind, out, importance)
            except PhiquantError as error:
                say(kind, f"{how}: {str(error).partition(';')[0]}")
                continue
            made[how] = out
            describe(row, report)
        if "plain" in made and "weighed" in made and same_bytes(made["plain"], made["weighed"]) == 1:
            made.pop("weighed").unlink()
        for how, path in made.items():
            try:
                with LLM.load(path, context=WINDOW, threads=self.a.threads) as llm:
                    setattr(row, how, self.quality(llm))
                    if path == list(made.values())[-1]:
                        row.prompt, row.decode = speed(llm)
            except PhiquantError as error:
                say(kind, f"is made, but not run: {error}")
        if made and self.a.peer:
            how, path = list(made.items())[-1]
            self.compare(kind, row, path, how)
        for path in made.values():
            path.unlink()
        return row if made else None

    def quantize(self, kind: FileType, out: Path, importance: Importance | None) -> tuple[float, Report]:
        """Seconds, and what was made; a short run is repeated, because its kernels may have been compiled in it."""
        reports = []
        while len(reports) < 2 and sum(report.seconds for report in reports) < 3:
            options = {"importance": importance, "threads": self.a.threads or None}
            reports.append(quantize(self.source, out, kind.name, quiet=True, **options))  # type: ignore[arg-type]
        return min(report.seconds for report in reports), reports[-1]

    def compare(self, kind: FileType, row: Row, ours: Path, how: str) -> None:
        """The same file by llama.cpp."""
        out = self.work / f"{kind.name}-llama.cpp.gguf"
        importance = str(self.values) if how == "weighed" else ""
        job = {"source": str(self.source), "out": str(out), "ftype": int(kind), "importance": importance}
        job |= {"threads": self.a.threads or 2}
        done = subprocess.run([self.a.peer, "-c", _PEER, json.dumps(job)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            say(kind, f"llama.cpp does not make it: {said[0] if said else f'status {done.returncode}'}")
            return
        row.equal = same_bytes(ours, out)
        if row.equal == 1:
            row.twin = row.weighed if how == "weighed" else row.plain
        else:
            try:
                with LLM.load(out, context=WINDOW, threads=self.a.threads) as llm:
                    row.twin = self.quality(llm)
            except PhiquantError as error:
                say(kind, f"made by llama.cpp, is not run: {error}")
        out.unlink()


def flat(matrix: ImportanceMatrix) -> dict[str, NDArray[np.float32]]:
    """As llama.cpp's quantizer takes it."""
    return {name: entry.importance.reshape(-1) for name, entry in matrix.entries.items()}


def describe(row: Row, report: Report) -> None:
    """Size, and bits per weight of the file and of the weights in its blocks."""
    plan = report.plan
    matrices = [t for t in plan.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    row.bytes, row.bits = plan.size, plan.bits_per_weight
    row.block_bits = 8 * sum(t.nbytes for t in matrices) / sum(t.rows * t.shape[-1] for t in matrices)


def same_bytes(a: Path, b: Path) -> float:
    """Share of the bytes of tensors that are equal; 0 if the tensors differ in type."""
    with GGUFFile.open(a) as x, GGUFFile.open(b) as y:
        if {t.name: t.type for t in x.tensors.values()} != {t.name: t.type for t in y.tensors.values()}:
            return 0.0
        equal = sum(int((x.data(name) == y.data(name)).sum()) for name in x.tensors)
        return equal / sum(x.data(name).size for name in x.tensors)


def speed(llm: LLM) -> tuple[float, float]:
    """Tokens per second of a prompt and of what comes after it; medians."""
    rng, found = np.random.default_rng(0), []
    for _ in range(SPEED_ROUNDS + 1):  # the first warms up
        prompt = rng.integers(100, 30000, SPEED_PROMPT).tolist()  # a new one, or the cache would know it
        timings = llm.generate(prompt, max_tokens=SPEED_DECODE, temperature=0).timings
        found.append((timings.prompt_per_second, timings.decode_per_second))
    prompt_speed, decode_speed = (statistics.median(figures) for figures in zip(*found[1:], strict=True))
    return prompt_speed, decode_speed


def say(kind: FileType, what: str) -> None:
    print(f"{kind.name}: {what}", flush=True)


def render(rows: Sequence[Row], m: Measurement, seconds: float, peer: str) -> str:
    """table.md."""
    a, tokens = m.a, WINDOW * m.a.windows
    base = perplexity(m.original, m.text, window=WINDOW, windows=a.windows, bos=bos_of(m.original.llm))
    head = [
        "# Every file type on the bundled model",
        "",
        "Made by `make table` (`benchmarks/format_table.py`); not to be edited.",
        "",
        f"{today()}, commit {commit()}, {processor()}, {m.original.llm.backend} backend, {a.threads or 'all'} threads;",
        f"the whole run {seconds:.0f} s. Quality is measured against F32 on the first {tokens} tokens of",
        f"`models/phi3-tiny/evaluation.txt`, in windows of {WINDOW}; perplexity of F32: {base.value:.2f} ± "
        f"{base.error:.2f}. The importance",
        f"matrix is of {m.matrix.chunk_count} chunks of `calibration.txt`, collected in {m.collecting:.1f} s.",
        "",
        "- bits: per weight, of the file and of the matrices in the blocks. More than half of this model's weights",
        "  are its embedding, which the mixtures keep in larger types.",
        "- KL: mean divergence from F32, nats per token; without and with importance. *same*: importance changes no",
        "  byte; *refused*: not without importance.",
        "- same top: how often the likeliest token is that of F32, of the better file.",
        "- s: seconds to quantize F32, with importance where it matters. prompt, decode: tokens per second, of a",
        f"  prompt of {SPEED_PROMPT} and of {SPEED_DECODE} tokens after it.",
        "",
    ]
    columns = ["type", "bits", "... blocks", "MB", "KL", "KL, importance", "perplexity", "..., importance", "same top"]
    columns += ["s", "prompt", "decode", *(["llama.cpp's KL", "equal bytes"] if peer else [])]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " --: |" * (len(columns) - 1)]
    for row in sorted(rows, key=lambda r: (-r.bits, r.name)):
        best = row.weighed or row.plain
        cells = [row.name, f"{row.bits:.2f}", f"{row.block_bits:.2f}", f"{row.bytes / 1e6:.2f}"]
        cells += [shown(row, "divergence", False), shown(row, "divergence", True)]
        cells += [shown(row, "perplexity", False), shown(row, "perplexity", True)]
        cells += ["" if best is None else f"{best.top1:.1%}", number(row.seconds, "{:.2f}")]
        cells += [number(row.prompt, "{:.0f}"), number(row.decode, "{:.0f}")]
        if peer:
            cells += ["" if row.twin is None else nats(row.twin.divergence), number(row.equal, "{:.2%}")]
        lines.append("| " + " | ".join(cells) + " |")
    tail = ["", "![Size against KL divergence](size-quality.svg)"]
    if peer:
        tail = ["", f"llama.cpp's files: by {peer}, with the same matrix, run on our engine.", *tail]
    return "\n".join([*head, *lines, *tail, ""])


def shown(row: Row, figure: str, weighed: bool) -> str:
    """A figure with or without importance, or why there is none."""
    quality = row.weighed if weighed else row.plain
    if quality is None:
        return "same" if weighed and row.plain else "refused" if not weighed and row.weighed else ""
    value = getattr(quality, figure)
    return nats(value) if figure == "divergence" else f"{value:.2f}"


def nats(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4f}"


def number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def bos_of(llm: LLM) -> int | None:
    return llm.tokenizer.bos_id if llm.tokenizer.add_bos else None


FAMILIES = {"IQ": "#d62728", "TQ": "#8c564b", "K": "#1f77b4", "FP": "#9467bd", "": "#555555"}


def family(name: str) -> str:
    """Of a type: its colour in the plot."""
    if name.startswith(("IQ", "TQ")):
        return name[:2]
    return "K" if "_K" in name else "FP" if "FP4" in name else ""


def plot(rows: Sequence[Row], out: Path) -> bool:
    """Size against divergence; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "phiquant", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for row in rows:
        colour = FAMILIES[family(row.name)]
        points = [(q, full) for q, full in ((row.plain, False), (row.weighed, True)) if q and q.divergence > 1e-9]
        for quality, full in points:
            axes.plot(row.bytes / 1e6, quality.divergence, "o", color=colour, mfc=colour if full else "white", ms=5)
        if points:
            best = points[-1][0]
            place = (row.bytes / 1e6, best.divergence)
            axes.annotate(row.name, place, xytext=(4, -8), textcoords="offset points", fontsize=6, color=colour)
        if len(points) > 1:
            axes.plot([row.bytes / 1e6] * 2, [q.divergence for q, _ in points], "-", color=colour, lw=0.6)
    axes.set_yscale("log")
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL divergence from F32, nats per token")
    axes.set_title("phi3-tiny, 15 M parameters: filled with an importance matrix, hollow without")
    axes.grid(True, which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", default=",".join(kind.name for kind in DEFAULT_TYPES))
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, for quality")
    parser.add_argument("--chunks", type=int, default=None, help="of the calibration; default: all")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", default=None, help="python with llama-cpp-python")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "formats")
    return parser.parse_args()


def main() -> None:
    a, begin, rows = arguments(), time.perf_counter(), []
    kinds = [FileType[name] for name in a.types.split(",")]
    peer = ""
    if a.peer:
        version = [a.peer, "-c", "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"]
        peer = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="phiquant-table-") as folder:
        m = Measurement(a, Path(folder))
        for kind in kinds:
            started = time.perf_counter()
            row = m.row(kind)
            if row is not None:
                rows.append(row)
                say(kind, f"{row.bytes / 1e6:.2f} MB, measured in {time.perf_counter() - started:.1f} s")
        a.out.mkdir(parents=True, exist_ok=True)
        text = render(rows, m, time.perf_counter() - begin, peer)
        (a.out / "table.md").write_text(text, encoding="utf-8")
        m.original.llm.close()
    if not plot(rows, a.out / "size-quality.svg"):
        print("the plot is not drawn: matplotlib is not installed", file=sys.stderr)
    print(f"{a.out / 'table.md'}: {len(rows)} types, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
