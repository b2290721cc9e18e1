"""The main job on the bundled model: convert, quantize, compare, generate; what `make demo` runs.

    python scripts/demo.py [FOLDER]

Everything goes through the package's public functions. The files stay in FOLDER, by default demo-output/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from phiquant.cli.memory import peak_bytes, sized
from phiquant.cli.notices import Notices
from phiquant.convert import Report, convert, quantize
from phiquant.errors import PhiquantError
from phiquant.eval import divergence
from phiquant.llm import LLM

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "phi3-tiny"
PROMPT = "Once upon a time there was a little girl"


def main(folder: Path) -> None:
    started = time.perf_counter()
    notices = Notices(quiet=False)
    folder.mkdir(parents=True, exist_ok=True)
    half, small = folder / "phi3-tiny-F16.gguf", folder / "phi3-tiny-Q4_K_M.gguf"

    with notices.compiling():
        reports = {"F16": convert(MODEL, half, "f16"), "Q4_K_M": quantize(half, small, "Q4_K_M")}
    text = (MODEL / "page.txt").read_text(encoding="utf-8")
    begin = time.perf_counter()
    with (
        LLM.load(half, context=1024, progress=notices.progress) as base,
        LLM.load(small, context=1024, progress=notices.progress) as llm,
    ):
        notices.clear()
        loading = time.perf_counter() - begin
        begin = time.perf_counter()
        quality = divergence(base, llm, text)
        comparing = time.perf_counter() - begin

        print(f"\n{PROMPT}", end="", flush=True)
        completion = None
        for chunk in llm.generate(PROMPT, max_tokens=120, temperature=0.8, seed=4, stream=True):
            print(chunk.text, end="", flush=True)
            completion = chunk.completion
        print("\n")
    assert completion is not None

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(_files(reports))
    table = Table("measured", "", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    timings = completion.timings
    table.add_row("load both models", f"{loading:.2f} s")
    table.add_row(f"compare them on a page of {quality.tokens} tokens", f"{comparing:.2f} s")
    table.add_row("KL divergence of Q4_K_M from F16, mean", f"{quality.mean:.4f} nats")
    table.add_row("... the likeliest token is the same", f"{quality.top1:.1%}")
    table.add_row(f"prompt, {completion.usage.prompt_tokens} tokens", f"{timings.prompt_per_second:.0f} tokens/s")
    table.add_row(
        f"generation, {completion.usage.completion_tokens} tokens", f"{timings.decode_per_second:.0f} tokens/s"
    )
    peak = peak_bytes()
    if peak is not None:
        table.add_row("peak memory, both models loaded", sized(peak))
    table.add_row("the whole demo", f"{time.perf_counter() - started:.1f} s")
    console.print(table)
    command = Path(sys.executable).parent / "phiquant"
    console.print(f"Go on: {_short(command)} run {_short(small)} -no-cnv -p 'The old man'", soft_wrap=True)


def _short(path: Path) -> Path:
    """As it is typed in the folder where we are."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _files(reports: dict[str, Report]) -> Table:
    source = MODEL / "model.safetensors"
    parameters = sum(t.rows * t.shape[-1] for t in reports["F16"].plan.tensors)
    table = Table("file", "size", "bits per weight", "seconds", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    size = source.stat().st_size
    table.add_row("checkpoint (bfloat16)", sized(size), f"{8 * size / parameters:.2f}", "")
    for name, report in reports.items():
        plan = report.plan
        table.add_row(f"{name} GGUF", sized(plan.size), f"{plan.bits_per_weight:.2f}", f"{report.seconds:.2f}")
    return table


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo-output")
    except PhiquantError as error:
        sys.exit(f"demo: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
