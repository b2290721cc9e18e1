"""`phiquant quantize --calibrate TEXT`: both steps in one, from a checkpoint and from a GGUF file."""

from pathlib import Path

import pytest

from phiquant.cli.app import run
from phiquant.cli.quantize import QuantizeOptions, quantize
from phiquant.convert import convert
from phiquant.errors import RequestError
from phiquant.gguf import GGUFFile

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
TEXT = TINY / "calibration.txt"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.txt"
    path.write_text(TEXT.read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.mark.cpu
def test_both_steps_in_one_are_the_two_steps(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(TINY, "whole.gguf", "auto", quiet=True)
    whole = ["--calibrate", str(short), "--no-measure"]
    assert run(["quantize", *whole, str(TINY), "checkpoint.gguf", "Q2_K_S"]) == 0
    assert run(["quantize", *whole, "whole.gguf", "file.gguf", "q2_k_s", "1"]) == 0
    assert run(["imatrix", "-m", "whole.gguf", "-f", str(short), "--no-ppl", "-q"]) == 0
    assert run(["quantize", "-q", "--imatrix", "imatrix.gguf", "whole.gguf", "two.gguf", "Q2_K_S"]) == 0
    assert "note" not in capsys.readouterr().err
    names = ["checkpoint.gguf", "file.gguf", "imatrix.gguf", "two.gguf", "whole.gguf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "the lossless file is gone"
    with GGUFFile.open("two.gguf") as two:
        for name in ("checkpoint.gguf", "file.gguf"):
            with GGUFFile.open(name) as one:
                assert all((one.data(tensor) == two.data(tensor)).all() for tensor in two.tensors)
                assert one.require("quantize.imatrix.file", str) == str(short)[:127]
                assert one.require("quantize.imatrix.entries_count", int) == 32


@pytest.mark.cpu
def test_the_dry_run_is_exact_without_running_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"calibrate": TEXT, "measure_text": TINY / "evaluation.txt", "exclude_weights": ["ffn_down"]}
    quantize([str(TINY), "out.gguf", "Q3_K_M"], QuantizeOptions(**options, dry_run=True))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    quantize([str(TINY), "out.gguf", "Q3_K_M"], QuantizeOptions(**options, quiet=True))  # type: ignore[arg-type]
    assert f"out.gguf would have {(tmp_path / 'out.gguf').stat().st_size:,} bytes" in shown


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"imatrix": Path("imatrix.gguf")}, "choose one of them"),
        ({"include_weights": ["no_such"], "dry_run": True}, "no entry of .*calibration.txt has this"),
        ({"exclude_weights": ["blk"], "dry_run": True}, "leaves no entry of .*calibration.txt"),
        ({"calibrate": TINY / "model.safetensors"}, "not text in UTF-8"),
        ({"calibrate": TINY / "page.txt"}, "at least 2048: two chunks of 512 to calibrate on"),
        ({"calibrate": TINY / "page.txt", "measure": False}, "at least 1024"),
        ({"calibrate": TEXT, "measure_text": TINY / "page.txt"}, "page.txt has 789 tokens and must have at least 1024"),
        ({"measure": False, "measure_text": TEXT}, "contradict"),
    ],
)
@pytest.mark.cpu
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=what):
        quantize([str(TINY), "Q2_K_S"], QuantizeOptions(**{"calibrate": TEXT, **options}))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
