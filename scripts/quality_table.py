"""Error feedback and mixes beside llama.cpp's files of the same size, on several models: docs/quality.md's tables.

    python scripts/quality_table.py --tools LLAMA_CPP/bin --calibration TEXT --evaluation NAME=TEXT \\
        [--evaluation NAME=TEXT] [--crossed TEXT] [--out FOLDER] CHECKPOINT...

Makes of every checkpoint an F32 file, of that with llama-imatrix and llama-quantize a file of every type, with
`phiquant quantize --calibrate` another one, and with `--budget` one of the same size; measures each beside the F32 file
on every text, by `phiquant perplexity` and by llama-perplexity, and once more with its weights widened to F32. Prints
Markdown as it goes; with --out it writes quality.json and a plot for every model there. What is made once is found
again by --work.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from phiquant.gguf import keys, open_model

TYPES = "Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M,IQ1_M,IQ2_XXS,IQ2_M,IQ3_XXS,Q4_0"
CONTEXT = 512
READ = (4096, 16384, 65536)  # tokens of calibration, to see whether more of them help
MOST = 131072  # tokens of calibration otherwise: all of a text that has not more


@dataclass(frozen=True)
class Row:
    """One file on one text, in nats for each token."""

    model: str
    text: str
    type: str
    maker: str
    bytes: int
    mean: float
    p999: float
    top1: float
    perplexity: float


def run(*command: object) -> str:
    """A program's output; its errors where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def ours(*arguments: object) -> str:
    """Our own command line."""
    return run(sys.executable, "-m", "phiquant", *arguments)


class Bench:
    """The files of one model, made when they are first asked for, and what was measured of them."""

    def __init__(self, checkpoint: Path, work: Path, options: argparse.Namespace) -> None:
        self.name, self.work = checkpoint.name, work
        self.tools, self.calibration = options.tools, options.calibration
        self.windows, self.tokens = options.windows, options.tokens
        self.whole = work / f"{self.name}-F32.gguf"
        if not self.whole.exists():
            ours("convert", "-q", checkpoint, "--outfile", self.whole, "--outtype", "f32")

    def theirs(self, kind: str) -> Path:
        """llama-quantize's file, with an importance matrix of the whole text."""
        matrix, path = self.work / f"{self.name}-imatrix.gguf", self.work / f"{self.name}-{kind}-theirs.gguf"
        if not matrix.exists():
            run(self.tools / "llama-imatrix", "-m", self.whole, "-f", self.calibration, "-o", matrix, "-c", CONTEXT)
        if not path.exists():
            run(self.tools / "llama-quantize", "--imatrix", matrix, self.whole, path, kind)
        return path

    def made(self, kind: str, calibration: Path | None = None, tokens: int | None = None) -> Path:
        """Ours by error feedback."""
        text, tokens = calibration or self.calibration, tokens or self.tokens
        path = self.work / f"{self.name}-{kind}-{text.stem}-{tokens}.gguf"
        if not path.exists():
            read = ("--calibrate", text, "--calibration-tokens", tokens)
            ours("quantize", "-q", "--no-measure", *read, self.whole, path, kind)
        return path

    def mixed(self, kind: str, size: int) -> Path:
        """Ours of at most that size."""
        path = self.work / f"{self.name}-{kind}-mixed.gguf"
        if not path.exists():
            read = ("--calibrate", self.calibration, "--calibration-tokens", self.tokens)
            ours("quantize", "-q", "--no-measure", *read, "--budget", size, self.whole, path)
        return path

    def widened(self, path: Path, maker: str, kind: str, texts: dict[str, Path]) -> list[Row]:
        """As `measured` on every text, the weights in F32: activations that meet them are not rounded to 8 bits."""
        wide = path.with_name(f"{path.stem}-widened.gguf")
        ours("quantize", "-q", "--allow-requantize", path, wide, "F32")
        found = [self.measured(wide, f"{maker}, widened", kind, name, text) for name, text in texts.items()]
        wide.unlink()
        return found

    def measured(self, path: Path, maker: str, kind: str, name: str, text: Path) -> Row:
        """By our engine, beside the F32 file."""
        found = json.loads(
            ours("perplexity", "-q", "-m", path, "-f", text, "--kl-divergence", "--base", self.whole, "-c", CONTEXT,
                 "--chunks", self.windows, "-o", "json")
        )  # fmt: skip
        d = found["divergence"]
        figures = (d["mean"], d["percentiles"]["99.9"], d["top1"], found["perplexity"]["value"])
        return Row(self.name, name, kind, maker, weights(path), *figures)

    def by_llama_cpp(self, path: Path, name: str, text: Path) -> float:
        """The mean divergence as llama-perplexity finds it."""
        logits, common = self.work / f"{self.name}-{name}.kld", ("-c", CONTEXT, "--chunks", self.windows)
        tool = self.tools / "llama-perplexity"
        if not logits.exists():
            run(tool, "-m", self.whole, "-f", text, "--kl-divergence-base", logits, *common)
        said = run(tool, "-m", path, "--kl-divergence-base", logits, "--kl-divergence", *common)
        match = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", said)
        assert match, said[-2000:]
        return float(match[1])


def weights(path: Path) -> int:
    """Bytes of a file's tensors."""
    with open_model(path) as file:
        return sum(tensor.nbytes for tensor in file.tensors.values())


def read_for(path: Path) -> int:
    """Tokens of calibration that a file says it was made with."""
    with open_model(path) as file:
        return file.require(keys.QUANTIZE_TOKENS, int)


def line(*cells: object) -> None:
    """A row of a table, at once."""
    print(
        "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def beside(bench: Bench, types: list[str], texts: dict[str, Path]) -> list[Row]:
    """Every type, theirs and ours, on every text."""
    rows = []
    print(f"\n### {bench.name}: the same types and bytes\n")
    line(
        "type", "bytes", *(f"{text}: {what}" for text in texts for what in ("theirs", "ours", "ratio", "by llama.cpp"))
    )
    line(*["---"] * 2, *["--:"] * 4 * len(texts))
    for kind in types:
        theirs, mine = bench.theirs(kind), bench.made(kind)
        assert weights(theirs) == weights(mine), f"{kind}: {weights(theirs)} and {weights(mine)} bytes"
        cells: list[object] = []
        for name, text in texts.items():
            a = bench.measured(theirs, "llama.cpp", kind, name, text)
            b = bench.measured(mine, "feedback", kind, name, text)
            peer = bench.by_llama_cpp(mine, name, text) / bench.by_llama_cpp(theirs, name, text)
            rows += [a, b]
            cells += [a.mean, b.mean, f"{b.mean / a.mean:.2f}", f"{peer:.2f}"]
        line(kind, f"{weights(mine):,}", *cells)
    return rows


def mixes(bench: Bench, types: list[str], texts: dict[str, Path]) -> list[Row]:
    """Mixes of the size of every type's file."""
    rows = []
    print(f"\n### {bench.name}: mixes of the same size\n")
    line("size of", *(f"{text}: {what}" for text in texts for what in ("type", "mix", "ratio")))
    line("---", *["--:"] * 3 * len(texts))
    for kind in types:
        single = bench.made(kind)
        mix = bench.mixed(kind, bench.theirs(kind).stat().st_size)
        assert mix.stat().st_size <= bench.theirs(kind).stat().st_size
        cells: list[object] = []
        for name, text in texts.items():
            a = bench.measured(single, "feedback", kind, name, text)
            b = bench.measured(mix, "mix", kind, name, text)
            rows.append(b)
            cells += [a.mean, b.mean, f"{b.mean / a.mean:.2f}"]
        line(kind, *cells)
    return rows


def alone(bench: Bench, types: list[str], texts: dict[str, Path]) -> list[Row]:
    """What the weights of all three cost where nothing else is rounded."""
    rows = []
    print(f"\n### {bench.name}: weights alone\n")
    line("type", *(f"{text}: {what}" for text in texts for what in ("theirs", "ours", "ratio", "mix", "ratio")))
    line("---", *["--:"] * 5 * len(texts))
    for kind in types:
        theirs = bench.theirs(kind)
        mix = bench.mixed(kind, theirs.stat().st_size)
        files = {"llama.cpp": theirs, "feedback": bench.made(kind), "mix": mix}
        found = [bench.widened(path, maker, kind, texts) for maker, path in files.items()]
        cells: list[object] = []
        for a, b, c in zip(*found, strict=True):
            rows += [a, b, c]
            cells += [a.mean, b.mean, f"{b.mean / a.mean:.2f}", c.mean, f"{c.mean / a.mean:.2f}"]
        line(kind, *cells)
    return rows


def readings(bench: Bench, texts: dict[str, Path], calibrations: list[Path], kinds: list[str]) -> None:
    """More and other text to calibrate on: as many tokens as files say that were read, each number once."""
    print(f"\n### {bench.name}: what is read for the calibration\n")
    line("type", "calibrated on", "tokens", *texts)
    line("---", "---", "--:", *["--:"] * len(texts))
    for kind in kinds:
        for text in calibrations:
            paths = [bench.made(kind, text, tokens) for tokens in (*READ, bench.tokens)]
            for tokens, path in {read_for(path): path for path in paths}.items():
                values = [bench.measured(path, "feedback", kind, name, on).mean for name, on in texts.items()]
                line(kind, text.stem, f"{tokens:,}", *values)


def kept(path: Path, rows: list[Row]) -> list[Row]:
    """What was measured, with what an earlier run wrote into the file and this one did not measure; all is written."""
    earlier = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    by_file = {(row.model, row.text, row.type, row.maker): row for row in [*earlier, *rows]}
    path.write_text(json.dumps([asdict(row) for row in by_file.values()], indent=1) + "\n")
    return list(by_file.values())


def plot(rows: list[Row], model: str, texts: Collection[str], path: Path) -> None:
    """Size against divergence of one model, on every text."""
    from matplotlib import pyplot

    makers = {"llama.cpp": ("o", "llama-quantize, importance matrix"), "feedback": ("s", "phiquant, the same types"),
              "mix": ("^", "phiquant, mix of the same size")}  # fmt: skip
    figure, panels = pyplot.subplots(1, len(texts), figsize=(11, 4.5), layout="constrained", squeeze=False)
    for axes, text in zip(panels[0], texts, strict=True):
        for maker, (mark, label) in makers.items():
            points = sorted(
                (r.bytes, r.mean, r.type) for r in rows if (r.model, r.text, r.maker) == (model, text, maker)
            )
            if points:
                axes.plot([size / 1e6 for size, *_ in points], [mean for _, mean, _ in points], mark, label=label)
            for size, mean, kind in points if maker == "llama.cpp" else ():
                axes.annotate(kind, (size / 1e6, mean), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set(yscale="log", xlabel="weights, MB", ylabel="mean KL divergence, nats", title=f"{model}, {text}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    p.add_argument("--tools", type=Path, required=True, help="where llama-quantize, -imatrix and -perplexity are")
    p.add_argument("--calibration", type=Path, required=True)
    p.add_argument("--crossed", type=Path, help="another text to calibrate on, of another kind")
    p.add_argument("--evaluation", action="append", required=True, metavar="NAME=TEXT")
    p.add_argument("--types", default=TYPES)
    p.add_argument("--parts", default="beside,mixes,alone,readings")
    p.add_argument("--windows", type=int, default=40, help=f"of {CONTEXT} tokens, of every text")
    p.add_argument("--tokens", type=int, default=MOST, help="that ours reads of the calibration text, at most")
    p.add_argument("--work", type=Path, help="keep what is made in this folder, and use what is there")
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    texts = {name: Path(path) for name, path in (text.split("=", 1) for text in a.evaluation)}
    types, parts, rows = a.types.split(","), a.parts.split(","), list[Row]()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for checkpoint in a.checkpoints:
            bench = Bench(checkpoint, work, a)
            if "beside" in parts:
                rows += beside(bench, types, texts)
            if "mixes" in parts:
                rows += mixes(bench, types, texts)
            if "alone" in parts:
                rows += alone(bench, types, texts)
            if "readings" in parts:
                readings(bench, texts, [a.calibration, *([a.crossed] if a.crossed else [])], ["Q4_K_M", "Q2_K"])
            if a.out is not None:
                a.out.mkdir(parents=True, exist_ok=True)
                rows = kept(a.out / "quality.json", rows)
                plot(rows, bench.name, texts, a.out / f"quality-{bench.name}.png")


if __name__ == "__main__":
    main()
