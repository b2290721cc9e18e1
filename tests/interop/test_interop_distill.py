"""A distilled file in llama.cpp: it is as large as before, and computes there what it computes here."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from phiquant import LLM
from phiquant.calibrate.distill import Distillation
from phiquant.convert import convert, execute, quantize
from phiquant.convert.source import GGUFSource
from phiquant.eval.kl import compare_logits
from phiquant.gguf import GGUFFile

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"
MOST = 7.4e-4  # as of files that are not distilled
TOKENS = 256


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K"])
def test_a_distilled_file_is_read_by_llama_cpp(kind: str, tmp_path: Path, llama_cpp: Any) -> None:
    base, rounded, tuned = (tmp_path / f"{name}.gguf" for name in ("base", "rounded", "tuned"))
    convert(MODEL, base, "f32", quiet=True)
    quantize(base, rounded, kind, quiet=True)
    shutil.copy(rounded, tuned)
    text = (MODEL / "calibration.txt").read_text("utf-8")
    with Distillation(base, tuned, text, tokens=4096, epochs=1) as made, GGUFSource(tuned) as source:
        found = made.run()
        assert found.pays
        execute(made.plan(source, found), maker=made)
    with GGUFFile.open(rounded) as before, GGUFFile.open(tuned) as after:
        for name, tensor in before.tensors.items():
            assert after.tensors[name].type is tensor.type
            assert after.data(name).size == before.data(name).size
    with LLM.load(tuned, context=512, backend="cpu") as model:
        ids = model.tokenize((MODEL / "page.txt").read_text("utf-8"))[:TOKENS]
        ours = model.logits(ids)
    theirs = llama_cpp.logits(tuned, ids)
    values, same = compare_logits(theirs, ours)
    print(f"{kind}: {values.mean():.1e}, {same} of {len(ids)}")
    assert values.mean() <= MOST
    assert same >= len(ids) * 0.95
    changed, _ = compare_logits(llama_cpp.logits(rounded, ids), theirs)
    assert changed.mean() > MOST, "llama.cpp uses what was tuned"
