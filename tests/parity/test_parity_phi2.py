"""Logits of Phi-2 against transformers in float32: whole vocabulary, one prefill, chunks, and token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phiquant import LLM
from phiquant.convert import convert

pytestmark = pytest.mark.parity

BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_from_transformers(
    parity: Any, phi2: Any, tmp_path: Path, backend: str, record_property: Callable[[str, object], None]
) -> None:
    """At a length that is no multiple of anything."""
    ids = phi2.ids(131)
    expected = parity.truth(parity.saved(phi2, tmp_path / "hf"), ids)
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    parity.check(expected, path, ids, backend, record_property)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [512, 7, 1])
def test_chunks_give_what_transformers_gives(parity: Any, tmp_path: Path, backend: str, batch: int) -> None:
    model = parity.FAMILIES["phi2"]["phi_2"]
    expected = parity.truth(parity.saved(model, tmp_path / "hf"), model.ids(40))
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    with LLM.load(path, backend=backend, cache_type="f32", batch=batch) as llm:
        assert parity.kl(expected, parity.log_softmax(llm.logits(model.ids(40)))) <= parity.MOST_KL["f32"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_text_is_that_of_transformers(parity: Any, tmp_path: Path, backend: str) -> None:
    torch = pytest.importorskip("torch")
    model = parity.FAMILIES["phi2"]["phi_1"]
    made, prompt = parity.saved(model, tmp_path / "hf"), model.ids(20)
    expected = made.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 20:].tolist()
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    with LLM.load(path, backend=backend) as llm:
        assert list(llm.generate(prompt, max_tokens=30, temperature=0, ignore_eos=True).ids) == expected
