"""`phiquant bench` on the bundled model, and what it refuses."""

import json
from pathlib import Path

import pytest

from phiquant.cli import app
from phiquant.convert import convert
from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.target import host

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


@pytest.mark.cpu
def test_it_measures(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", str(path), "-p", "16,0", "-n", "4", "-d", "0,20", "-t", "1,2", "-r", "2", "-o", "json"]
    assert app.run(["bench", *arguments, "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["n_threads"], row["test"]) for row in found] == [
        (threads, test) for threads in (1, 2) for test in ("pp16", "tg4", "pp16 @ d20", "tg4 @ d20")
    ]
    for row in found:
        assert len(row["samples_ts"]) == 2
        assert row["avg_ts"] > 0
        assert row["dot_products_per_second"] > 1e9
        assert row["read_bytes_per_second"] > 1e8
        assert row["bf16_dot"] is False


@pytest.mark.cpu
@pytest.mark.skipif(not host().has_bfloat_dot, reason="the processor lacks AVX512_BF16")
def test_it_measures_dot_products_of_bf16(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = path.with_name("bf16.gguf")
    convert(TINY, bf16, "bf16", quiet=True)
    arguments = ["-m", str(bf16), "-p", "16", "-n", "0", "-r", "1", "-o", "json", "--no-limits", "--bf16-dot"]
    assert app.run(["bench", *arguments, "--quiet"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["test"], row["bf16_dot"]) == ("pp16", True)
    assert "matmul.BF16.dot." in " ".join(library._loaded)


@pytest.mark.parametrize(
    ("arguments", "complaint", "status"),
    [
        ([], "no model is named", 2),
        (["-m", "x", "-p", "many"], "--n-prompt takes numbers", 2),
        (["-m", "x", "-b", "0"], "--batch-size takes numbers of at least 1", 2),
        (["-m", "x", "-pg", "5"], "-pg takes two numbers", 2),
        (["-m", "x", "-o", "xml"], "--output takes md, json, jsonl, csv", 2),
        (["-m", "x", "-p", "0", "-n", "0"], "nothing to measure", 1),
        (["-m", "x", "--against", "ollama=y"], "--against takes llama-bench=PATH", 1),
        (["-m", "x", "--against", "llama-bench=/nowhere"], "/nowhere is not a program", 1),
        (["-m", "/nowhere.gguf"], "/nowhere.gguf", 1),
        (["-m", "x", "--kv-type", "q9"], "cache_type", 1),
    ],
)
def test_what_is_refused(arguments: list[str], complaint: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["bench", *arguments]) == status
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
