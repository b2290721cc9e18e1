"""Whole checkpoints of Phi-2 with its kind of vocabulary, in all three styles: converted, quantized, and run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phiquant import LLM
from phiquant.convert import convert, quantize
from phiquant.gguf import GGMLType, GGUFFile, keys

pytestmark = pytest.mark.cpu

VOCABULARY, HIDDEN, HEADS, LAYERS = 1600, 256, 4, 2


def tensors(style: str) -> dict[str, np.ndarray]:
    """The same random numbers under the names of each style."""
    rng = np.random.default_rng(7)

    def linear(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype("<f4"), rng.normal(0, 0.3, rows).astype("<f4")

    def norm() -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(1, 0.1, HIDDEN).astype("<f4"), rng.normal(0, 0.1, HIDDEN).astype("<f4")

    embedding, last, output = {
        "phi": ("model.embed_tokens", "model.final_layernorm", "lm_head"),
        "msft": ("transformer.embd.wte", "lm_head.ln", "lm_head.linear"),
        "mixformer": ("layers.0.wte", f"layers.{LAYERS + 1}.ln", f"layers.{LAYERS + 1}.linear"),
    }[style]
    made = {f"{embedding}.weight": rng.normal(size=(VOCABULARY, HIDDEN)).astype("<f4")}
    pairs = {output: linear(VOCABULARY, HIDDEN), last: norm()}
    for layer in range(LAYERS):
        p = {
            "phi": f"model.layers.{layer}.",
            "msft": f"transformer.h.{layer}.",
            "mixformer": f"layers.{layer + 1}.",
        }[style]
        projections = [linear(HIDDEN, HIDDEN) for _ in range(3)]
        if style == "phi":
            pairs |= {f"{p}self_attn.{n}_proj": pair for n, pair in zip("qkv", projections, strict=True)}
        else:
            weights, biases = zip(*projections, strict=True)
            pairs[p + "mixer.Wqkv"] = np.concatenate(weights), np.concatenate(biases)
        pairs[p + ("self_attn.dense" if style == "phi" else "mixer.out_proj")] = linear(HIDDEN, HIDDEN)
        pairs[p + ("input_layernorm" if style == "phi" else "ln")] = norm()
        pairs |= {p + "mlp.fc1": linear(4 * HIDDEN, HIDDEN), p + "mlp.fc2": linear(HIDDEN, 4 * HIDDEN)}
    for name, (weight, bias) in pairs.items():
        made |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return made


CONFIGS: dict[str, dict[str, Any]] = {
    "phi": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
    },
    "msft": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi-msft",
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_layer": LAYERS,
        "n_positions": 2048,
        "rotary_dim": 32,
    },
}
CONFIGS["mixformer"] = {
    **CONFIGS["msft"],
    "architectures": ["MixFormerSequentialForCausalLM"],
    "model_type": "mixformer-sequential",
}


@pytest.fixture
def checkpoint(byte_level: Callable[[str], dict[str, Any]], tmp_path: Path) -> Callable[[str], Path]:
    def make(style: str) -> Path:
        directory = tmp_path / f"phi-2-{style}"
        directory.mkdir()
        tokenizer = {"tokenizer_class": "CodeGenTokenizer"}
        tokenizer |= {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
        (directory / "config.json").write_text(json.dumps({**CONFIGS[style], "vocab_size": VOCABULARY}))
        (directory / "tokenizer.json").write_text(json.dumps(byte_level("phi-2")))
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        save_file(tensors(style), directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


def test_all_styles_give_the_same_logits(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """To the bit: rows of a matrix do not depend on those beside them."""
    found = {}
    for style in CONFIGS:
        path = convert(checkpoint(style), tmp_path / f"{style}.gguf", "f32", quiet=True).plan.path
        with LLM.load(path) as llm:
            found[style] = llm.logits(list(range(40)))
    assert found["phi"].std() > 0.1
    assert np.array_equal(found["phi"], found["msft"])
    assert np.array_equal(found["phi"], found["mixformer"])


def test_a_quantized_one_says_something(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = quantize(checkpoint("phi"), tmp_path / "q.gguf", "Q4_K_M", quiet=True).plan.path
    with GGUFFile.open(path) as file:
        assert file.get(keys.ADD_BOS, bool, True) is False
        kinds = {len(t.shape): set() for t in file.tensors.values()}
        for tensor in file.tensors.values():
            kinds[len(tensor.shape)].add(tensor.type)
    assert kinds[1] == {GGMLType.F32}
    assert kinds[2] == {GGMLType.Q4_K, GGMLType.Q6_K}
    with LLM.load(path) as llm:
        ids = llm.tokenize("def f(x):\n    return x")
        assert llm.detokenize(ids) == "def f(x):\n    return x"
        made = llm.generate("def f(x):\n    return x", max_tokens=8, temperature=0, ignore_eos=True)
        assert len(made.ids) == 8
        assert made.usage.prompt_tokens == len(ids)
