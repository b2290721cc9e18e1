"""`phiquant quantize --calibrate TEXT`: both steps in one, from a checkpoint and from a GGUF file."""

from pathlib import Path

import numpy as np
import pytest

from phiquant.cli.app import run
from phiquant.cli.quantize import quantize
from phiquant.cli.quantize_options import QuantizeOptions, SearchOptions
from phiquant.convert import convert
from phiquant.convert.imatrix import read
from phiquant.errors import RequestError
from phiquant.gguf import GGUFFile

pytestmark = pytest.mark.slow

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
    whole = ["--method", "imatrix", "--calibrate", str(short), "--no-measure"]
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
@pytest.mark.parametrize("method", ["imatrix", "feedback"])
def test_the_dry_run_is_exact_without_running_the_model(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"calibrate": short, "measure_text": TEXT, "exclude_weights": ["ffn_down"], "method": method}
    quantize([str(TINY), "out.gguf", "Q3_K_M"], QuantizeOptions(**options, dry_run=True))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    quantize([str(TINY), "out.gguf", "Q3_K_M"], QuantizeOptions(**options, quiet=True))  # type: ignore[arg-type]
    assert f"out.gguf would have {(tmp_path / 'out.gguf').stat().st_size:,} bytes" in shown


@pytest.mark.cpu
def test_feedback_is_the_default_from_a_checkpoint_a_file_and_statistics(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(TINY, "whole.gguf", "auto", quiet=True)
    text = ["--calibrate", str(short), "--no-measure"]
    assert run(["quantize", *text, str(TINY), "checkpoint.gguf", "Q3_K_S"]) == 0
    assert run(["quantize", *text, "--method", "feedback", "whole.gguf", "file.gguf", "q3_k_s", "2"]) == 0
    assert "note" not in capsys.readouterr().err
    alone = [*text, "--drawn-share", "0"]  # what an importance matrix of the text is of
    assert run(["quantize", *alone, "--statistics", "s.gguf", str(TINY), "first.gguf", "q3_k_s"]) == 0
    reused = ["--statistics", "s.gguf", "--drawn-share", "0"]
    assert run(["quantize", *reused, "whole.gguf", "second.gguf", "q3_k_s"]) == 0
    assert "so no text is read" in capsys.readouterr().err
    assert run(["quantize", "-q", "whole.gguf", "plain.gguf", "q3_k_s"]) == 0
    assert run(["quantize", "-q", *text, "--method", "plain", "whole.gguf", "plainer.gguf", "q3_k_s"]) == 0
    made = ["checkpoint", "file", "first", "plain", "plainer", "second"]
    found = {name: GGUFFile.open(f"{name}.gguf") for name in made}
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted([*made, "s", "whole"]), (
        "the lossless file is gone"
    )

    def same(one: str, other: str) -> bool:
        return all((found[one].data(name) == found[other].data(name)).all() for name in found[one].tensors)

    assert same("checkpoint", "file")
    assert same("first", "second")
    assert same("plain", "plainer")
    assert not same("file", "first")
    assert not same("file", "plain")
    for name, method in (("file", "feedback"), ("second", "feedback"), ("plain", None)):
        assert found[name].get("phiquant.quantize.method", str, None) == method
    assert "curvature" in found["file"].require("phiquant.quantize.search", str)
    assert found["second"].require("phiquant.quantize.search", str).endswith(" sweeps"), "nothing else was asked of it"
    assert found["file"].require("phiquant.quantize.tokens", int) == found["second"].require(
        "phiquant.quantize.tokens", int
    )
    for file in found.values():
        file.close()

    assert run(["imatrix", "-q", "--in-file", "s.gguf", "-o", "from.gguf"]) == 0
    assert run(["imatrix", "-q", "-m", "whole.gguf", "-f", str(short), "-o", "collected.gguf"]) == 0
    exported, collected = read("from.gguf"), read("collected.gguf")
    assert exported.entries.keys() == collected.entries.keys()
    for name, entry in collected.entries.items():
        np.testing.assert_allclose(exported.entries[name].importance, entry.importance, rtol=1e-3)
    assert run(["quantize", "-q", "--imatrix", "from.gguf", "whole.gguf", "weighed.gguf", "q3_k_s"]) == 0


@pytest.mark.cpu
def test_as_many_tokens_are_read_as_are_asked_for(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"calibrate": short, "calibration_tokens": 1100, "measure": False, "quiet": True}
    quantize([str(TINY), "a.gguf", "Q2_K_S"], QuantizeOptions(**quiet))  # type: ignore[arg-type]
    quantize([str(TINY), "b.gguf", "Q2_K_S"], QuantizeOptions(**quiet, method="imatrix"))  # type: ignore[arg-type]
    with GGUFFile.open("a.gguf") as a, GGUFFile.open("b.gguf") as b:
        assert a.require("phiquant.quantize.tokens", int) == 1024
        assert b.require("quantize.imatrix.chunks_count", int) == 2


@pytest.mark.cpu
def test_how_blocks_are_sought_can_be_said(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--damping", "0.1", "--column-order", "file", "--search-rounds", "1", "--search-sweeps", "0"]
    options += ["--curvature-tokens", "512", "--drawn-share", "0.25"]
    whole = ["quantize", "-q", "--calibrate", str(short), "--no-measure", *options, str(TINY), "out.gguf", "Q2_K_S"]
    assert run(whole) == 0
    said = "damping 0.1, columns as in the file, 1 rounds, 0 sweeps, curvature of 512 tokens, 0.25 drawn"
    with GGUFFile.open("out.gguf") as file:
        assert file.require("phiquant.quantize.search", str) == said


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"imatrix": Path("imatrix.gguf")}, "choose one of them"),
        (
            {"include_weights": ["no_such"], "dry_run": True, "method": "imatrix"},
            "no entry of .*calibration.txt has this",
        ),
        ({"exclude_weights": ["blk"], "dry_run": True, "method": "imatrix"}, "leaves no entry of .*calibration.txt"),
        ({"include_weights": ["no_such"], "dry_run": True}, "no weight has this in its name"),
        ({"exclude_weights": ["weight"], "dry_run": True}, "no weight of this file would be rounded"),
        ({"include_weights": ["blk"], "exclude_weights": ["attn"]}, "cannot be used together"),
        ({"method": "gptq"}, "--method is feedback, imatrix or plain, not 'gptq'"),
        ({"method": "feedback", "calibrate": None}, "needs a text that the model reads"),
        ({"method": "imatrix", "calibrate": None}, "needs --imatrix FILE, or --calibrate"),
        ({"method": "imatrix", "statistics": Path("s.gguf")}, "--statistics is for --method feedback"),
        ({"method": "plain", "include_weights": ["attn"]}, "chooses entries of an importance matrix"),
        ({"statistics": Path("s.gguf"), "calibrate": None}, "no file s.gguf yet; give the text"),
        ({"calibration_tokens": 1000}, "at least 1024, two chunks"),
        ({"calibration_tokens": 2000, "calibrate": None}, "counts tokens of a text"),
        ({"method": "plain", "calibrate": None, "imatrix": Path("imatrix.gguf")}, "uses no importance matrix"),
        ({"calibrate": TINY / "model.safetensors"}, "not text in UTF-8"),
        ({"calibrate": TINY / "page.txt"}, "at least 2048: two chunks of 512 to calibrate on"),
        ({"calibrate": TINY / "page.txt", "measure": False}, "at least 1024"),
        ({"calibrate": TEXT, "measure_text": TINY / "page.txt"}, "page.txt has 789 tokens and must have at least 1024"),
        ({"measure": False, "measure_text": TEXT}, "contradict"),
        (
            {"search": SearchOptions(damping=0.1), "method": "imatrix"},
            "--damping is for --method feedback, not imatrix",
        ),
        ({"search": SearchOptions(drawn_share=0.1), "calibrate": None}, "--drawn-share is for --method feedback"),
        ({"search": SearchOptions(column_order="size")}, "--column-order is activation or file, not 'size'"),
        (
            {"statistics": Path("s.gguf"), "search": SearchOptions(curvature_tokens=512)},
            "--curvature-tokens reads a text, and --statistics rounds without one",
        ),
        ({"search": SearchOptions(damping=-1.0)}, "a damping of -1 was asked for"),
        ({"search": SearchOptions(drawn_share=0.6), "dry_run": True}, "0.6 of the text was to be drawn"),
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
