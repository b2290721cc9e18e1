"""`split`, `merge` and `verify` as they are typed; sizes as they are written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phiquant.cli.sizes import parse_size
from phiquant.errors import RequestError

pytestmark = pytest.mark.cpu

MODEL = Path(__file__).resolve().parents[2] / "models" / "phi3-tiny"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phiquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "q.gguf"
    assert run("convert", MODEL, "-o", path, "--outtype", "q8_0").returncode == 0
    return path


def test_split_verify_merge(model: Path, tmp_path: Path) -> None:
    planned = run("split", model, tmp_path / "p", "--split-max-size", "5M", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []
    done = run("split", model, tmp_path / "p", "--split-max-size", "5M")
    assert done.returncode == 0, done.stderr
    assert done.stdout == planned.stdout
    parts = sorted(tmp_path.iterdir())
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [str(part) for part in parts]
    assert [f"{part.stat().st_size:,} bytes" for part in parts] == [
        line.split(", ", 1)[1] for line in done.stdout.splitlines()
    ]
    sound = run("verify", parts[0])
    assert sound.returncode == 0
    assert f"50 tensors in {len(parts)} parts" in sound.stdout
    assert "are sound; the checksum matches" in sound.stdout
    merged = run("merge", parts[0], tmp_path / "m.gguf")
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "m.gguf").read_bytes() == model.read_bytes()
    again = run("merge", parts[0], tmp_path / "m.gguf")
    assert (again.returncode, again.stdout) == (1, "")
    assert "exists already" in again.stderr


def test_a_damaged_file_has_status_1_and_is_explained(model: Path, tmp_path: Path) -> None:
    content = bytearray(model.read_bytes())
    content[-1000] ^= 1
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    done = run("verify", path)
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert done.stderr == f"phiquant: error: {done.stdout}"
    assert "is not what its checksum was made of" in done.stderr
    document = json.loads(run("verify", path, "--json").stdout)
    assert document["sound"] is False
    assert document["checksum"] == "differs"
    assert document["findings"][0]["tensor"] in done.stdout
    good = json.loads(run("verify", model, "--json").stdout)
    assert (good["sound"], good["findings"], good["checksum"]) == (True, [], "matches")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["split", "IN", "x", "--split-max-size", "5X"], "--split-max-size takes a size such as 500M or 1.5G"),
        (["split", "IN", "x", "--split-max-size", "5M", "--split-max-tensors", "3"], "cannot be used together"),
        (["split", "IN", "x", "--split-max-tensors", "0"], "--split-max-tensors is 0 and must be above 0"),
        (["merge", "IN", "x.gguf"], "nothing to merge"),
        (["quantize", "IN", "x.gguf", "Q8_0", "--keep-split"], "--keep-split: "),
        (["quantize", "IN", "x.gguf", "Q8_0", "--max-memory", "1M"], "--max-memory of 1 MB is too little"),
        (["convert", str(MODEL), "--max-memory", "lots"], "--max-memory takes a size"),
        (["verify", "none.gguf"], "none.gguf cannot be opened"),
    ],
)
def test_what_cannot_be_is_one_sentence(model: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    arguments = [str(model) if a == "IN" else str(tmp_path / a) if a in ("x", "x.gguf") else a for a in arguments]
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("phiquant: error: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500M", 500_000_000), ("1.5G", 1_500_000_000), ("2g", 2 * 10**9), ("7", 7), ("3K", 3000), ("1 T", None)]
    + [(bad, None) for bad in ("", "M", "-5M", "5MM", "0", "0.0001K", "1e9", "nan", "5 M", "9" * 30, "٥M")],
)
def test_sizes(text: str, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(RequestError, match="--option takes a size"):
            parse_size("--option", text)
    else:
        assert parse_size("--option", text) == expected
