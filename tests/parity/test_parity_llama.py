"""Logits of rewritten Phis (Llama, Mistral) against transformers in float32, below, at and beyond every border."""

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
    parity: Any, llama: Any, tmp_path: Path, backend: str, record_property: Callable[[str, object], None]
) -> None:
    """131 tokens lie beyond window and LongRoPE's border."""
    ids = llama.ids(131)
    expected = parity.truth(parity.saved(llama, tmp_path / "hf"), ids)
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    parity.check(expected, path, ids, backend, record_property)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "lengths"), [("window_96", (46, 47, 48, 49)), ("longrope_96", (63, 64, 65))])
def test_at_the_borders(parity: Any, tmp_path: Path, backend: str, name: str, lengths: tuple[int, ...]) -> None:
    model = parity.FAMILIES["llama"][name]
    made = parity.saved(model, tmp_path / "hf")
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    for batch in (512, 7, 1):
        with LLM.load(path, backend=backend, cache_type="f32", batch=batch) as llm:
            for length in lengths:
                expected = parity.truth(made, model.ids(length))
                found = parity.log_softmax(llm.logits(model.ids(length)))
                assert parity.kl(expected, found) <= parity.MOST_KL["f32"], (batch, length)
                assert (expected.argmax(axis=1) == found.argmax(axis=1)).all(), (batch, length)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_text_is_that_of_transformers(parity: Any, tmp_path: Path, backend: str) -> None:
    torch = pytest.importorskip("torch")
    model = parity.FAMILIES["llama"]["window_96"]
    made, prompt = parity.saved(model, tmp_path / "hf"), model.ids(35)
    expected = made.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 35:].tolist()
    path = convert(tmp_path / "hf", tmp_path / "model.gguf", "f32", quiet=True).plan.path
    with LLM.load(path, backend=backend) as llm:
        assert list(llm.generate(prompt, max_tokens=30, temperature=0, ignore_eos=True).ids) == expected
