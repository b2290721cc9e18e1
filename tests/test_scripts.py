"""What `make demo` and the benchmarks run, on small models."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.eval.certify import Borders
from phiquant.eval.statistics import Divergence

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_prints_its_table(tmp_path: Path) -> None:
    output = run(ROOT / "scripts" / "demo.py", tmp_path)
    assert "Once upon a time there was a little girl" in output
    for row in ("F16 GGUF", "Q4_K_M GGUF", "KL divergence of Q4_K_M from F16", "tokens/s", "bits per weight"):
        assert row in output
    line = next(line for line in output.splitlines() if "KL divergence" in line)
    assert 0.001 < float(line.split()[-2]) < 0.05, "0.0078 when this was written"


def test_the_synthetic_checkpoint_is_one_that_works(tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "synthetic", tmp_path / "synthetic.gguf"
    small = ["--layers", "2", "--hidden", "256", "--ffn", "512", "--heads", "4", "--kv-heads", "2"]
    assert "0.018 B parameters" in run(ROOT / "benchmarks" / "make_synthetic.py", checkpoint, *small)
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    run("-m", "phiquant", "quantize", checkpoint, file, "Q4_K_M")
    text = run("-m", "phiquant", "run", file, "-no-cnv", "-p", "one", "-n", "4", "--temp", "0", "-c", "64")
    assert text.startswith("one")
    output = run(ROOT / "benchmarks" / "start_time.py", file, "--rounds", "1", "--no-results")
    assert "s to the first token" in output


def test_the_table_of_types_is_measured(tmp_path: Path) -> None:
    few = ["--types", "Q8_0,Q2_K_S", "--windows", "2", "--chunks", "4", "--threads", "2"]
    output = run(ROOT / "benchmarks" / "format_table.py", "--out", tmp_path, *few)
    assert "2 types" in output
    assert "Q2_K_S: plain: blk.0.attn_output.weight would become Q2_K" in output
    table = (tmp_path / "table.md").read_text("utf-8")
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line
    }
    titles, eight, two = (rows[name] for name in ("type", "Q8_0", "Q2_K_S"))
    at = titles.index("KL")
    assert float(eight[at]) < 1e-3
    assert eight[at + 1] == "same"
    assert two[at] == "refused"
    assert 0.01 < float(two[at + 1]) < 1
    assert all(float(row[titles.index("decode")]) > 0 for row in (eight, two))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_server_is_measured_beside_another(tmp_path: Path) -> None:
    model, peer = tmp_path / "tiny.gguf", tmp_path / "llama-server"
    run("-m", "phiquant", "convert", "--quiet", ROOT / "models" / "phi3-tiny", "--outfile", model, "--outtype", "q8_0")
    # A peer that understands llama-server's options, and that clients cannot tell from it: ourselves.
    peer.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "assert '--cont-batching' in sys.argv and sys.argv[sys.argv.index('-c') + 1] == '2560'\n"
        "given = [word for word in sys.argv[1:] if word != '--cont-batching']\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'phiquant', 'serve', *given])\n"
    )
    peer.chmod(0o755)
    few = ["--streams", "2", "--requests", "2", "--rounds", "1", "--no-results"]
    lines = run(ROOT / "benchmarks" / "server_load.py", model, "--against", peer, *few).splitlines()
    (loads,) = (line.strip("| ").split(" | ") for line in lines if line.startswith("| 2 |"))
    assert len(loads) == 16
    assert all(float(cell) > 0 for cell in loads)
    total, generated = float(loads[1]), float(loads[4])
    assert 0 < generated < total
    first, second, gain = (line.strip("| ").split(" | ") for line in lines[-3:])
    assert float(first[1]) / float(second[1]) == pytest.approx(float(gain[1]), rel=0.3)


@pytest.fixture
def parity_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import parity_table

    return parity_table


def test_the_parity_table_looks_on_both_sides_of_every_border(parity_table: Any) -> None:
    assert parity_table.lengths(Borders(2048)) == [200]
    assert parity_table.lengths(Borders(2048, original=128)) == [64, 128, 129, 200]
    assert parity_table.lengths(Borders(2048, window=47)) == [47, 48, 119]
    assert parity_table.contexts(Borders(2048), 200) == [256], "the size of the context tells nothing"
    assert parity_table.contexts(Borders(2048, original=256), 200) == [256, 2048]
    assert parity_table.contexts(Borders(2048, original=128), 100) == [256], "llama.cpp has none that is small enough"


def test_the_parity_table_replaces_only_itself(parity_table: Any) -> None:
    near, far = (Divergence.of(np.full(4, x), np.array([True, True, True, x < 1e-6])) for x in (1e-12, 0.1))
    borders = Borders(2048, original=256)
    rows = [
        parity_table.Row("a", borders, 200, near, {256: near, 2048: far}),
        parity_table.Row("b", Borders(2048), 200, near, "llama.cpp refuses the file: no such architecture"),
    ]
    lines = parity_table.table(rows).splitlines()
    assert lines[2:] == [
        "| `a` | 200, short factors | 1.0e-12 | 1.0e-12 | 100.0 % | 256 | 1.0e-12 | 1.0e-12 | 100.0 % |",
        "|  |  |  |  |  | 2048 | 1.0e-01 | 1.0e-01 | 75.0 % |",
        "| `b` | 200 | 1.0e-12 | 1.0e-12 | 100.0 % | refuses the file |  |  |  |",
    ]
    page = f"before\n{parity_table.BEGIN}\nold\n{parity_table.END}\nafter\n"
    assert parity_table.replaced(page, "new") == f"before\n{parity_table.BEGIN}\n\nnew\n\n{parity_table.END}\nafter\n"
    with pytest.raises(SystemExit, match="no marks"):
        parity_table.replaced("a page", "new")


def test_the_parity_table_takes_no_failure_for_a_refusal(parity_table: Any, tmp_path: Path) -> None:
    python = tmp_path / "python"
    for status, error in ((parity_table.REFUSED, parity_table.Refused), (1, SystemExit), (134, SystemExit)):
        python.write_text(f"#!/bin/sh\ncat > /dev/null\necho 'its last words' >&2\nexit {status}\n")
        python.chmod(0o755)
        with pytest.raises(error, match="its last words"):
            parity_table.peer_logits(python, tmp_path / "model.gguf", [([1, 2], 256)], tmp_path)


def test_results_are_appended_under_one_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    file = tmp_path / "results.csv"
    row = results.Result("2026-01-01", "abc", "a processor, 2 GHz", 2, "what", 1.23456, "tokens/s")
    results.append([row], file)
    results.append([row, row], file)
    with file.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3
    assert rows[0]["figure"] == "1.235"
    assert rows[0]["processor"] == "a processor, 2 GHz"
    assert rows[0]["peer_figure"] == ""
