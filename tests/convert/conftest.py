"""Small Phi-3 checkpoints, written by hand: any shape, dtype, number of shards."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
VOCABULARY = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "hidden_act": "silu",
}
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype("<f8")}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.qkv_proj.weight"] = (hidden + 2 * kv, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_up_proj.weight"] = (2 * ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def safetensors_bytes(tensors: Mapping[str, tuple[str, np.ndarray]]) -> bytes:
    """A safetensors file of name -> (dtype, values)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, values) in tensors.items():
        raw = values.astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def random_tensors(config: Mapping[str, Any], dtype: str, seed: int = 0) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {name: (dtype, rng.normal(0, 0.05, shape).astype(np.float32)) for name, shape in shapes_of(config).items()}


def write_checkpoint(
    directory: Path,
    *,
    dtype: str = "BF16",
    shards: int = 1,
    tensors: Mapping[str, tuple[str, np.ndarray]] | None = None,
    **changes: Any,
) -> Path:
    config = {**CONFIG, **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in VOCABULARY:
        shutil.copyfile(TINY / name, directory / name)
    tensors = dict(random_tensors(config, dtype) if tensors is None else tensors)
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return directory
    where = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        where |= dict.fromkeys(part, file)
        (directory / file).write_bytes(safetensors_bytes(part))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint below tmp_path: `checkpoint("phi3-name", dtype=..., shards=..., hidden_size=...)`."""
    return lambda name="phi3-small", **changes: write_checkpoint(tmp_path / name, **changes)


@pytest.fixture
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def make() -> Any:
    """The builders of this file, for tests that need the parts."""
    import types

    return types.SimpleNamespace(
        bytes=safetensors_bytes, tensors=random_tensors, config=CONFIG, checkpoint=write_checkpoint, shapes=shapes_of
    )
