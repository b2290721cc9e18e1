"""`phiquant perplexity`: what it measures and prints, saved logits, and what it refuses."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.cli.app import run
from phiquant.cli.failures import WrongUsage
from phiquant.cli.perplexity import PerplexityOptions, perplexity
from phiquant.convert import convert, quantize
from phiquant.errors import LogitsError, OutputError, RequestError
from phiquant.eval import compare_logits
from phiquant.eval import perplexity as library
from phiquant.eval.saved import SavedLogits, SavedWriter
from phiquant.eval.windows import Windows

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
PAGE = TINY / "page.txt"
TEXT = PAGE.read_text("utf-8").rstrip("\n")

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("perplexity") / "tiny-F16.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


@pytest.fixture(scope="module")
def small(model: Path) -> Path:
    made = model.with_name("tiny-Q4_K_M.gguf")
    quantize(model, made, "Q4_K_M", quiet=True)
    return made


@pytest.fixture
def options(model: Path) -> PerplexityOptions:
    return PerplexityOptions(model, PAGE, ctx_size=64, output="json")


def result(options: PerplexityOptions, capsys: pytest.CaptureFixture[str], **changes: object) -> dict:  # type: ignore[type-arg]
    assert perplexity(dataclasses.replace(options, **changes)) == 0  # type: ignore[arg-type]
    found: dict = json.loads(capsys.readouterr().out)  # type: ignore[type-arg]
    return found


def test_it_measures_what_the_library_measures(
    options: PerplexityOptions, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(options, capsys)
    with LLM.load(model, context=64) as llm:
        bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
        expected = library(llm, TEXT, window=64, bos=bos)
    assert found["perplexity"]["value"] == expected.value
    assert (found["windows"], found["window"], found["perplexity"]["tokens"]) == (12, 64, 12 * 31)
    for batch in (16, 64, 100, 2048):
        assert result(options, capsys, batch_size=batch)["perplexity"] == found["perplexity"], "batches move no bit"
    assert result(options, capsys, chunks=3)["perplexity"]["tokens"] == 3 * 31


def test_the_text_form_is_llama_perplexity_s(options: PerplexityOptions, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity(dataclasses.replace(options, output="text"))
    out, err = capsys.readouterr()
    assert re.fullmatch(r"Final estimate: PPL = \d+\.\d{4} \+/- \d+\.\d{5}\n", out)
    assert "error" not in err
    perplexity(dataclasses.replace(options, output="text", ppl_output_type=1, chunks=3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["0", "64", "128"]
    assert lines[2].split()[1] == lines[3].split()[4], "the last line's perplexity is the final one"


def test_strided_windows(options: PerplexityOptions, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(options, capsys, ctx_size=128, ppl_stride=64)
    assert (found["window"], found["windows"], found["stride"]) == (256, 9, 64)
    assert found["perplexity"]["tokens"] == 9 * 64
    with pytest.raises(RequestError, match="must have at least 1024, two windows of 512"):
        perplexity(dataclasses.replace(options, ctx_size=256, ppl_stride=128))


def test_a_base_model_is_compared_exactly(
    options: PerplexityOptions, model: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(options, capsys, model=small, kl_divergence=True, base=model)
    with LLM.load(model, context=64) as base, LLM.load(small, context=64) as other:
        ids = np.array(base.tokenize(TEXT, special=False), np.int32)
        bos = base.tokenizer.bos_id if base.tokenizer.add_bos else None
        windows = Windows.halves(ids, 64, bos=bos)
        values, same = [], 0
        for window in range(len(windows)):
            read = windows.read(window).tolist()
            part, equal = compare_logits(base.logits(read)[32:63], other.logits(read)[32:63])
            values.append(part)
            same += equal
    assert found["divergence"]["mean"] == pytest.approx(np.concatenate(values).mean(), rel=1e-12)
    assert found["divergence"]["top1"] == same / (12 * 31)
    alone = result(options, capsys)
    assert found["base_perplexity"] == alone["perplexity"]
    itself = result(options, capsys, kl_divergence=True, base=model)
    assert (itself["divergence"]["maximum"], itself["divergence"]["top1"], itself["ratio"]["value"]) == (0, 1, 1)


def test_saved_logits_are_written_and_compared(
    options: PerplexityOptions, small: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.kld"
    alone = result(options, capsys, kl_divergence_base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["base.kld"]
    with SavedLogits(base) as saved:
        assert (len(saved.windows), saved.windows.size, saved.vocabulary) == (12, 64, 32064)
    compared = dataclasses.replace(options, model=small, file=None, kl_divergence=True, ctx_size=512)
    found = result(compared, capsys, kl_divergence_base=base)
    exact = result(compared, capsys, base=model, file=PAGE, ctx_size=64)
    assert found["window"] == 64, "that of the file"
    for name in ("mean", "maximum", "top1"):
        assert found["divergence"][name] == pytest.approx(exact["divergence"][name], rel=0.01)
    # What is 16 nats below the likeliest token and more was saved as so likely.
    assert found["base_perplexity"]["value"] == pytest.approx(alone["perplexity"]["value"], rel=5e-3)
    assert found["perplexity"] == exact["perplexity"]
    assert result(compared, capsys, kl_divergence_base=base, chunks=2)["perplexity"]["tokens"] == 62
    perplexity(dataclasses.replace(compared, kl_divergence_base=base, output="text", file=PAGE))
    shown = capsys.readouterr()
    assert "what is read is the text of" in shown.err
    lines = shown.out.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        "====== Perplexity statistics ======",
        "====== KL divergence statistics ======",
        "====== Token probability statistics ======",
    ]
    figures = dict(line.split(":", 1) for line in lines if ":" in line)
    assert float(figures["Mean    KLD"].split()[0]) == pytest.approx(found["divergence"]["mean"], abs=1e-6)
    assert float(figures["99.9%   KLD"]) == pytest.approx(found["divergence"]["percentiles"]["99.9"], abs=1e-6)
    assert float(figures["Same top p"].split()[0]) == pytest.approx(100 * found["divergence"]["top1"], abs=1e-3)
    assert len(figures) == 6 + 12 + 16


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"file": None}, WrongUsage, "give a text with -f"),
        ({"output": "csv"}, WrongUsage, "text or json"),
        ({"kl_divergence": True}, WrongUsage, "takes a base"),
        ({"kl_divergence": True, "base": PAGE, "kl_divergence_base": PAGE}, WrongUsage, "takes a base"),
        ({"base": PAGE}, WrongUsage, "add --kl-divergence"),
        ({"ppl_stride": 8, "kl_divergence_base": Path("x")}, WrongUsage, "without --ppl-stride"),
        ({"kl_divergence_base": PAGE}, OutputError, "exists already; add --kl-divergence"),
        ({"kl_divergence_base": Path("/no/such/folder/x")}, OutputError, "not a directory"),
        ({"kl_divergence": True, "kl_divergence_base": PAGE}, LogitsError, "not a file of saved logits"),
        ({"ctx_size": 512}, RequestError, "789 tokens and must have at least 1024"),
        ({"ctx_size": 4096}, RequestError, "longer than the 2048 .* was trained for"),
        ({"chunks": 0}, RequestError, "0 windows"),
        ({"file": TINY / "model.safetensors"}, RequestError, "not text in UTF-8"),
    ],
)
def test_what_is_refused(
    options: PerplexityOptions, change: dict[str, object], error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        perplexity(dataclasses.replace(options, **change))  # type: ignore[arg-type]


def test_logits_of_another_vocabulary_are_refused(options: PerplexityOptions, tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    windows = Windows.halves(np.zeros(16, np.int32), 8)
    with SavedWriter(base, windows, 100) as writer:
        writer.commit()
    with pytest.raises(LogitsError, match=r"vocabulary of 100 tokens, and .*tiny-F16\.gguf has 32064"):
        perplexity(dataclasses.replace(options, kl_divergence=True, kl_divergence_base=base))


def test_options_reach_the_command_line(
    model: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["perplexity", "-m", str(model), "-f", str(PAGE), "-c", "64", "-b", "128", "--chunks", "4", "-t", "1"]
    assert run([*arguments, "--save-all-logits", "base.kld", "-q"]) == 0
    assert run(["perplexity", "-m", str(small), "--kl_divergence", "--kl-divergence-base", "base.kld"]) == 0
    assert "Same top p" in capsys.readouterr().out
    assert run([*arguments, "--kl-divergence", "--base", str(small), "-ctk", "q8_0", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"]["tokens"] == 4 * 31
    assert run([*arguments, "--ppl-stride", "8", "--ppl-output-type", "1"]) == 0
    assert run(["perplexity"]) == 2
    assert "phiquant perplexity -m MODEL.gguf" in capsys.readouterr().err


def test_ctrl_c_leaves_no_saved_logits(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "base.kld"
    text.write_text(TEXT * 100, "utf-8")
    command = [sys.executable, "-m", "phiquant", "perplexity", "-m", str(model), "-f", str(text)]
    process = subprocess.Popen([*command, "--save-all-logits", str(out)], stderr=subprocess.PIPE, env=os.environ.copy())
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".phiquant-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
