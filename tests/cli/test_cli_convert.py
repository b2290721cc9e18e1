"""`phiquant convert` as a user runs it: output, exit status, one sentence for every error, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phiquant.gguf import FileType, GGUFFile

pytestmark = pytest.mark.cpu

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


def phiquant(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phiquant", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_one_line_says_what_was_written(tmp_path: Path) -> None:
    done = phiquant("convert", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("phi3-tiny-BF16.gguf: 30.8 MB, 16.")
    assert "33 BF16 + 17 F32" in done.stdout
    with GGUFFile.open(tmp_path / "phi3-tiny-BF16.gguf") as file:
        assert file.require("general.file_type", int) == FileType.BF16


def test_options(tmp_path: Path) -> None:
    done = phiquant("convert", TINY, "--outfile", "x.gguf", "--outtype", "Q8_0", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.require("general.file_type", int) == FileType.Q8_0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "neither a file, a directory nor a repository id"),
        ([TINY / "config.json"], "takes a checkpoint's directory"),
        ([TINY.parent], "has no config.json"),
        ([TINY, "--outtype", "q4_km"], "did you mean Q4_K_M?"),
        ([TINY, "--outtype", "iq2_xs"], "importance"),
        ([TINY, "--outfile", "no/such/x.gguf"], "no/such/x.gguf cannot be written"),
        ([TINY, "--outfile", TINY / "model.safetensors"], "is also an input"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: list[object], sentence: str) -> None:
    done = phiquant("convert", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted at several moments, the start of Python excepted; whoever comes too late finds the whole file."""
    path = tmp_path / "x.gguf"
    seen = set()
    for wait in (0.0, 0.01, 0.05):
        process = subprocess.Popen(
            [sys.executable, "-m", "phiquant", "convert", str(TINY), "--outfile", str(path), "--outtype", "f32"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert b"Traceback" not in stderr
        assert process.returncode in (0, 130), stderr
        left = [entry.name for entry in tmp_path.iterdir()]
        # The file may have got its name just before the interruption: then it is whole.
        assert left == ["x.gguf"] if process.returncode == 0 else left in ([], ["x.gguf"])
        if left:
            with GGUFFile.open(path) as gguf:
                assert max(t.offset + t.nbytes for t in gguf.tensors.values()) + gguf.data_offset <= gguf.size
        path.unlink(missing_ok=True)
        seen.add(process.returncode)
    assert 130 in seen
