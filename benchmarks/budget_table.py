"""Mixes made for the sizes of llama.cpp's file types, beside these: divergence on a text that neither has seen.

    python benchmarks/budget_table.py [--text evaluation.txt] [--limit 8192] [--types Q2_K,Q4_K_M]

Both are made with the same importance matrix and the same quantizers, of the bundled model in F32; the mixes' files are
at most as large. Prints a table in Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from phiquant import LLM
from phiquant.calibrate import collect
from phiquant.calibrate.budget import Menu, mix_entries, room_for
from phiquant.calibrate.candidates import reader_types
from phiquant.calibrate.limit import Limit
from phiquant.calibrate.mix import find_mix
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.quantizing import quantized
from phiquant.calibrate.sensitivity import measure
from phiquant.convert import Importance, Options, Plan, Target, convert, parse_file_type, quantize
from phiquant.convert.entries import Entry
from phiquant.convert.plan import plan_quantize
from phiquant.convert.run import execute
from phiquant.convert.source import open_source
from phiquant.eval import divergence

MODEL = Path(__file__).parents[1] / "models" / "phi3-tiny"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=MODEL / "evaluation.txt")
    parser.add_argument("--limit", type=int, default=8192, help="tokens of the text that are compared")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each measurement")
    parser.add_argument("--types", default="Q2_K,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder), arguments.text.read_text("utf-8"), arguments.limit, arguments.tokens, arguments.types)


def table(folder: Path, unseen: str, limit: int, tokens: int, types: str) -> None:
    """The rows, as they are made."""
    origin = MODEL / "calibration.txt"
    text, whole = origin.read_text("utf-8"), folder / "tiny-F32.gguf"
    convert(MODEL, whole, "f32", quiet=True)
    importance = Importance(collect(whole, text), origin.name)
    with open_source(whole) as source, Probe(whole, text, tokens=tokens) as probe, LLM.load(whole, context=512) as base:

        def planned(target: Target, options: Options, entries: Sequence[Entry]) -> Plan:
            path = folder / "mix.gguf"
            return plan_quantize(source, target, path, options, overrides=entries, importance=importance)

        def diverged(path: Path) -> str:
            with LLM.load(path, context=512) as llm:
                found = divergence(base, llm, unseen, limit=limit)
            return f"{found.mean:.5f} ± {found.error:.5f} | {found.top1:.1%}"

        menu = Menu.of(source, planned, Options(), importance, reader_types("llama.cpp"))
        begin = time.perf_counter()
        known = measure(probe, menu.weights, menu.types, quantized)
        print(f"measured in {time.perf_counter() - begin:.0f} s, {probe.tokens} tokens each\n", flush=True)
        print("| size of | bytes | KL | same top | bytes of the mix | predicted | measured | KL | same top |")
        print("| --- | --: | --: | --: | --: | --: | --: | --: | --: |", flush=True)
        for name in types.split(","):
            theirs = folder / f"{name}.gguf"
            quantize(whole, theirs, parse_file_type(name), importance=importance, quiet=True)
            size = Limit.parse(str(theirs.stat().st_size))
            room = room_for(menu, planned, size, origin.name)
            mix = find_mix(probe, menu.weights, menu.types, room, known=known)
            report = execute(menu.plan(planned, mix.types, mix_entries(mix, size, origin.name)))
            ours = report.plan.path
            assert ours.stat().st_size <= theirs.stat().st_size
            left = f"| {name} | {theirs.stat().st_size:,} | {diverged(theirs)} "
            figures = f"{mix.predicted:.5f} | {mix.measured:.5f}"
            print(left + f"| {ours.stat().st_size:,} | {figures} | {diverged(ours)} |", flush=True)


if __name__ == "__main__":
    main()
