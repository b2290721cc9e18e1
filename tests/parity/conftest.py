"""Small random Phi-3 models, their weights drawn from a seeded NumPy generator so that none need be committed.

Weights are larger than a fresh model's: scores of attention spread by 1 and logits by 1.5, so that a wrong rotation or
mask shows at once (`test_the_vectors_tell_the_regimes_apart`).
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phiquant import LLM
from phiquant.convert import convert

HERE = Path(__file__).parent
VECTORS = Path(__file__).parents[1] / "vectors"
TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
LENGTH = 200
VOCABULARY = 32064
LAYERS = 3
MOST_KL = {"f16": 1e-6, "f32": 1e-9}  # mean, by the type of the cache
CLOSE = 0.01  # in log-probability


@dataclass(frozen=True)
class Model:
    name: str
    seed: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool = False
    partial: float = 1.0
    original: int = 0  # LongRoPE's border; 0 without LongRoPE
    window: int | None = None

    architecture = "phi3"
    classes = ("Phi3ForCausalLM", "Phi3Config")  # of transformers

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def ffn(self) -> int:
        return 2 * self.hidden

    def config(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": self.partial}
        if self.original:
            half = int(self.head_size * self.partial) // 2
            rope |= {
                "rope_type": "longrope",
                "original_max_position_embeddings": self.original,
                "short_factor": np.linspace(1.0, 2.5, half).round(4).tolist(),
                "long_factor": np.geomspace(1.1, 40.0, half).round(4).tolist(),
            }
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": self.original or 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": rope,
            "sliding_window": self.window,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "dtype": "float32",
        }

    def weights(self) -> dict[str, np.ndarray]:
        draw = np.random.Generator(np.random.PCG64(self.seed)).standard_normal
        q, kv = self.hidden, self.kv_heads * self.head_size

        def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
            return draw((rows, columns), np.float32) * np.float32(gain / np.sqrt(columns))

        def norm() -> np.ndarray:
            return 1 + np.float32(0.1) * draw(self.hidden, np.float32)

        spread = 1.5 if self.tied else np.sqrt(self.hidden)
        made = {"model.embed_tokens.weight": matrix(VOCABULARY, self.hidden, spread), "model.norm.weight": norm()}
        if not self.tied:
            made["lm_head.weight"] = matrix(VOCABULARY, self.hidden, 1.5)
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            made[prefix + "self_attn.qkv_proj.weight"] = matrix(q + 2 * kv, self.hidden, 1.0)
            made[prefix + "self_attn.o_proj.weight"] = matrix(self.hidden, q, 0.7)
            made[prefix + "mlp.gate_up_proj.weight"] = matrix(2 * self.ffn, self.hidden, 1.0)
            made[prefix + "mlp.down_proj.weight"] = matrix(self.hidden, self.ffn, 0.7)
            made[prefix + "input_layernorm.weight"] = norm()
            made[prefix + "post_attention_layernorm.weight"] = norm()
        return made

    def ids(self, length: int = LENGTH) -> list[int]:
        return np.random.Generator(np.random.PCG64(self.seed + 1)).integers(3, 32000, length).tolist()


MODELS = {
    model.name: model
    for model in (
        Model("untied_64", 11, heads=4, kv_heads=4, head_size=64),
        Model("tied_grouped_96", 12, heads=4, kv_heads=2, head_size=96, tied=True),
        Model("untied_grouped_128", 13, heads=4, kv_heads=1, head_size=128),
        Model("tied_grouped_partial_128", 14, heads=4, kv_heads=2, head_size=128, tied=True, partial=0.75),
        Model("longrope_below_96", 15, heads=4, kv_heads=4, head_size=96, original=256),
        Model("longrope_above_96", 15, heads=4, kv_heads=4, head_size=96, original=128),
        Model("longrope_partial_128", 16, heads=3, kv_heads=1, head_size=128, tied=True, partial=0.75, original=64),
        Model("window_64", 17, heads=4, kv_heads=4, head_size=64, window=47),
    )
}


_FAMILIES = {
    path.stem.removeprefix("models_"): importlib.import_module(path.stem).MODELS
    for path in sorted(HERE.glob("models_*.py"))
}
# Those of the other architectures, each in a file of its own: architecture -> name -> model. Those that transformers
# does not make of their `classes` have tests of their own.
FAMILIES = {
    family: models
    for family, models in _FAMILIES.items()
    if all(hasattr(model, "classes") for model in models.values())
}


def vector_file(model: Any) -> Path:
    """What transformers said of a model."""
    return VECTORS / f"{model.architecture}_{model.name}.npz"


# Sequences for the vectors: ids whose log-probabilities are kept for each token.
KEPT = np.random.Generator(np.random.PCG64(1)).choice(32000, 64, replace=False)


def write_checkpoint(model: Model, directory: Path) -> Path:
    """The model in Hugging Face layout, without transformers' help."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config()))
    save_file(model.weights(), directory / "model.safetensors", {"format": "pt"})
    copy_tokenizer(directory)
    return directory


def copy_tokenizer(directory: Path) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, directory / name)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def kl(truth: np.ndarray, ours: np.ndarray) -> float:
    """Mean KL divergence of next-token distributions, from log-probabilities [tokens, vocabulary]."""
    return float((np.exp(truth) * (truth - ours)).sum(axis=1).mean())


def estimated(difference: np.ndarray) -> float:
    """KL divergence estimated from differences of log-probabilities at random tokens, to second order."""
    return float((difference.astype(np.float64) ** 2).mean() / 2)


def saved(model: Any, directory: Path) -> Any:
    """A transformers model with the weights of `model`, saved by save_pretrained."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made_of, configured_by = (getattr(transformers, name) for name in model.classes)
    settings = {k: v for k, v in model.config().items() if k not in ("architectures", "model_type", "dtype")}
    made = made_of._from_config(configured_by(**settings), attn_implementation="eager", dtype=torch.float32)
    state = {name: torch.from_numpy(value) for name, value in model.weights().items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if settings["tie_word_embeddings"] else [])
    made.eval().save_pretrained(directory)
    copy_tokenizer(directory)
    return made


def truth(made: Any, ids: list[int]) -> np.ndarray:
    """What a transformers model says of a text: log-probabilities [tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        return log_softmax(made(torch.tensor([ids])).logits[0].numpy())


def check(
    expected: np.ndarray, path: Path, ids: list[int], backend: str, record: Callable[[str, object], None]
) -> None:
    """A file's log-probabilities are within bounds of the right ones with either cache, the likeliest tokens the same.

    Half precision may swap two tokens that are as good as equally likely.
    """
    for cache_type, most in MOST_KL.items():
        with LLM.load(path, backend=backend, cache_type=cache_type) as llm:
            found = log_softmax(llm.logits(ids))
        divergence = kl(expected, found)
        record(f"{backend} {cache_type}", divergence)
        print(f"KL {backend:10} {cache_type} {divergence:.2e}")
        assert divergence <= most, (backend, cache_type)
        top, ours = expected.argmax(axis=1), found.argmax(axis=1)
        rows = np.flatnonzero(top != ours)
        assert cache_type == "f16" or len(rows) == 0, backend
        assert (expected[rows, top[rows]] - expected[rows, ours[rows]] < CLOSE).all(), backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `phi2` runs on every model of models_phi2.py, and so on; for `other`, on all of those."""
    for family, models in [
        *FAMILIES.items(),
        ("other", {f"{f}_{n}": m for f in FAMILIES for n, m in FAMILIES[f].items()}),
    ]:
        if family in metafunc.fixturenames:
            metafunc.parametrize(family, list(models.values()), ids=list(models))


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """This module, for the tests beside it."""
    return sys.modules[__name__]


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[Model], Path]]:
    """Makes the F32 GGUF of a model; some 60 to 200 MB, so it goes after the test."""

    def make(model: Model) -> Path:
        path = tmp_path / f"{model.name}.gguf"
        convert(write_checkpoint(model, tmp_path / model.name), path, "f32")
        return path

    yield make
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as F32 GGUF."""
    path = tmp_path_factory.mktemp("tiny") / "phi3-tiny-f32.gguf"
    convert(TINY, path, "f32")
    return path
