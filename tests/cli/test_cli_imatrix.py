"""`phiquant imatrix`: collecting, combining and showing, and what it refuses."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phiquant.calibrate import collect
from phiquant.cli.app import run
from phiquant.cli.failures import WrongUsage
from phiquant.cli.imatrix import ImatrixOptions, imatrix
from phiquant.convert import convert
from phiquant.convert.imatrix import ImportanceMatrix, Statistic, read
from phiquant.errors import ImportanceError, OutputError, RequestError

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
PAGE = TINY / "page.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("imatrix") / "tiny-F16.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


@pytest.fixture
def options(model: Path, tmp_path: Path) -> ImatrixOptions:
    return ImatrixOptions(model, PAGE, tmp_path / "imatrix.gguf", ctx_size=64, threads=2)


def write(path: Path, columns: int = 256, blocks: int = 8, tokens: int = 64) -> Path:
    """A matrix of some model."""
    entries = {
        f"blk.{block}.attn_qkv.weight": Statistic(np.full((1, columns), tokens, np.float32), np.array([tokens]))
        for block in range(blocks)
    }
    ImportanceMatrix(entries, tokens // 64, 64, ("earlier",)).write_gguf(path)
    return path


@pytest.mark.cpu
def test_it_collects_what_the_library_collects(
    options: ImatrixOptions, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imatrix(options) == 0
    made, expected = read(options.output), collect(model, PAGE.read_text("utf-8").rstrip("\n"), context=64)
    assert (made.chunk_count, made.chunk_size, tuple(made.datasets)) == (12, 64, (str(PAGE),))
    assert all(np.array_equal(made.entries[n].sums, entry.sums) for n, entry in expected.entries.items())
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{options.output}: 32 weights, 12 chunks of 64 tokens, perplexity ")
    assert "note" not in shown.err
    imatrix(dataclasses.replace(options, ppl=False, quiet=True))
    assert capsys.readouterr() == ("", "")


@pytest.mark.cpu
def test_chunks_are_chosen_saved_and_kept(options: ImatrixOptions, capsys: pytest.CaptureFixture[str]) -> None:
    imatrix(dataclasses.replace(options, chunk=2, chunks=5, output_frequency=2, save_frequency=2, ppl=False))
    folder = options.output.parent
    names = {"imatrix.gguf": 5, "imatrix.gguf.at_2": 2, "imatrix.gguf.at_4": 4}
    assert {path.name: read(path).chunk_count for path in folder.iterdir()} == names
    assert {int(e.counts[0]) for e in read(options.output).entries.values()} == {5 * 64}


@pytest.mark.cpu
def test_earlier_matrices_are_added(options: ImatrixOptions, tmp_path: Path) -> None:
    earlier = write(tmp_path / "earlier.gguf")
    imatrix(dataclasses.replace(options, chunks=2, in_file=[earlier], quiet=True))
    made = read(options.output)
    assert made.entries["blk.3.attn_qkv.weight"].counts.tolist() == [3 * 64]
    assert made.entries["blk.3.ffn_down.weight"].counts.tolist() == [2 * 64]
    assert made.entries["blk.3.attn_qkv.weight"].sums.min() > 64
    assert tuple(made.datasets) == ("earlier", str(PAGE))
    assert made.chunk_count == 3
    with pytest.raises(ImportanceError, match=r"another model than .*tiny-F16\.gguf: .* blk\.0\.attn_qkv\.weight"):
        imatrix(dataclasses.replace(options, in_file=[write(tmp_path / "wide.gguf", columns=512)]))
    with pytest.raises(ImportanceError, match=r"tensor that does not fit is blk\.2\."):
        imatrix(dataclasses.replace(options, in_file=[write(tmp_path / "short.gguf", blocks=2)]))


def test_combining_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf", tokens=128)
    out = tmp_path / "whole.dat"
    imatrix(ImatrixOptions(in_file=[a, b], output=out, output_format="dat"))
    assert capsys.readouterr() == (f"{out}: 8 weights, 3 chunks of 64 tokens\n", "")
    assert out.read_bytes()[:4] == b"\x08\0\0\0"
    back = tmp_path / "back.gguf"
    imatrix(ImatrixOptions(in_file=[out], output=back))
    np.testing.assert_allclose(read(back).entries["blk.0.attn_qkv.weight"].importance, 1)
    imatrix(ImatrixOptions(in_file=[a], output=tmp_path / "other.name"))
    assert "will be a GGUF file" in capsys.readouterr().err
    with pytest.raises(ImportanceError, match=r"b\.gguf|wide\.gguf"):
        imatrix(ImatrixOptions(in_file=[a, write(tmp_path / "wide.gguf", columns=300)], output=out))


def test_statistics_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imatrix(ImatrixOptions(in_file=[write(tmp_path / "a.gguf")], show_statistics=True))
    shown = capsys.readouterr().out
    rows = {tuple(line.split()[:2]): line.split() for line in shown.splitlines() if "attn_qkv" in line}
    assert set(rows) == {(str(block), "attn_qkv") for block in range(8)}
    assert rows["0", "attn_qkv"][2:] == [
        *("256.00", "1.0000", "1.0000", "1.0000", "0.0000", "100.00%", "256", "8.0000", "100.00%", "0.00%", "-")
    ]
    assert rows["7", "attn_qkv"][-1] == "1.0000"
    assert "8 weights, 1 chunks of 64 tokens; weights that no token reached: 0" in shown
    assert not (tmp_path / "imatrix.gguf").exists()


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"file": None}, WrongUsage, "give a text with -f"),
        ({"model": None}, WrongUsage, "the model that reads the text"),
        ({"output_format": "json"}, WrongUsage, "gguf or dat, not 'json'"),
        ({"show_statistics": True}, WrongUsage, "takes one matrix"),
        ({"output": Path("/no/such/folder/i.gguf")}, OutputError, "no such folder"),
        ({"output": Path("/")}, OutputError, "or it is one"),
        ({"output": PAGE}, OutputError, "would be replaced"),
        ({"in_file": [PAGE]}, ImportanceError, "not a usable importance matrix"),
        ({"in_file": [Path("absent.gguf")]}, ImportanceError, "cannot be read"),
        ({"ctx_size": 512}, RequestError, "789 tokens and must have at least 1024"),
        ({"file": TINY / "model.safetensors"}, RequestError, "not text in UTF-8"),
    ],
)
@pytest.mark.cpu
def test_what_is_refused(options: ImatrixOptions, change: dict[str, object], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        imatrix(dataclasses.replace(options, **change))  # type: ignore[arg-type]
    assert list(options.output.parent.iterdir()) == []


@pytest.mark.cpu
def test_options_reach_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["imatrix", "-m", str(model), "-f", str(PAGE), "-c", "64", "--from-chunk", "1", "--chunks", "3"]
    more = ["--no-ppl", "-ofreq", "1", "--save_frequency", "3", "--process-output", "--parse-special", "-t", "1"]
    assert run([*arguments, *more]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imatrix.gguf", "imatrix.gguf.at_3"]
    assert "no output.weight" in capsys.readouterr().err
    assert run(["imatrix", "--in-file", "imatrix.gguf", "-o", "i.dat", "--output-format", "dat", "-q"]) == 0
    assert read(tmp_path / "i.dat").chunk_count == 3
    assert run(["imatrix", "--in-file", "i.dat", "--show-statistics"]) == 0
    assert run(["imatrix"]) == 2


@pytest.mark.cpu
def test_ctrl_c_leaves_the_last_save_and_nothing_else(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "i.gguf"
    text.write_text(PAGE.read_text("utf-8") * 200, "utf-8")
    command = [sys.executable, "-m", "phiquant", "imatrix", "-m", str(model), "-f", str(text), "-o", str(out)]
    process = subprocess.Popen([*command, "-ofreq", "3"], stderr=subprocess.PIPE, text=True, env=os.environ.copy())
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = read(out).chunk_count
    assert kept % 3 == 0
    assert f"interrupted; {out} holds the first {kept} chunks" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.gguf", "text.txt"]
