"""Phi-3-small's logits against what mlx-lm and float64 said of the same models (tests/vectors), without either."""

import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phiquant import LLM
from phiquant.convert import convert
from phiquant.convert.dummies import RELEASED

from .models_phi3small import LAST, MODELS, OTHERS

pytestmark = pytest.mark.cpu

in_each = pytest.mark.parametrize("backend", ["reference", "cpu"])


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
        assert parity.estimated(found[:, parity.KEPT] - expected["kept"]) < most, cache_type
        if cache_type == "f32":
            assert (found.argmax(axis=1) == expected["top"]).all()


def test_the_vectors_tell_the_regimes_apart(parity: Any) -> None:
    short, long = (np.load(parity.VECTORS / f"phi3small_longrope_{side}_64.npz")["kept"] for side in ("below", "above"))
    assert parity.estimated(short - long) > 1e-2


def test_the_vectors_tell_sparse_attention_from_dense(parity: Any, files: Callable[[Any], Path]) -> None:
    """An error of this kind would be a million times the tolerance; of the released, wide pattern, a thousand times."""
    for name, least in (("grouped_64", 1e-3), ("released_32", 1e-6)):
        model = dataclasses.replace(MODELS[name], name="dense", dense_every=1)
        with LLM.load(files(model), backend="cpu", cache_type="f32") as llm:
            found = parity.log_softmax(llm.logits(model.ids())[-LAST:])
        expected = np.load(parity.VECTORS / f"phi3small_{name}.npz")["kept"]
        assert parity.estimated(found[:, parity.KEPT] - expected) > least


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


def test_a_checkpoint_with_the_released_kind_of_vocabulary(tmp_path: Path) -> None:
    """Files as the released models have them: ranks of tiktoken, special tokens known by the tokenizer's class."""
    model = dataclasses.replace(MODELS["grouped_64"], head_size=16, layers=1)
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((100352, model.hidden), np.float32) * np.float32(0.1 / model.embedding)
    config = {**model.config(), "vocab_size": 100352, "bos_token_id": 100257, "eos_token_id": 100257}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({**model.weights(), "model.embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    tokens = [*(bytes([byte]) for byte in range(256)), b"Hi", b" th", b" there"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "cl100k_base.tiktoken").write_text("\n".join(lines) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Phi3SmallTokenizer"}))
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with LLM.load(tmp_path / "model.gguf") as llm:
        assert llm.tokenizer.unused_ids.tolist() == [*range(len(tokens), 100256), *RELEASED]
        prompt = llm.tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>")
        assert prompt == [100262, 10, 256, 100266, 10, 100263]
        assert {100257, 100266} <= llm.tokenizer.eog_ids
        drawn: set[int] = set()
        for seed in range(10):
            made = llm.generate(prompt, max_tokens=40, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
            drawn.update(made.ids)
        assert len(drawn) > 100
        assert drawn < {*range(len(tokens)), 100257, 100261, 100262, 100263, 100266}
