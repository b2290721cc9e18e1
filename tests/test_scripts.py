"""What `make demo` and the benchmarks run, on small models."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

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
