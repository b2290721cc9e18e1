"""Phi-3-small against mlx-lm in float32, and against float64 NumPy where mlx-lm does not follow the released code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert

from . import models_phi3small, numpy_phi3small

pytestmark = pytest.mark.parity

MODELS = models_phi3small.MODELS | models_phi3small.OTHERS

in_each = pytest.mark.parametrize("backend", ["reference", "cpu"])


@pytest.fixture(scope="module")
def oracle() -> Any:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    from . import mlx_phi3small

    return mlx_phi3small


@pytest.fixture(scope="module")
def from_mlx(oracle: Any) -> Callable[[Any], np.ndarray]:
    """Logits of a model's ids, computed once for both backends."""
    known: dict[str, np.ndarray] = {}

    def logits(model: Any) -> np.ndarray:
        if model.name not in known:
            known.clear()
            known[model.name] = oracle.logits(oracle.load(model), model.ids())
        return known[model.name]

    return logits


def made(parity: Any, model: Any, directory: Path) -> Path:
    convert(parity.write_checkpoint(model, directory / "hf"), directory / "model.gguf", "f32")
    return directory / "model.gguf"


@pytest.mark.parametrize("model", models_phi3small.MODELS.values(), ids=lambda model: model.name)
@in_each
def test_divergence_from_mlx_lm(
    from_mlx: Any, parity: Any, model: Any, backend: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    expected = parity.log_softmax(from_mlx(model))
    parity.check(expected, made(parity, model, tmp_path), model.ids(), backend, record_property)


@pytest.mark.parametrize("model", models_phi3small.OTHERS.values(), ids=lambda model: model.name)
@in_each
def test_divergence_from_float64(
    parity: Any, model: Any, backend: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    expected = parity.log_softmax(numpy_phi3small.logits(model, model.weights(), model.ids()))
    parity.check(expected, made(parity, model, tmp_path), model.ids(), backend, record_property)


@pytest.mark.parametrize("name", list(models_phi3small.MODELS))
def test_float64_is_mlx_lm_for_whole_prompts(from_mlx: Any, parity: Any, name: str) -> None:
    model = MODELS[name]
    found = parity.log_softmax(numpy_phi3small.logits(model, model.weights(), model.ids()))
    assert parity.kl(parity.log_softmax(from_mlx(model)), found) < 1e-11


@pytest.mark.parametrize("name", ["grouped_64", "multi_48", "unscaled_32"])
def test_float64_is_mlx_lm_token_by_token(oracle: Any, parity: Any, name: str) -> None:
    model = MODELS[name]
    expected = parity.log_softmax(oracle.logits_by_token(oracle.load(model), model.ids()))
    found = parity.log_softmax(numpy_phi3small.logits(model, model.weights(), model.ids()))
    assert parity.kl(expected, found) < 1e-11
    assert (expected.argmax(axis=1) == found.argmax(axis=1)).all()


LOCAL = 2 * 32  # tokens of grouped_64 that every token of a block sees before the pattern leaves something out
BORDER = 128  # of longrope_above_64


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("grouped_64", (1, 31, 32, 33, LOCAL - 1, LOCAL, LOCAL + 1, LOCAL + 33, 200)),
        ("longrope_above_64", (BORDER - 1, BORDER, BORDER + 1, 2 * BORDER + 5)),
    ],
)
@pytest.mark.parametrize("batch", [512, 7, 1], ids=["one prefill", "chunks", "token by token"])
@in_each
def test_lengths_around_every_border(
    parity: Any, name: str, lengths: tuple[int, ...], batch: int, backend: str, tmp_path: Path
) -> None:
    model = MODELS[name]
    weights = model.weights()
    with LLM.load(made(parity, model, tmp_path), backend=backend, cache_type="f32", batch=batch) as llm:
        for length in lengths:
            ids = model.ids(length)
            expected = parity.log_softmax(numpy_phi3small.logits(model, weights, ids))
            found = parity.log_softmax(llm.logits(ids))
            assert parity.kl(expected, found) <= parity.MOST_KL["f32"], length
            assert (expected.argmax(axis=1) == found.argmax(axis=1)).all(), length


@in_each
def test_generation_across_the_border_of_longrope(parity: Any, backend: str, tmp_path: Path) -> None:
    model = MODELS["longrope_above_64"]
    weights, ids = model.weights(), model.ids(BORDER - 6)
    with LLM.load(made(parity, model, tmp_path), backend=backend) as llm:
        unused = llm.tokenizer.unused_ids
        found = list(llm.generate(ids, max_tokens=12, temperature=0).ids)
    expected: list[int] = []
    for _ in range(12):
        logits = numpy_phi3small.logits(model, weights, ids + expected)[-1]
        logits[unused] = -np.inf
        expected.append(int(logits.argmax()))
    assert found == expected
