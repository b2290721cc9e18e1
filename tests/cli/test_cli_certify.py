"""`phiquant certify`: with our own engine in the place of transformers, so that nothing need be installed."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from phiquant.cli.app import run
from phiquant.cli.certify import CertifyOptions, certify_checkpoint
from phiquant.cli.failures import WrongUsage
from phiquant.convert import convert, quantize
from phiquant.errors import CheckpointError, OutputError, RequestError

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certify") / "tiny-F32.gguf"
    convert(TINY, made, "f32", quiet=True)
    return made


@pytest.fixture(scope="module")
def python(model: Path) -> Path:
    """A Python whose transformers is phiquant on the F32 file."""
    made = model.with_name("python")
    made.write_text(
        f"#!{sys.executable}\n"
        + textwrap.dedent(f"""
        import json, sys
        from phiquant import LLM
        job = json.load(sys.stdin)
        head = {{"vocabulary": 32064, "torch": "none", "transformers": "ours", "class": "Phi3ForCausalLM"}}
        print(json.dumps(head), flush=True)
        with LLM.load({str(model)!r}, cache_type="f32") as llm:
            for ids in job["sequences"]:
                sys.stdout.buffer.write(llm.logits(ids).tobytes())
        """)
    )
    made.chmod(0o755)
    return made


@pytest.fixture
def options(model: Path, python: Path) -> CertifyOptions:
    return CertifyOptions(TINY, model, ctx_size=300, python=python, as_json=True)


def test_the_same_weights_do_not_diverge(options: CertifyOptions, capsys: pytest.CaptureFixture[str]) -> None:
    for gguf in (options.gguf, None):  # given, and converted
        assert certify_checkpoint(dataclasses.replace(options, gguf=gguf, fail_above=0)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["divergence"]["maximum"] == 0
        assert found["divergence"]["top1"] == 1
        assert found["divergence"]["tokens"] == 300
        assert [r["stop"] for r in found["parts"][0]["ranges"]] == [256, 300]
        assert found["about"]["transformers"] == "ours (Phi3ForCausalLM)"


def test_what_quantization_costs_is_shown_and_may_be_refused(
    options: CertifyOptions, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.gguf"
    quantize(model, small, "Q4_K_M", quiet=True)
    reports = [tmp_path / "report.md", tmp_path / "report.json"]
    changed = dataclasses.replace(options, gguf=small, as_json=False, report=reports, fail_above=1e-6)
    assert certify_checkpoint(changed) == 1
    shown = capsys.readouterr()
    assert "is above 1.0e-06" in shown.err
    assert "256 to 299" in shown.out
    found = json.loads(reports[1].read_text("utf-8"))
    assert 1e-4 < found["divergence"]["mean"] < 0.1
    assert found["about"]["file"] == "small.gguf"
    assert f"{found['divergence']['mean']:.1e}" in reports[0].read_text("utf-8")
    assert certify_checkpoint(dataclasses.replace(changed, fail_above=1.0)) == 0


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"checkpoint": TINY.parent}, CheckpointError, "no checkpoint"),
        ({"report": [Path("x.txt")]}, WrongUsage, r"neither \.md nor \.json"),
        ({"report": [Path("/no/such/x.md")]}, OutputError, "no such folder"),
        ({"ctx_size": 4096}, RequestError, "does not fit the context of 2048"),
        ({"file": TINY / "page.txt", "ctx_size": 1000}, RequestError, "789 tokens and 1000 are wanted"),
        ({"python": Path("/no/such/python")}, RequestError, "cannot be run"),
    ],
)
def test_what_is_refused(options: CertifyOptions, change: dict[str, object], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        certify_checkpoint(dataclasses.replace(options, **change))  # type: ignore[arg-type]


def test_a_python_without_transformers_is_told_what_to_install(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode:
        pytest.skip("this Python has torch")
    assert run(["certify", str(TINY), str(model), "-c", "16"]) == 1
    assert "has no torch: install it (pip install torch transformers), or name a Python" in capsys.readouterr().err


def test_options_reach_the_command_line(
    model: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["certify", str(TINY), "--outtype", "f16", "-f", str(TINY / "page.txt"), "-c", "40", "-ctk", "f16"]
    more = ["--python", str(python), "-o", "a.md", "-o", "a.json", "--fail-above", "1e-3", "-t", "1", "-q"]
    assert run([*arguments, *more]) == 0
    found = json.loads(Path("a.json").read_text("utf-8"))
    assert found["about"]["file"] == "F16, converted"
    assert 0 < found["divergence"]["mean"] < 1e-5
    assert "40 tokens" in capsys.readouterr().out
    assert run(["certify"]) == 2
