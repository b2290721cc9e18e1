"""`phiquant perplexity` beside llama-perplexity, on the same files.

The tool itself is not part of llama-cpp-python, and to build it takes six minutes on two cores. So its procedure is
written out here, over the logits of llama.cpp's library; the tests of the tool itself run where it was built (`make
bench-speed` does, or PHIQUANT_LLAMA_PERPLEXITY names it).

Logits differ for two reasons: llama.cpp rounds activations for a matrix otherwise (quantized types), and its attention
adds up in another order, over a cache in half precision. So do perplexities, by the tolerances here; what is read and
what is scored must not differ at all.
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.cli.app import run
from phiquant.convert import convert, quantize
from phiquant.eval.saved import SavedLogits

pytestmark = pytest.mark.interop

TINY = Path(__file__).parents[2] / "models/phi3-tiny"
PAGE = TINY / "page.txt"
TEXT = PAGE.read_text("utf-8").removesuffix("\n")
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phiquant"
TOOL = Path(os.environ.get("PHIQUANT_LLAMA_PERPLEXITY", HOME / "llama.cpp-native/bin/llama-perplexity"))

SIZE = 64
# Relative, of perplexity: some four times what was measured on this page (6e-5; 1.5e-3 and 7e-4).
TOLERANCE = {"F32": 3e-4, "F16": 3e-4, "Q8_0": 6e-3, "Q4_K_M": 6e-3, "F32-bos": 3e-4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("perplexity")
    made = {name: folder / f"tiny-{name}.gguf" for name in TOLERANCE}
    for name in ("F32", "F16"):
        convert(TINY, made[name], name.lower(), quiet=True)
    for name in ("Q8_0", "Q4_K_M"):
        quantize(made["F32"], made[name], name, quiet=True)
    adding = ["--override-kv", "tokenizer.ggml.add_bos_token=bool:true"]  # the bundled model's prompts begin with none
    assert run(["quantize", "-q", *adding, str(made["F32"]), str(made["F32-bos"]), "COPY"]) == 0
    return made


@pytest.fixture
def ours(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def measure(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert run(["perplexity", "-o", "json", *map(str, arguments)]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return measure


@pytest.fixture(scope="module")
def tool() -> Callable[..., tuple[str, str]]:
    if not TOOL.exists():
        pytest.skip(f"llama-perplexity is not built at {TOOL}; `make bench-speed` builds it")

    def call(*arguments: str | Path) -> tuple[str, str]:
        """What it prints, and what it logs."""
        command = [TOOL, "-t", "2", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr

    return call


def loss(row: np.ndarray, token: int) -> float:
    """Negative log-likelihood, as llama-perplexity adds it up."""
    top = float(row.max())
    return top - float(row[token]) + math.log(sum(math.exp(float(x) - top) for x in row))


@pytest.mark.parametrize("name", TOLERANCE)
def test_perplexity_by_the_procedure_over_its_logits(
    name: str, files: dict[str, Path], ours: Any, llama_cpp: Any
) -> None:
    found = ours("-m", files[name], "-f", PAGE, "-c", SIZE, "--chunks", 4)
    (ids,) = llama_cpp.tokenize(files[name], [TEXT], special=False, bos=True)
    assert (ids[0] == 1) == name.endswith("bos")
    losses = []
    for window in range(4):
        tokens = ids[window * SIZE : (window + 1) * SIZE]
        if name.endswith("bos"):
            tokens[0] = 1
        logits = llama_cpp.logits(files[name], tokens, context=256)
        losses += [loss(logits[p], tokens[p + 1]) for p in range(SIZE // 2, SIZE - 1)]
    assert found["perplexity"]["tokens"] == len(losses)
    expected = math.exp(sum(losses) / len(losses))
    print(f"{name}: {found['perplexity']['value'] / expected - 1:.1e}")
    assert found["perplexity"]["value"] == pytest.approx(expected, rel=TOLERANCE[name])


def test_strided_perplexity_by_the_procedure_over_its_logits(files: dict[str, Path], ours: Any, llama_cpp: Any) -> None:
    found = ours("-m", files["F32"], "-f", PAGE, "-c", 128, "--ppl-stride", 64, "--chunks", 3)
    (ids,) = llama_cpp.tokenize(files["F32"], [TEXT], special=False, bos=True)
    losses = []
    for start in (0, 64, 128):  # windows of 128 + 64 / 2 tokens, rounded up to 256
        tokens = ids[start : start + 256]
        logits = llama_cpp.logits(files["F32"], tokens, context=256)
        losses += [loss(logits[p], tokens[p + 1]) for p in range(256 - 64 - 1, 256 - 1)]
    assert found["perplexity"]["tokens"] == len(losses) == 3 * 64
    expected = math.exp(sum(losses) / len(losses))
    assert found["perplexity"]["value"] == pytest.approx(expected, rel=TOLERANCE["F32"])


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_tool_finds_the_same_perplexity(name: str, files: dict[str, Path], ours: Any, tool: Any) -> None:
    found = ours("-m", files[name], "-f", PAGE, "-c", SIZE)
    said = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", tool("-m", files[name], "-f", PAGE, "-c", SIZE)[1])
    assert said is not None
    assert found["perplexity"]["value"] == pytest.approx(float(said[1]), rel=TOLERANCE[name])
    assert found["perplexity"]["error"] == pytest.approx(float(said[2]), rel=2 * TOLERANCE[name])


def test_the_tool_finds_the_same_in_strides(files: dict[str, Path], ours: Any, tool: Any) -> None:
    arguments = ("-m", files["F32"], "-f", PAGE, "-c", 128, "-b", 128, "--ppl-stride", 64)
    found, said = ours(*arguments), re.findall(r"\[(\d+)\]([\d.]+),", tool(*arguments)[0])
    assert int(said[-1][0]) == found["windows"]
    assert found["perplexity"]["value"] == pytest.approx(float(said[-1][1]), rel=TOLERANCE["F32"])


def statistics(text: str) -> dict[str, tuple[float, ...]]:
    """Every figure of the three sections, by its name, with its error if it has one."""
    lines = text[text.index("====== Perplexity statistics") :].splitlines()
    named = (line.split(":", 1) for line in lines if ": " in line)
    return {name.strip(): tuple(map(float, re.findall(r"-?\d+\.\d+", figures))) for name, figures in named}


def test_saved_logits_go_both_ways(
    files: dict[str, Path], tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same statistics from a base that either wrote, by either; of F16, so that the two compute alike."""
    text = ["-f", PAGE, "-c", SIZE]
    bases = {"ours": tmp_path / "ours.kld", "theirs": tmp_path / "theirs.kld"}
    assert run(["perplexity", "-q", "-m", *map(str, (files["F16"], *text, "--save-all-logits", bases["ours"]))]) == 0
    tool("-m", files["F16"], *text, "--save-all-logits", bases["theirs"])
    a, b = (path.read_bytes() for path in bases.values())
    with SavedLogits(bases["ours"]) as saved:
        head = saved._shape.begin
        assert a[:head] == b[:head]
        assert len(a) == len(b)
    found: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for name, path in bases.items():
        arguments = ["-m", files["Q8_0"], "--kl-divergence", "--kl-divergence-base", path]
        capsys.readouterr()
        assert run(["perplexity", *map(str, arguments)]) == 0
        found["ours", name] = statistics(capsys.readouterr().out)
        found["theirs", name] = statistics(tool(*arguments, "-c", SIZE)[0])
    for reader in ("ours", "theirs"):
        one, two = found[reader, "ours"], found[reader, "theirs"]
        assert one.keys() == two.keys() == found["ours", "ours"].keys()
        assert len(one) == 34
        for figure, values in one.items():
            loose = 0.02 if figure.startswith(("Mean", "RMS", "Same")) else 0.15  # of 372 positions single ones tell
            assert values == pytest.approx(two[figure], rel=loose, abs=6e-3), (reader, figure)
    # The base's own figures come from the file alone, to every digit.
    for name in bases:
        assert found["ours", name]["Mean PPL(base)"] == pytest.approx(found["theirs", name]["Mean PPL(base)"], rel=1e-6)
        for figure in ("Mean PPL(Q)", "Mean PPL(Q)/PPL(base)"):
            assert found["ours", name][figure] == pytest.approx(found["theirs", name][figure], rel=0.01, abs=2e-3)
        for figure in ("Mean    KLD", "99.0%   KLD", "Same top p", "RMS Δp"):
            ours_, theirs = found["ours", name][figure], found["theirs", name][figure]
            assert ours_[0] == pytest.approx(theirs[0], rel=0.25), figure
