"""Prompt and decoding speeds of some file types beside llama-bench, in turns, and beside the machine's limits.

    python benchmarks/compare_speed.py F16.gguf --against LLAMA_BENCH [--types Q4_K_M,Q8_0] [--prompts 256,512]
        [--generated 64] [--depths 0] [--rounds 5] [--threads 2] [--lowering avx2] [--bf16-dot]

F16.gguf is a conversion of what make_synthetic.py writes; the other types are quantized from it, and kept beside it.
With --lowering the kernels are for a lesser processor; LLAMA_BENCH should be a build for the same one. Every row goes
to benchmarks/results.csv, and a table in Markdown to the terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import Result, append, commit, processor, today

TYPES = "Q4_K_M,Q8_0,Q4_0,Q6_K,Q5_K_M,IQ4_XS,F16"


def of_type(model: Path, name: str) -> Path:
    """The model in a type, quantized if that has not been done yet."""
    if name == "F16":
        return model
    out = model.with_name(f"{model.stem.removesuffix('-F16')}-{name}.gguf")
    if not out.exists():
        command = [sys.executable, "-m", "phiquant", "quantize", "--quiet", str(model), str(out), name]
        subprocess.run(command, check=True)
    return out


def measure(a: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """What `phiquant bench` says of a model."""
    command = [sys.executable, "-m", "phiquant", "bench", "--quiet", "-m", str(path)]
    command += ["-p", a.prompts, "-n", a.generated]
    command += ["-d", a.depths, "-r", str(a.rounds), "-t", str(a.threads), "-o", "json"]
    command += ["--against", f"llama-bench={a.against}", *(["--bf16-dot"] if a.bf16_dot else [])]
    environment = os.environ | ({"PHIQUANT_LOWERING": a.lowering} if a.lowering else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def share(name: str, row: dict[str, Any]) -> str:
    """How much of the machine's limit a speed is, where the limit is that of the weights."""
    if row["n_depth"]:
        return ""
    if row["n_gen"]:
        each, limits, what = row["model_size"], row["read_bytes_samples"], "bandwidth"
    elif name in ("F16", "BF16"):
        return ""
    else:
        each, limits, what = 2 * row["model_n_params"], row["dot_products_samples"], "dot products"
    # Turn by turn: a machine's memory may change its speed between them.
    shares = [each * speed / limit for speed, limit in zip(row["samples_ts"], limits, strict=True)]
    return f"{statistics.median(shares):.0%} of the {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--prompts", default="256,512")
    parser.add_argument("--generated", default="64")
    parser.add_argument("--depths", default="0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lowering", default="")
    parser.add_argument("--bf16-dot", action="store_true", help="BF16 weights by dot products of that type")
    parser.add_argument("--build", default="native build", help="what to call the peer's build in results.csv")
    parser.add_argument("--no-results", action="store_true")
    a = parser.parse_args()
    print("| type | test | phiquant | llama.cpp | ratio | of the limit |", flush=True)
    print("| --- | --- | --: | --: | --: | --: |", flush=True)
    for name in a.types.split(","):
        path = of_type(a.model, name)
        for row in measure(a, path):
            speed, peer, ratio = row["avg_ts"], row["peer_avg_ts"], row["ratio"]
            test = row["test"] + (f" with {a.lowering}" if a.lowering else "")
            test += " with dot products of BF16" if a.bf16_dot else ""
            print(f"| {name} | {test} | {speed:.1f} | {peer:.1f} | {ratio:.2f} | {share(name, row)} |", flush=True)
            what = f"{a.model.stem.removesuffix('-F16')}: {test}, {name}"
            shared = today(), commit(), processor(), a.threads
            if not a.no_results:
                append([Result(*shared, what, speed, "tokens/s", "llama-bench", a.build, peer, ratio)])


if __name__ == "__main__":
    main()
