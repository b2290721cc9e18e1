"""Phi-3-small's logits against what mlx-lm and float64 said of the same models (tests/vectors), without either."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM

from .models_phi3small import LAST, MODELS, OTHERS

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

in_each = pytest.mark.parametrize("backend", ["reference", "cpu"])


def divergence(difference: np.ndarray) -> float:
    """KL divergence estimated from differences of log-probabilities at random tokens, to second order."""
    return float((difference.astype(np.float64) ** 2).mean() / 2)


@pytest.mark.parametrize("model", [*MODELS.values(), *OTHERS.values()], ids=lambda model: model.name)
@in_each
def test_log_probabilities_are_the_expected(
    parity: Any, model: Any, files: Callable[[Any], Path], backend: str
) -> None:
    expected = np.load(parity.VECTORS / f"phi3small_{model.name}.npz")
    assert expected["ids"].tolist() == model.ids()
    path = files(model)
    for cache_type, most in (("f32", 1e-9), ("f16", 1e-6)):
        with LLM.load(path, backend=backend, cache_type=cache_type) as llm:
            found = parity.log_softmax(llm.logits(model.ids())[-LAST:])
        assert divergence(found[:, parity.KEPT] - expected["kept"]) < most, cache_type
        if cache_type == "f32":
            assert (found.argmax(axis=1) == expected["top"]).all()


def test_the_vectors_tell_the_regimes_apart(parity: Any) -> None:
    short, long = (np.load(parity.VECTORS / f"phi3small_longrope_{side}_64.npz")["kept"] for side in ("below", "above"))
    assert divergence(short - long) > 1e-2


def test_the_vectors_tell_sparse_attention_from_dense(parity: Any, files: Callable[[Any], Path]) -> None:
    """An error of this kind would be a million times the tolerance; of the released, wide pattern, a thousand times."""
    for name, least in (("grouped_64", 1e-3), ("released_32", 1e-6)):
        model = dataclasses.replace(MODELS[name], name="dense", dense_every=1)
        with LLM.load(files(model), backend="cpu", cache_type="f32") as llm:
            found = parity.log_softmax(llm.logits(model.ids())[-LAST:])
        expected = np.load(parity.VECTORS / f"phi3small_{name}.npz")["kept"]
        assert divergence(found[:, parity.KEPT] - expected) > least


@in_each
def test_dummy_tokens_have_logits_and_are_never_sampled(files: Callable[[Any], Path], backend: str) -> None:
    model = dataclasses.replace(MODELS["grouped_64"], name="free")
    prompt = model.ids(40)
    with LLM.load(files(model), backend=backend) as llm:
        free = list(llm.generate(prompt, max_tokens=8, temperature=0).ids)
        logits = llm.logits(prompt)
    model = dataclasses.replace(model, name="bound", dummies=tuple(sorted(set(free))))
    with LLM.load(files(model), backend=backend) as llm:
        assert (llm.logits(prompt) == logits).all()
        bound = list(llm.generate(prompt, max_tokens=8, temperature=0).ids)
        assert not set(bound) & set(free)
        assert bound != free
        sampled = llm.generate(prompt, max_tokens=40, temperature=3.0, seed=1).ids
        assert not set(sampled) & set(free)
