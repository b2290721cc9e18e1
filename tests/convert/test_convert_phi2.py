"""config.json of Phi-1, Phi-1.5 and Phi-2 in their three styles, keys, tensor names and shapes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.convert.architectures import settings_of
from phiquant.convert.phi2 import Settings
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError

PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
}
MSFT = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi-msft",
    "vocab_size": 51200,
    "n_embd": 2560,
    "n_head": 32,
    "n_head_kv": None,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 2048,
    "rotary_dim": 32,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
MIXFORMER = {**MSFT, "architectures": ["MixFormerSequentialForCausalLM"], "model_type": "mixformer-sequential"}


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key: entry.value for entry in settings_of(config).entries()}


def stored(config: dict[str, Any], style: str) -> dict[str, StoredTensor]:
    """Of what a checkpoint of the style holds, written down by hand."""
    layers, vocabulary = config.get("n_layer") or config["num_hidden_layers"], config["vocab_size"]
    hidden = config.get("n_embd") or config["hidden_size"]
    ffn = config.get("intermediate_size", 4 * hidden)
    embedding, norm, output = {
        "phi": ("model.embed_tokens", "model.final_layernorm", "lm_head"),
        "msft": ("transformer.embd.wte", "lm_head.ln", "lm_head.linear"),
        "mixformer": ("layers.0.wte", f"layers.{layers + 1}.ln", f"layers.{layers + 1}.linear"),
    }[style]
    shapes: dict[str, tuple[int, ...]] = {norm: (hidden,), output: (vocabulary, hidden)}
    for n in range(layers):
        if style == "phi":
            p = f"model.layers.{n}."
            shapes |= {p + f"self_attn.{part}": (hidden, hidden) for part in ("q_proj", "k_proj", "v_proj", "dense")}
            shapes[p + "input_layernorm"] = (hidden,)
        else:
            p = f"transformer.h.{n}." if style == "msft" else f"layers.{n + 1}."
            shapes |= {p + "mixer.Wqkv": (3 * hidden, hidden), p + "mixer.out_proj": (hidden, hidden)}
            shapes[p + "ln"] = (hidden,)
        shapes |= {p + "mlp.fc1": (ffn, hidden), p + "mlp.fc2": (hidden, ffn)}
    every = {f"{embedding}.weight": (vocabulary, hidden)}
    for name, shape in shapes.items():
        every |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: StoredTensor(name, "F16", shape, Path("model.safetensors"), 0, 2) for name, shape in every.items()}


def test_phi_2() -> None:
    assert keys(PHI_2) == {
        "phi2.context_length": 2048,
        "phi2.embedding_length": 2560,
        "phi2.feed_forward_length": 10240,
        "phi2.block_count": 32,
        "phi2.attention.head_count": 32,
        "phi2.attention.head_count_kv": 32,
        "phi2.attention.layer_norm_epsilon": 1e-5,
        "phi2.rope.dimension_count": 32,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize("config", [MSFT, MIXFORMER], ids=["msft", "mixformer"])
def test_the_first_releases_say_the_same(config: dict[str, Any]) -> None:
    assert keys(config) == keys(PHI_2)


def test_phi_1_rotates_half_of_a_head() -> None:
    phi_1 = {**PHI_2, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    for moved in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        found = Settings.from_config({**phi_1, "partial_rotary_factor": None, **moved})
        assert (found.head_size, found.rotary_dimensions) == (64, 32)


def test_a_length_of_its_own_and_grouped_heads_are_told_as_they_are() -> None:
    found = keys({**PHI_2, "intermediate_size": 9000, "num_key_value_heads": 8, "rope_theta": 5e4})
    assert found["phi2.feed_forward_length"] == 9000
    assert found["phi2.attention.head_count_kv"] == 8
    assert found["phi2.rope.freq_base"] == 5e4


def test_a_config_without_a_class_is_read_by_its_type() -> None:
    for config, style in ((PHI_2, "phi"), (MSFT, "msft"), (MIXFORMER, "mixformer")):
        for drop in ("architectures", "model_type"):
            rest = {name: value for name, value in config.items() if name != drop}
            if style == "msft" and drop == "model_type":
                rest["architectures"] = ["PhiForCausalLM"]
            found = settings_of(rest)
            assert isinstance(found, Settings)
            assert found.style == style


@pytest.mark.parametrize(
    ("config", "style"), [(PHI_2, "phi"), (MSFT, "msft"), (MIXFORMER, "mixformer")], ids=lambda value: str(value)[:9]
)
def test_names_and_shapes(config: dict[str, Any], style: str) -> None:
    there = stored(config, style)
    made = settings_of(config).assemble(there)
    assert {tensor.stored.name for tensor in made.values()} == set(there)
    parts = ["attn_q", "attn_k", "attn_v"] if style == "phi" else ["attn_qkv"]
    parts += ["attn_norm", "attn_output", "ffn_up", "ffn_down"]
    biased = [f"blk.{n}.{part}" for n in range(32) for part in parts] + ["output", "output_norm"]
    assert set(made) == {"token_embd.weight", *(f"{name}.{end}" for name in biased for end in ("weight", "bias"))}
    assert made["blk.31.ffn_up.weight"].shape == (10240, 2560)
    assert made["blk.31.ffn_down.bias"].shape == (2560,)
    for name in ("blk.3.ffn_up.bias", "output.bias", "token_embd.weight"):
        absent = made[name].stored.name
        with pytest.raises(CheckpointError, match=f"lacks tensor {absent}"):
            settings_of(config).assemble({key: value for key, value in there.items() if key != absent})
    extra = StoredTensor("model.layers.0.self_attn.q_layernorm.weight", "F16", (80,), Path("x"), 0, 160)
    with pytest.raises(CheckpointError, match=r"q_layernorm\.weight' .* has no place in a Phi-2 of 32 layers"):
        settings_of(config).assemble({**there, extra.name: extra})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu"},
        {"activation_function": "relu"},
        {"qk_layernorm": True},
        {"tie_word_embeddings": True},
        {"head_dim": 64},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_what_no_phi_2_has_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(changes)).replace("rope_scaling", "rope type")):
        settings_of({**PHI_2, **changes})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 2561}, "not a multiple of 32 heads"),
        ({"num_key_value_heads": 5}, "not a multiple of 5 key and value heads"),
        ({"num_hidden_layers": 2**20}, "num_hidden_layers"),
        ({"partial_rotary_factor": 0.01}, "0 rotated channels"),
        ({"partial_rotary_factor": 0.39}, "31 rotated channels"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"vocab_size": True}, "vocab_size"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        settings_of({**PHI_2, **changes})


values = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=3)


@given(
    base=st.sampled_from([PHI_2, MSFT, MIXFORMER]),
    changes=st.dictionaries(st.sampled_from([*PHI_2, *MSFT, "head_dim"]), values, min_size=1),
)
@settings(max_examples=300)
def test_any_config_gives_settings_or_a_sentence(base: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        found = Settings.from_config({**base, **changes})
    except PhiquantError:
        return
    assert found.hidden_size == found.heads * found.head_size
    assert 0 < found.rotary_dimensions <= found.head_size
