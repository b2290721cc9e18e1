"""Logits against transformers in float32: made, saved and converted here, compared over the whole vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert

pytestmark = pytest.mark.parity

MOST_KL = {"f16": 1e-6, "f32": 1e-9}  # by the type of the cache
CLOSE = 0.01  # in log-probability
BACKENDS = ("reference", "cpu")


def test_divergence_from_transformers(
    parity: Any, model: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    made = parity.saved(model, tmp_path / "hf")
    expected = parity.truth(made, model.ids())
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    for backend in BACKENDS:
        for cache_type in MOST_KL:
            with LLM.load(tmp_path / "model.gguf", backend=backend, cache_type=cache_type) as llm:
                found = parity.log_softmax(llm.logits(model.ids()))
            divergence = parity.kl(expected, found)
            record_property(f"{backend} {cache_type}", divergence)
            print(f"KL {model.name:28} {backend:10} {cache_type} {divergence:.2e}")
            assert divergence <= MOST_KL[cache_type], (backend, cache_type)
            top, ours = expected.argmax(axis=1), found.argmax(axis=1)
            rows = np.flatnonzero(top != ours)
            if cache_type == "f32":
                assert len(rows) == 0, backend
            else:  # half precision may swap two tokens that are as good as equally likely
                assert (expected[rows, top[rows]] - expected[rows, ours[rows]] < CLOSE).all(), backend


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
