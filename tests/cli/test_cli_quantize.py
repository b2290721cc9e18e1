"""`phiquant quantize IN [OUT] TYPE [NTHREADS]`: arguments as llama-quantize reads them, the dry run, errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from phiquant.cli.quantize import quantize
from phiquant.cli.quantize_options import Arguments, QuantizeOptions, parse_arguments
from phiquant.convert.filetypes import parse_file_type
from phiquant.errors import RequestError, TypeNameError
from phiquant.gguf import GGUFFile

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.mark.parametrize(
    ("arguments", "outfile", "kind", "threads"),
    [
        (["in", "q4_k_m"], None, "Q4_K_M", 0),
        (["in", "15"], None, "Q4_K_M", 0),
        (["in", "Q8_0", "3"], None, "Q8_0", 3),
        (["in", "out.gguf", "COPY"], "out.gguf", "COPY", 0),
        (["in", "out.gguf", "7", "2"], "out.gguf", "Q8_0", 2),
        (["in", "7", "2"], None, "Q8_0", 2),
    ],
)
def test_arguments(arguments: list[str], outfile: str | None, kind: str, threads: int) -> None:
    expected = Arguments("in", Path(outfile) if outfile else None, parse_file_type(kind), threads)
    assert parse_arguments(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "what"),
    [
        (["in"], RequestError, "takes IN"),
        (["in", "out", "Q8_0", "1", "2"], RequestError, "takes IN"),
        (["in", "Q4_KM"], TypeNameError, "did you mean Q4_K_M"),
        (["in", "out.gguf", "Q4_KM"], TypeNameError, "did you mean Q4_K_M"),
        (["in", "IQ2_X"], TypeNameError, "did you mean IQ2_XS"),
        (["in", "out", "Q8_0", "two"], RequestError, "'two' is not a number of threads"),
        (["in", "Q8_0", "-1"], RequestError, "'-1' is not a number of threads"),
        (["in", "Q8_0", "1", "1"], RequestError, "not a number of threads"),
    ],
)
def test_wrong_arguments(arguments: list[str], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        parse_arguments(arguments)


@pytest.mark.cpu
def test_the_dry_run_is_exact_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {
        "tensor_type": [r"blk\.0\.=q8_0"],
        "output_tensor_type": "q5_k",
        "override_kv": ["phi3.context_length=int:9"],
    }
    quantize([str(TINY), "q4_k_m"], QuantizeOptions(**options, dry_run=True))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    size = re.search(r"phi3-tiny-Q4_K_M\.gguf would have ([\d,]+) bytes", shown)
    assert size
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert lines["blk.0.attn_qkv.weight"][-2:] == ["Q8_0", "208,896"]
    assert lines["token_embd.weight"][-2] == "Q5_K"
    assert lines["blk.1.ffn_norm.weight"][-3:] == ["BF16", "F32", "1,024"]
    quantize([str(TINY), "q4_k_m"], QuantizeOptions(**options))  # type: ignore[arg-type]
    assert (tmp_path / "phi3-tiny-Q4_K_M.gguf").stat().st_size == int(size[1].replace(",", ""))
    with GGUFFile.open(tmp_path / "phi3-tiny-Q4_K_M.gguf") as file:
        assert file.require("phi3.context_length", int) == 9
        assert file.tensors["blk.0.ffn_down.weight"].type.name == "Q8_0"


@pytest.mark.cpu
def test_every_option_reaches_the_command_line(tmp_path: Path) -> None:
    arguments = [
        "--pure",
        "--token-embedding-type",
        "q6_k",
        "--tensor-type",
        "blk.1.=f16",
        "--tensor-type",
        "ffn_up=q8_0",
    ]
    arguments += ["--leave-output-tensor", "--allow-requantize", "--override-kv", "a.b=str:c", "--keep-nan"]
    command = [sys.executable, "-m", "phiquant", "quantize", *arguments, str(TINY), "x.gguf", "Q4_K_M", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        types = {name: info.type.name for name, info in file.tensors.items()}
        assert file.require("a.b", str) == "c"
    assert types["token_embd.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == "F16"
    assert types["blk.2.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_qkv.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tensor-type", "x", str(TINY), "Q8_0"], "is not PATTERN=TYPE"),
        (["--tensor-type", "(=q8_0", str(TINY), "Q8_0"], "not a regular expression"),
        (["--override-kv", "x=y", str(TINY), "Q8_0"], "is not KEY=TYPE:VALUE"),
        (["--output-tensor-type", "Q4_K_M", str(TINY), "Q8_0"], "did you mean Q4_K?"),
        ([str(TINY)], "takes IN [OUT] TYPE [NTHREADS]"),
        (["nothing.gguf", "Q8_0"], "neither a file"),
        ([str(TINY), "Q8_0", "513"], "513 threads"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    command = [sys.executable, "-m", "phiquant", "quantize", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
