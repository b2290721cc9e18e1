"""config.json of Llama and Mistral, keys, tensor names and shapes, and where rows go."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.convert.architectures import settings_of
from phiquant.convert.llama import Settings
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 2047,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG, SHORT = [1.0 + i for i in range(48)], [1.0] * 48
LONGROPE = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key: entry.value for entry in settings_of(config).entries()}


BASE = {
    "llama.block_count": 32,
    "llama.context_length": 4096,
    "llama.embedding_length": 3072,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 32,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 32064,
    "llama.rope.dimension_count": 96,
}


def test_a_llama_has_no_window_whatever_it_says() -> None:
    assert keys(LLAMA) == BASE


def test_a_mistral_has_one() -> None:
    window = "llama.attention.sliding_window"
    assert keys(MISTRAL) == {**BASE, window: 2047}
    assert window not in keys({**MISTRAL, "sliding_window": None})
    without = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert keys(without)[window] == 4096
    few = {name: value for name, value in MISTRAL.items() if name != "num_key_value_heads"}
    assert keys(few)["llama.attention.head_count_kv"] == 8


def test_a_size_of_heads_that_is_given_is_written() -> None:
    found = keys({**LLAMA, "head_dim": 128, "num_attention_heads": 30, "num_key_value_heads": 10})
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 128
    assert found["llama.rope.dimension_count"] == 128


def test_scalings() -> None:
    linear = keys({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (linear["llama.rope.scaling.type"], linear["llama.rope.scaling.factor"]) == ("linear", 2.0)
    long = {**LLAMA, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64, "max_position_embeddings": 4096}
    assert keys(long) == {
        **BASE,
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": pytest.approx(np.sqrt(2.0)),
    }
    constants = settings_of(long).constants()
    assert list(constants) == ["rope_factors_long.weight", "rope_factors_short.weight"]
    assert constants["rope_factors_long.weight"].tolist() == LONG
    assert settings_of(LLAMA).constants() == {}


def test_factors_of_llama_3() -> None:
    made = settings_of({**LLAMA, "rope_scaling": LLAMA3, "rope_theta": 500000.0}).constants()["rope_freqs.weight"]
    assert made.dtype == np.dtype("<f4")
    length = 2 * np.pi * 500000.0 ** (np.arange(48) / 48)
    assert (made[length < 2048] == 1).all()
    assert (made[length > 8192] == 8).all()
    between = (length > 2048) & (length < 8192)
    smooth = (8192 / length[between] - 1) / 3
    assert between.sum() > 2
    assert np.allclose(made[between], 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5)
    assert (np.diff(made) >= 0).all()


def stored(config: Settings) -> dict[str, StoredTensor]:
    q, kv, hidden, ffn = 3072, config.kv_heads * config.head_size, 3072, 8192
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32064, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (32064, hidden)
    for n in range(config.layers):
        p = f"model.layers.{n}."
        matrices = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in matrices.items():
            shapes[f"{p}{name}.weight"] = shape
            if config.attention_bias and "attn" in name:
                shapes[f"{p}{name}.bias"] = shape[:1]
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
    return {
        name: StoredTensor(name, "F16", shape, Path("model.safetensors"), 0, 2 * int(np.prod(shape)))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("biased", [False, True])
def test_names_and_shapes(biased: bool) -> None:
    config = Settings.from_config({**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 8, "attention_bias": biased})
    there = stored(config)
    made = config.assemble(there)
    assert {tensor.stored.name for tensor in made.values()} == set(there)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")
    expected = {f"blk.{n}.{part}.weight" for n in range(2) for part in parts}
    expected |= {f"blk.{n}.{part}.bias" for n in range(2) for part in parts[:4] if biased}
    assert set(made) == {*expected, "token_embd.weight", "output.weight", "output_norm.weight"}
    assert made["blk.1.attn_k.weight"].shape == (768, 3072)
    assert made["blk.1.ffn_gate.weight"].stored.name == "model.layers.1.mlp.gate_proj.weight"
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        config.assemble({name: t for name, t in there.items() if name != "model.layers.1.mlp.up_proj.weight"})
    extra = StoredTensor("model.layers.0.self_attn.q_norm.weight", "F16", (96,), Path("x"), 0, 192)
    with pytest.raises(CheckpointError, match="has no place in a Llama of 2 layers"):
        config.assemble({**there, extra.name: extra})


@pytest.mark.parametrize("name", ["attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"])
def test_rows_of_queries_and_keys_come_in_pairs(name: str) -> None:
    config = Settings.from_config({**LLAMA, "num_hidden_layers": 1, "num_key_value_heads": 8, "attention_bias": True})
    made = config.assemble(stored(config))[f"blk.0.{name}"]
    rows, size = np.empty((made.shape[0], made.rows[0].row_bytes), np.uint8), made.rows[0].row_bytes

    def read(tensor: StoredTensor, first: int, target: np.ndarray) -> None:
        """Rows of which every byte pair is the row's number."""
        assert tensor is made.stored
        numbers = np.arange(tensor.shape[0], dtype="<u2").repeat(size // 2)
        target[:] = numbers.view(np.uint8)[first : first + target.size]

    made.read_into(read, 0, rows.reshape(-1))
    order = rows.view("<u2")[:, 0].tolist()
    assert (rows.view("<u2") == rows.view("<u2")[:, :1]).all()
    assert sorted(order) == list(range(made.shape[0]))
    assert order[:6] == [0, 48, 1, 49, 2, 50]
    assert order[94:99] == [47, 95, 96, 144, 97]


def test_the_rest_is_as_it_is_stored() -> None:
    config = Settings.from_config({**LLAMA, "num_hidden_layers": 1})
    for name, made in config.assemble(stored(config)).items():
        if "attn_q" not in name and "attn_k" not in name:
            assert len(made.rows) == 1, name


def test_a_tied_model_uses_its_embedding() -> None:
    config = Settings.from_config({**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True})
    assert "output.weight" not in config.assemble(stored(config))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "su"}}, "'su' is not supported"),
        ({"partial_rotary_factor": 0.75}, "rotates whole heads"),
    ],
)
def test_what_no_llama_has_is_unsupported(changes: dict[str, Any], what: str) -> None:
    for config in (LLAMA, MISTRAL):
        with pytest.raises(UnsupportedError, match=what):
            settings_of({**config, **changes})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 3073}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 95}, "95 channels of a head"),
        ({"num_hidden_layers": 2**23}, "num_hidden_layers"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "not below high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": None}}, "lacks high_freq_factor"),
        ({"rope_scaling": {**LONGROPE, "long_factor": LONG[:-1]}}, "long_factor has 47 entries"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        settings_of({**LLAMA, **changes})


def test_a_window_of_a_mistral_is_a_number() -> None:
    with pytest.raises(CheckpointError, match="sliding_window is -1"):
        settings_of({**MISTRAL, "sliding_window": -1})


def test_a_config_without_a_class_is_read_by_its_type() -> None:
    for config in (LLAMA, MISTRAL):
        without = {name: value for name, value in config.items() if name != "architectures"}
        assert settings_of(without) == settings_of(config)


values = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=3)
scalings = st.none() | st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "longrope", "yarn"])},
    optional=dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "long_factor"), values),
)


@given(
    base=st.sampled_from([LLAMA, MISTRAL]),
    changes=st.dictionaries(st.sampled_from([*LLAMA, "head_dim", "mlp_bias"]), values),
    scaling=scalings,
)
@settings(max_examples=300)
def test_any_config_gives_settings_or_a_sentence(base: dict[str, Any], changes: dict[str, Any], scaling: Any) -> None:
    try:
        found = settings_of({**base, "rope_scaling": scaling, **changes, "architectures": base["architectures"]})
    except PhiquantError:
        return
    assert isinstance(found, Settings)
    assert found.head_size % 2 == 0
    assert all(np.isfinite(values).all() for values in found.constants().values())
