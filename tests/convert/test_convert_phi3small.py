"""Phi-3-small's config.json, keys, and the order of the rows of its fused projections."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.convert import convert, quantize
from phiquant.convert.architectures import settings_of
from phiquant.convert.dummies import dummy_tokens
from phiquant.convert.phi3small import Settings
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError
from phiquant.gguf import GGMLType, GGUFFile

SMALL = {
    "architectures": ["Phi3SmallForCausalLM"],
    "model_type": "phi3small",
    "vocab_size": 100352,
    "hidden_size": 4096,
    "ff_intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
}
LONG = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 8192,
    "rope_scaling": {
        "type": "su",
        "long_factor": [1.0 + i for i in range(64)],
        "short_factor": [1.0] * 64,
        "long_mscale": 1.2,
        "short_mscale": 1.1,
    },
}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key.removeprefix("phi3small."): entry.value for entry in Settings.from_config(config).entries()}


def test_phi_3_small_8k() -> None:
    found = keys(SMALL)
    assert found.pop("attention.block_sparse.layers").tolist() == [True, False] * 16
    assert found == {
        "context_length": 8192,
        "rope.scaling.original_context_length": 8192,
        "embedding_length": 4096,
        "feed_forward_length": 14336,
        "block_count": 32,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": 128,
        "rope.freq_base": 1e6,
        "embedding_scale": 10.0,
        "attention.scale": 1 / 128,
        "logit_scale": 1 / 8,
        "feed_forward.gate_limit": 20.0,
        "attention.block_sparse.block_size": 64,
        "attention.block_sparse.local_blocks": 16,
        "attention.block_sparse.vertical_stride": 8,
    }


def test_what_config_json_leaves_out_is_that_of_the_class() -> None:
    sizes = ("architectures", "vocab_size", "hidden_size", "ff_intermediate_size", "num_hidden_layers")
    kept = {key: SMALL[key] for key in (*sizes, "num_attention_heads", "num_key_value_heads")}
    assert Settings.from_config(kept) == Settings.from_config(SMALL)
    assert settings_of(SMALL) == Settings.from_config(SMALL)
    assert settings_of({**kept, "architectures": None, "model_type": "phi3small"}) == Settings.from_config(SMALL)


def test_phi_3_small_128k_has_a_factor_for_each_regime() -> None:
    found = keys({**SMALL, **LONG})
    assert found["rope.scaling.original_context_length"] == 8192
    assert found["phiquant.rope.attention_factor_short"] == 1.1
    assert found["phiquant.rope.attention_factor_long"] == 1.2
    inside = {**LONG["rope_scaling"], "original_max_position_embeddings": 8192}  # type: ignore[dict-item]
    assert keys({**SMALL, **LONG, "rope_scaling": inside}).keys() == found.keys()
    made = Settings.from_config({**SMALL, **LONG}).constants()
    assert [len(values) for values in made.values()] == [64, 64]


def test_without_mscales_the_factor_is_derived() -> None:
    scaling = {k: v for k, v in LONG["rope_scaling"].items() if "mscale" not in k}  # type: ignore[attr-defined]
    found = keys({**SMALL, **LONG, "rope_scaling": scaling})
    assert (
        found["phiquant.rope.attention_factor_short"]
        == found["phiquant.rope.attention_factor_long"]
        == pytest.approx(math.sqrt(17 / 13))
    )


def test_scalings() -> None:
    assert keys({**SMALL, "mup_use_scaling": False})["attention.scale"] == pytest.approx(128**-0.5)
    assert keys({**SMALL, "mup_attn_multiplier": 2.0})["attention.scale"] == 1 / 64
    for none in (None, 0, 0.0):
        found = keys({**SMALL, "mup_embedding_multiplier": none, "mup_width_multiplier": none})
        assert (found["embedding_scale"], found["logit_scale"]) == (1.0, 1.0)


def test_every_third_layer_is_dense_counted_from_the_first() -> None:
    config = {**SMALL, "num_hidden_layers": 7, "dense_attention_every_n_layers": 3}
    assert Settings.from_config(config).sparse_layers == (True, True, False, True, True, False, True)
    assert not any(Settings.from_config({**config, "dense_attention_every_n_layers": 1}).sparse_layers)
    assert all(Settings.from_config({**config, "dense_attention_every_n_layers": None}).sparse_layers)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"gegelu_limit": None}, "gegelu_limit None"),
        ({"rope_position_scale": 2.0}, "rope_position_scale 2.0"),
        ({"blocksparse_homo_head_pattern": True}, "homo_head_pattern"),
        ({"blocksparse_vert_stride": 64}, "blocksparse_vert_stride 64 is not supported for 32 heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
    ],
)
def test_what_no_released_model_has_is_unsupported(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        Settings.from_config({**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 4097}, "no even multiple"),
        ({"hidden_size": 32 * 15}, "no even multiple"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"ff_intermediate_size": None}, "lacks ff_intermediate_size"),
        ({"gegelu_limit": -1}, "gegelu_limit"),
        ({"mup_width_multiplier": -8}, "mup_width_multiplier"),
        ({"mup_embedding_multiplier": True}, "mup_embedding_multiplier"),
        ({"dense_attention_every_n_layers": 0}, "dense_attention_every_n_layers"),
        ({"blocksparse_block_size": 0}, "blocksparse_block_size"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        Settings.from_config({**SMALL, **changes})


values = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**40)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=3)
)


@given(changes=st.dictionaries(st.sampled_from([*SMALL, *LONG]), values, min_size=1))
@settings(max_examples=300)
def test_any_config_gives_settings_or_a_sentence(changes: dict[str, Any]) -> None:
    try:
        found = Settings.from_config({**SMALL, **changes})
    except PhiquantError:
        return
    assert found.hidden_size == found.heads * found.head_size
    assert len(found.sparse_layers) == found.layers


# A checkpoint of its own: 4 heads of 64 channels, 2 key/value heads.
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV = 32064, 256, 512, 2, 4, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ff_intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "blocksparse_vert_stride": 4,
    "eos_token_id": 32000,
}


def tensors() -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.final_layernorm": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm": (HIDDEN,),
            prefix + "self_attn.query_key_value": (HIDDEN + 2 * KV * HIDDEN // HEADS, HIDDEN),
            prefix + "self_attn.dense": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm": (HIDDEN,),
            prefix + "mlp.up_proj": (2 * FFN, HIDDEN),
            prefix + "mlp.down_proj": (HIDDEN, FFN),
        }
    made = {"model.embed_tokens.weight": ("BF16", rng.normal(0, 0.05, (VOCAB, HIDDEN)).astype(np.float32))}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = ("BF16", rng.normal(0, 0.05, shape).astype(np.float32))
        made[f"{name}.bias"] = ("BF16", rng.normal(0, 0.05, shape[:1]).astype(np.float32))
    return made


@pytest.fixture
def small(tmp_path: Path, make: Any, tiny: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        directory = tmp_path / "phi-3-small"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps({**SMALL, **SIZES, **changes}))
        for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
            shutil.copyfile(tiny / name, directory / name)
        (directory / "model.safetensors").write_bytes(make.bytes(tensors()))
        return directory

    return write


def test_rows_are_put_in_order_and_numbers_stay(small: Callable[..., Path], tmp_path: Path) -> None:
    convert(small(), tmp_path / "model.gguf", "bf16")
    size, stored = HIDDEN // HEADS, {name: value.astype("<f4") for name, (_, value) in tensors().items()}

    def halves(x: np.ndarray) -> np.ndarray:
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)

    def by_kind(x: np.ndarray) -> np.ndarray:
        groups = x.reshape(KV, HEADS // KV + 2, size, *x.shape[1:])
        parts = (groups[:, : HEADS // KV], groups[:, HEADS // KV], groups[:, HEADS // KV + 1])
        return np.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])

    with GGUFFile.open(tmp_path / "model.gguf") as file:
        for layer in range(LAYERS):
            for end in ("weight", "bias"):
                for ours, theirs, order in (
                    ("attn_qkv", "self_attn.query_key_value", by_kind),
                    ("ffn_up", "mlp.up_proj", lambda x: np.concatenate([x[0::2], x[1::2]])),
                    ("ffn_down", "mlp.down_proj", lambda x: x),
                    ("attn_output", "self_attn.dense", lambda x: x),
                    ("attn_norm", "input_layernorm", lambda x: x),
                ):
                    expected = halves(order(stored[f"model.layers.{layer}.{theirs}.{end}"]))
                    name = f"blk.{layer}.{ours}.{end}"
                    if end == "bias" or ours == "attn_norm":
                        assert file.tensors[name].type is GGMLType.F32
                        expected = expected.astype("<f4")
                    assert file.data(name).tobytes() == expected.tobytes(), name
        assert "output.weight" not in file.tensors


def test_dummy_tokens_are_of_the_type_unused(small: Callable[..., Path], tmp_path: Path) -> None:
    convert(small(dummy_token_indices=[7, 32000, 9]), tmp_path / "model.gguf", "bf16")
    with GGUFFile.open(tmp_path / "model.gguf") as file:
        types = file.require("tokenizer.ggml.token_type", np.ndarray)
        assert set(np.flatnonzero(types[:32011] == 5)) == {7, 9, 32000}
    for value, what in ((7, "is 7, not a list of ids"), ([7, 32064], "holds 32064, which is no id below 32064")):
        with pytest.raises(CheckpointError, match=what):
            convert(small(dummy_token_indices=value), tmp_path / "model.gguf", "bf16")


def test_the_released_models_dummies_are_known() -> None:
    ids = dummy_tokens(SMALL, 100352)
    assert len(ids) == 91
    assert not set(ids) & {100255, 100257, 100261, 100262, 100263, 100266}  # what texts and turns are made of
    assert dummy_tokens(SMALL, 32064) == dummy_tokens({"model_type": "phi3"}, 100352) == ()


def test_every_file_type_leaves_norms_and_biases_as_they_are(small: Callable[..., Path], tmp_path: Path) -> None:
    convert(small(), tmp_path / "model.gguf", "f32")
    with GGUFFile.open(tmp_path / "model.gguf") as file:
        vectors = {name: file.data(name).tobytes() for name, info in file.tensors.items() if len(info.shape) == 1}
    assert len(vectors) == 2 + LAYERS * 8
    for name in ("Q8_0", "Q4_K_M", "Q2_K", "Q5_0", "IQ4_XS", "MXFP4_MOE", "TQ2_0"):
        quantize(tmp_path / "model.gguf", tmp_path / "quantized.gguf", name)
        with GGUFFile.open(tmp_path / "quantized.gguf") as file:
            assert {name: file.data(name).tobytes() for name in vectors} == vectors
            assert file.tensors["blk.0.attn_qkv.weight"].type not in (GGMLType.F32, GGMLType.F16)
