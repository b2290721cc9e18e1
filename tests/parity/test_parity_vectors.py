"""Logits against what transformers said of the same models (tests/vectors), without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM

pytestmark = pytest.mark.cpu

BACKENDS = ("reference", "cpu")  # of the architectures besides Phi-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_log_probabilities_equal_those_of_transformers(
    parity: Any, model: Any, files: Callable[[Any], Path], backend: str
) -> None:
    expected = np.load(parity.VECTORS / f"phi3_{model.name}.npz")
    assert expected["ids"].tolist() == model.ids()
    path = files(model)
    for cache_type, most in (("f32", 1e-9), ("f16", 1e-6)):
        with LLM.load(path, backend=backend, cache_type=cache_type) as llm:
            assert llm.backend == backend
            found = parity.log_softmax(llm.logits(model.ids()))
        assert parity.estimated(found[:, parity.KEPT] - expected["kept"]) < most, cache_type
        if cache_type == "f32":
            assert (found.argmax(axis=1) == expected["top"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_of_other_architectures(
    parity: Any, other: Any, files: Callable[[Any], Path], backend: str
) -> None:
    expected = np.load(parity.vector_file(other))
    assert expected["ids"].tolist() == other.ids()
    with LLM.load(files(other), backend=backend, cache_type="f32") as llm:
        found = parity.log_softmax(llm.logits(other.ids()))
    assert parity.estimated(found[:, parity.KEPT] - expected["kept"]) < 1e-9
    assert (found.argmax(axis=1) == expected["top"]).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_greedy_text_of_the_bundled_model_equals_that_of_transformers(parity: Any, tiny: Path, backend: str) -> None:
    expected = np.load(parity.VECTORS / "phi3_tiny.npz")
    with LLM.load(tiny, backend=backend) as llm:
        made = llm.generate(expected["prompt"].tolist(), max_tokens=64, temperature=0)
    assert list(made.ids) == expected["generated"].tolist()


def test_the_vectors_tell_the_regimes_apart(parity: Any) -> None:
    """Same weights, short and long factors: an error of this kind would be ten thousand times the tolerance."""
    short, long = (np.load(parity.VECTORS / f"phi3_longrope_{side}_96.npz")["kept"] for side in ("below", "above"))
    assert parity.estimated(short - long) > 1e-2
