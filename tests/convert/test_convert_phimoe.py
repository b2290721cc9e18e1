"""PhiMoE's config.json in both styles, its keys and names, and experts stacked from both layouts of a checkpoint."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from phiquant.convert import convert, quantize
from phiquant.convert.architectures import settings_of
from phiquant.convert.phimoe import Settings
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError
from phiquant.gguf import GGMLType, GGUFFile

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
MSCALE = 1.243163121016122
MOE = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": 131072,
    "hidden_act": "silu",
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}
SCALING = {
    "long_factor": [1.0 + i for i in range(64)],
    "short_factor": [1.0] * 64,
    "long_mscale": MSCALE,
    "short_mscale": MSCALE,
    "original_max_position_embeddings": 4096,
}
OLD = {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **SCALING}}
NEW = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "longrope", **SCALING}}
TINY_MOE = {
    **MOE,
    "intermediate_size": 448,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key: entry.value for entry in settings_of(config).entries()}


def test_phi_35_moe() -> None:
    assert keys({**MOE, **OLD}) == {
        "phimoe.context_length": 131072,
        "phimoe.rope.scaling.original_context_length": 4096,
        "phimoe.embedding_length": 4096,
        "phimoe.feed_forward_length": 6400,
        "phimoe.block_count": 32,
        "phimoe.attention.head_count": 32,
        "phimoe.attention.head_count_kv": 8,
        "phimoe.attention.layer_norm_rms_epsilon": 1e-5,
        "phimoe.rope.dimension_count": 128,
        "phimoe.rope.freq_base": 10000.0,
        "phimoe.attention.sliding_window": 131072,
        "phimoe.expert_used_count": 2,
        "phimoe.expert_count": 16,
        "phimoe.rope.scaling.attn_factor": math.sqrt(17 / 12),
        "phiquant.rope.attention_factor_short": MSCALE,
        "phiquant.rope.attention_factor_long": MSCALE,
        "phiquant.norm": "layer",
        "phiquant.router": "sparsemixer",
        "phiquant.router.jitter": 0.01,
    }


def test_phi_tiny_moe_tells_the_size_of_its_heads() -> None:
    found = keys(TINY_MOE)
    assert found["phimoe.attention.key_length"] == found["phimoe.attention.value_length"] == 128
    assert found["phimoe.rope.dimension_count"] == 128
    assert "phiquant.rope.attention_factor_long" not in found
    assert "phimoe.attention.key_length" not in keys({**MOE, **OLD, "head_dim": 128})


@pytest.mark.parametrize("name", ["PhiMoEForCausalLM", "PhimoeForCausalLM"])
def test_both_spellings_and_both_styles_say_the_same(name: str) -> None:
    assert settings_of({**MOE, **NEW, "architectures": [name]}) == Settings.from_config({**MOE, **OLD})
    unnamed = {key: value for key, value in MOE.items() if key != "architectures"}
    assert settings_of({**unnamed, **OLD}) == Settings.from_config({**MOE, **OLD})


@pytest.mark.parametrize(
    ("changes", "error", "what"),
    [
        ({"num_experts_per_tok": 1}, UnsupportedError, "num_experts_per_tok is 1"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": True}, UnsupportedError, "tie_word_embeddings"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"num_local_experts": 0}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 1 << 20}, CheckpointError, "num_local_experts"),
        ({"num_key_value_heads": 5}, CheckpointError, "num_key_value_heads 5"),
        ({"num_attention_heads": 24}, CheckpointError, "hidden_size 4096 is not a multiple"),
        ({"head_dim": 63}, CheckpointError, "a head of 63 channels"),
        ({"attention_bias": 1}, CheckpointError, "attention_bias"),
        ({"router_jitter_noise": -1}, CheckpointError, "router_jitter_noise"),
        ({"sliding_window": -5}, CheckpointError, "sliding_window"),
        (
            {"rope_scaling": {"type": "longrope", **SCALING, "short_mscale": None}},
            CheckpointError,
            "lacks short_mscale",
        ),
        ({"rope_scaling": {"type": "longrope", **SCALING, "long_mscale": "x"}}, CheckpointError, "long_mscale"),
        ({"rope_scaling": {"type": "longrope", **SCALING, "long_factor": [1.0]}}, CheckpointError, "long_factor"),
        ({"rope_scaling": {"type": "dynamic"}}, UnsupportedError, "rope type 'dynamic'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: type[PhiquantError], what: str) -> None:
    with pytest.raises(error, match=what):
        settings_of({**MOE, **OLD, **changes})


# A small one: 3 experts of 2 layers, heads that are together wider than the embedding.
SMALL = {
    **MOE,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 3,
    "rope_theta": 10000.0,
}


def weights(dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """By the released checkpoint's names."""
    rng = np.random.default_rng(4)
    hidden, ffn = 64, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32064, hidden)}

    def linear(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    linear("lm_head", 32064, hidden)
    linear("model.norm", hidden)
    for n in range(2):
        layer = f"model.layers.{n}."
        for name, rows in (("q", 128), ("k", 64), ("v", 64)):
            linear(f"{layer}self_attn.{name}_proj", rows, hidden)
        linear(f"{layer}self_attn.o_proj", hidden, 128)
        linear(f"{layer}input_layernorm", hidden)
        linear(f"{layer}post_attention_layernorm", hidden)
        shapes[f"{layer}block_sparse_moe.gate.weight"] = (3, hidden)
        for expert in range(3):
            for part, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
                shapes[f"{layer}block_sparse_moe.experts.{expert}.{part}.weight"] = shape
    return {name: rng.normal(0, 0.05, shape).astype(dtype) for name, shape in shapes.items()}


def experts(tensors: dict[str, np.ndarray], layer: int, part: str) -> np.ndarray:
    return np.stack([tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight"] for e in range(3)])


def resaved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In the layout of transformers 5."""
    made = {
        name.replace("block_sparse_moe.gate", "mlp.router"): value
        for name, value in tensors.items()
        if ".experts." not in name
    }
    for n in range(2):
        both = [experts(tensors, n, "w1"), experts(tensors, n, "w3")]
        made[f"model.layers.{n}.mlp.experts.gate_up_proj"] = np.concatenate(both, axis=1)
        made[f"model.layers.{n}.mlp.experts.down_proj"] = experts(tensors, n, "w2")
    return made


def write(directory: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMALL, **changes}))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(TINY / name, directory / name)
    return directory


def test_experts_are_stacked_and_all_else_keeps_its_bytes(tmp_path: Path) -> None:
    tensors = weights()
    path = convert(write(tmp_path / "moe", tensors), tmp_path / "moe.gguf", "bf16").plan.path
    with GGUFFile.open(path) as file:
        for n in range(2):
            for part, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                expected = experts(tensors, n, part)
                info = file.tensors[f"blk.{n}.ffn_{name}_exps.weight"]
                assert (info.shape, info.type) == (expected.shape, GGMLType.BF16)
                assert file.data(info.name).tobytes() == expected.tobytes()
            router = file.tensors[f"blk.{n}.ffn_gate_inp.weight"]
            assert (router.shape, router.type) == ((3, 64), GGMLType.F32)
            found = np.frombuffer(file.data(f"blk.{n}.attn_q.bias"), "<f4")
            assert (found == tensors[f"model.layers.{n}.self_attn.q_proj.bias"].astype(np.float32)).all()
        assert file.data("output.weight").tobytes() == tensors["lm_head.weight"].tobytes()
        assert file.fields["general.size_label"].value == "3x4.2M"  # 32064 x 128 and the rest, with one expert


@pytest.mark.parametrize("outtype", ["f32", "bf16", "Q4_0"])
def test_the_layout_of_transformers_5_gives_the_same_tensors(tmp_path: Path, outtype: str) -> None:
    tensors = weights()
    files = []
    for name, given in (("released", tensors), ("resaved", resaved(tensors))):
        source = write(tmp_path / name, given, architectures=["PhimoeForCausalLM"])
        files.append(quantize(source, tmp_path / f"{name}.gguf", outtype).plan.path)
    with GGUFFile.open(files[0]) as released, GGUFFile.open(files[1]) as again:
        assert list(released.tensors) == list(again.tensors)
        for name, info in released.tensors.items():
            assert again.tensors[name].type is info.type
            assert np.array_equal(released.data(name), again.data(name)), name


def test_models_without_biases(tmp_path: Path) -> None:
    tensors = {n: v for n, v in weights().items() if not n.endswith("bias") or "norm" in n}
    source = write(tmp_path / "moe", tensors, attention_bias=False, lm_head_bias=False)
    with GGUFFile.open(convert(source, tmp_path / "moe.gguf", "bf16").plan.path) as file:
        assert [n for n in file.tensors if n.endswith("bias") and "norm" not in n] == []


@pytest.mark.parametrize(
    ("drop", "extra", "what"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", None, r"lacks tensor .*layers\.1.*experts\.2\.w3"),
        ("model.layers.0.self_attn.o_proj.bias", None, "lacks tensor .*o_proj.bias"),
        (
            None,
            "model.layers.0.block_sparse_moe.experts.3.w1.weight",
            "has no place in a PhiMoEForCausalLM of 2 layers",
        ),
        (None, "model.layers.0.mlp.experts.down_proj", "has no place|lacks tensor"),
    ],
)
def test_experts_that_do_not_fit_are_named(tmp_path: Path, drop: str | None, extra: str | None, what: str) -> None:
    tensors = weights()
    if drop is not None:
        del tensors[drop]
    if extra is not None:
        tensors[extra] = np.zeros((32, 64), ml_dtypes.bfloat16)
    with pytest.raises(CheckpointError, match=what):
        convert(write(tmp_path / "moe", tensors), tmp_path / "moe.gguf", "bf16")


def test_experts_of_different_types_do_not_belong_together(tmp_path: Path) -> None:
    tensors = weights()
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name] = tensors[name].astype(np.float32)
    with pytest.raises(CheckpointError, match="belong together and are stored in different types"):
        convert(write(tmp_path / "moe", tensors), tmp_path / "moe.gguf", "bf16")
