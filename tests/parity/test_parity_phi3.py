"""Logits against transformers in float32: made, saved and converted here, compared over the whole vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert

pytestmark = pytest.mark.parity

BACKENDS = ("reference", "cpu")


def test_divergence_from_transformers(
    parity: Any, model: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    made = parity.saved(model, tmp_path / "hf")
    expected = parity.truth(made, model.ids())
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    for backend in BACKENDS:
        parity.check(expected, tmp_path / "model.gguf", model.ids(), backend, record_property)


def test_generation_across_the_border_of_longrope(parity: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = parity.MODELS["longrope_above_96"]
    made = parity.saved(model, tmp_path / "hf")
    prompt = model.ids()[:120]
    generated = made.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 120:].tolist()
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    for backend in BACKENDS:
        with LLM.load(tmp_path / "model.gguf", backend=backend) as llm:
            assert list(llm.generate(prompt, max_tokens=40, temperature=0).ids) == generated


def test_greedy_text_of_the_bundled_model(parity: Any, tiny: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoModelForCausalLM.from_pretrained(
        parity.TINY, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = np.load(parity.VECTORS / "phi3_tiny.npz")["prompt"].tolist()
    generated = made.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    for backend in BACKENDS:
        with LLM.load(tiny, backend=backend) as llm:
            assert list(llm.generate(prompt, max_tokens=64, temperature=0).ids) == generated
