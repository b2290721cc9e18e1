"""`phiquant quantize --calibrate TEXT --distill`: what is written, kept, refused and left behind."""

from functools import partial
from pathlib import Path

import pytest

from phiquant.calibrate.distill import Distillation
from phiquant.cli import distilling
from phiquant.cli.app import run
from phiquant.cli.quantize import quantize
from phiquant.cli.quantize_options import QuantizeOptions
from phiquant.cli.reading import ReadingBar
from phiquant.convert import convert
from phiquant.errors import RequestError
from phiquant.gguf import GGUFFile
from phiquant.gguf.quality import standing

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
TEXT = TINY / "calibration.txt"
DISTILL = ["--calibrate", str(TEXT), "--method", "plain", "--distill", "--distill-epochs", "1", "--distill-tokens"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distilling") / "whole.gguf"
    convert(TINY, path, "auto", quiet=True)
    return path


def test_the_file_is_tuned_measured_and_of_the_size_that_was_said(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["quantize", *DISTILL, "4096", str(whole), "out.gguf", "Q2_K"]
    assert run([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert run(command) == 0
    shown = capsys.readouterr()
    assert "distilled: KL divergence on held-out text" in shown.out
    assert "after 1 epoch (" in shown.out
    assert shown.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert f"out.gguf would have {Path('out.gguf').stat().st_size:,} bytes" in said
    assert run(["verify", "out.gguf"]) == 0
    assert "the quality recorded is of these weights" in capsys.readouterr().out
    with GGUFFile.open("out.gguf") as file:
        assert file.require("phiquant.quantize.distilled.tokens", int) == 4096 - 2 * 512
        assert standing(file) == "of this file"
        tuned = file.require("phiquant.quality.kl_mean", float)
    assert run(["quantize", "-q", "--calibrate", str(TEXT), "--method", "plain", str(whole), "plain.gguf", "Q2_K"]) == 0
    with GGUFFile.open("plain.gguf") as file:
        assert tuned < file.require("phiquant.quality.kl_mean", float)


def test_what_does_not_pay_is_said_and_not_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distilling, "Distillation", partial(Distillation, rate=30.0))
    assert run(["quantize", *DISTILL, "2048", str(whole), "out.gguf", "Q2_K", "--no-measure"]) == 0
    assert "so the file stays as it was rounded" in capsys.readouterr().out
    assert run(["quantize", "-q", str(whole), "plain.gguf", "Q2_K"]) == 0
    assert Path("out.gguf").read_bytes() == Path("plain.gguf").read_bytes()


@pytest.mark.parametrize("when", ["distilling", "writing"])
def test_an_interrupted_run_leaves_the_rounded_file(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    if when == "distilling":
        monkeypatch.setattr(ReadingBar, "advanced", interrupted)
    else:
        monkeypatch.setattr(Distillation, "make", interrupted)
    assert run(["quantize", *DISTILL, "2048", str(whole), "out.gguf", "Q2_K", "--no-measure"]) == 130
    assert "out.gguf is whole, as it was rounded; it is not distilled" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", "-q", str(whole), "plain.gguf", "Q2_K"]) == 0
    assert Path("out.gguf").read_bytes() == Path("plain.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "type", "what"),
    [
        ({"calibrate": None}, "Q2_K", "--distill needs a text"),
        ({"prune_layers": "3"}, "Q2_K", "leave one of them out"),
        ({"distill": False, "distill_epochs": 2}, "Q2_K", "ask for one with --distill"),
        ({"distill": False, "distill_tokens": 2048}, "Q2_K", "ask for one with --distill"),
        ({"distill_tokens": 2000}, "Q2_K", "at least 2048: two chunks of 512 to learn from"),
        ({}, "F16", "will have no scales"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], type: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"calibrate": TEXT, "method": "plain", "distill": True, "measure": False, "quiet": True, **options}
    with pytest.raises(RequestError, match=what):
        quantize([str(whole), "out.gguf", type], QuantizeOptions(**given))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
