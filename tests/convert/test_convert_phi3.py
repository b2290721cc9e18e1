"""config.json in all its styles, keys, tensor names and shapes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.convert.architectures import settings_of
from phiquant.convert.phi3 import Settings
from phiquant.convert.safetensors import read_header
from phiquant.errors import ArchitectureError, CheckpointError, PhiquantError, UnsupportedError

MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
}
LONG, SHORT = [1.0 + i for i in range(48)], [1.0] * 48
OLD = {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT}}
NEW = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT}}
FACTOR = math.sqrt(17 / 12)


def keys(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key: entry.value for entry in Settings.from_config(config).entries()}


def test_phi_35_mini() -> None:
    assert keys({**MINI, **OLD}) == {
        "phi3.context_length": 131072,
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.embedding_length": 3072,
        "phi3.feed_forward_length": 8192,
        "phi3.block_count": 32,
        "phi3.attention.head_count": 32,
        "phi3.attention.head_count_kv": 32,
        "phi3.attention.layer_norm_rms_epsilon": 1e-5,
        "phi3.rope.dimension_count": 96,
        "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 262144,
        "phi3.rope.scaling.attn_factor": FACTOR,
    }


def test_the_newer_style_says_the_same() -> None:
    assert Settings.from_config({**MINI, **OLD}) == Settings.from_config({**MINI, **NEW})
    inside = {**NEW["rope_parameters"], "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
    moved = {key: value for key, value in MINI.items() if key != "original_max_position_embeddings"}
    assert Settings.from_config({**MINI, **OLD}) == Settings.from_config({**moved, "rope_parameters": inside})


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_names_of_longrope(kind: str) -> None:
    scaling = {**OLD["rope_scaling"], "type": kind}  # type: ignore[dict-item]
    assert Settings.from_config({**MINI, "rope_scaling": scaling}) == Settings.from_config({**MINI, **OLD})


def test_attention_factor() -> None:
    def factor(**changes: Any) -> float | None:
        rope = {**OLD["rope_scaling"], **changes.pop("scaling", {})}  # type: ignore[dict-item]
        return Settings.from_config({**MINI, "rope_scaling": rope, **changes}).attention_factor

    assert factor() == pytest.approx(1.1902380714, abs=1e-10)
    assert factor(scaling={"attention_factor": 1.5}) == 1.5
    assert factor(scaling={"factor": 16.0}) == pytest.approx(math.sqrt(1 + math.log(16) / math.log(4096)))
    assert factor(max_position_embeddings=4096) == 1.0
    assert Settings.from_config(MINI).attention_factor is None


def test_partial_rotary_factor_in_either_place() -> None:
    phi4 = {**MINI, "num_attention_heads": 24, "num_key_value_heads": 8, **OLD}
    assert Settings.from_config({**phi4, "partial_rotary_factor": 0.75}).rotary_dimensions == 96
    rope = {**NEW["rope_parameters"], "partial_rotary_factor": 0.75}
    assert Settings.from_config({**phi4, "rope_scaling": None, "rope_parameters": rope}).rotary_dimensions == 96


def test_no_window_is_zero() -> None:
    assert keys({**MINI, "sliding_window": None})["phi3.attention.sliding_window"] == 0


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "x" * 500, None, 3])
def test_unknown_architectures_are_named_with_the_known(name: Any) -> None:
    with pytest.raises(ArchitectureError, match="known are Phi3ForCausalLM") as caught:
        settings_of({**MINI, "architectures": [name]})
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize(
    ("name", "kind", "lost"),
    [
        ("Phi3VForCausalLM", "phi3_v", "image"),
        ("Phi4MMForCausalLM", "phi4mm", "audio"),
        ("Phi4MultimodalForCausalLM", "phi4_multimodal", "audio"),
        ("Phi4FlashForCausalLM", "phi4flash", "state"),
    ],
)
def test_siblings_are_refused_with_what_would_be_lost(name: str, kind: str, lost: str) -> None:
    for said in ({"architectures": [name]}, {"architectures": None, "model_type": kind}):
        with pytest.raises(ArchitectureError, match=f"{name} is not supported yet: its .*{lost}.* planned"):
            settings_of({**MINI, **said})


def test_a_config_without_a_class_is_read_by_its_type() -> None:
    config = {name: value for name, value in MINI.items() if name != "architectures"}
    assert settings_of({**config, "model_type": "phi3"}) == Settings.from_config(MINI)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -3072}, "hidden_size"),
        ({"hidden_size": 3072.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 2**23}, "from 1 to 4,096"),
        ({"vocab_size": 2**23}, "from 1 to 1,048,576"),
        ({"hidden_size": 3073}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"vocab_size": []}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.001}, "channels of a head"),
        ({"partial_rotary_factor": 0.99}, "channels of a head"),
        ({"rope_scaling": 7}, "rope_parameters or rope_scaling"),
        ({"rope_scaling": {"type": "longrope"}}, "long_factor is not a list"),
        ({"rope_scaling": {**OLD["rope_scaling"], "long_factor": LONG[:-1]}}, "long_factor has 47 entries"),  # type: ignore[dict-item]
        ({"rope_scaling": {**OLD["rope_scaling"], "short_factor": [*SHORT[:-1], None]}}, "short_factor holds None"),  # type: ignore[dict-item]
        ({"rope_scaling": {**OLD["rope_scaling"], "short_factor": [*SHORT[:-1], 0]}}, "short_factor holds 0"),  # type: ignore[dict-item]
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        Settings.from_config({**MINI, **changes})


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"head_dim": 128}, {"rope_scaling": {"type": "linear"}}])
def test_what_gguf_cannot_say_is_unsupported(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        Settings.from_config({**MINI, **changes})


values = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**40)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=3)
)


@given(
    changes=st.dictionaries(
        st.sampled_from([*MINI, *OLD, "head_dim", "partial_rotary_factor", "hidden_act"]), values, min_size=1
    )
)
@settings(max_examples=500)
def test_any_config_gives_settings_or_a_sentence(changes: dict[str, Any]) -> None:
    try:
        found = Settings.from_config({**MINI, **changes})
    except PhiquantError:
        return
    assert found.hidden_size == found.heads * found.head_size
    assert 0 < found.rotary_dimensions <= found.head_size


def test_names_and_shapes(checkpoint: Callable[..., Path], make: Any) -> None:
    directory = checkpoint(tie_word_embeddings=False)
    config = {**make.config, "tie_word_embeddings": False}
    stored = read_header(directory / "model.safetensors")

    def names_of(changes: dict[str, Any], tensors: dict[str, Any]) -> dict[str, str]:
        made = Settings.from_config({**config, **changes}).assemble(tensors)
        assert all(len(a.rows) == 1 and a.shape == a.stored.shape for a in made.values())
        return {a.stored.name: name for name, a in made.items()}

    names = names_of({}, stored)
    assert names["lm_head.weight"] == "output.weight"
    assert names["model.layers.1.mlp.gate_up_proj.weight"] == "blk.1.ffn_up.weight"
    assert names["model.layers.0.self_attn.qkv_proj.weight"] == "blk.0.attn_qkv.weight"
    assert len(set(names.values())) == len(stored)

    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": stored["model.norm.weight"]}
    assert names_of({}, {**stored, **rotary}) == names
    tied = names_of({"tie_word_embeddings": True}, stored)
    assert "output.weight" not in tied.values()

    with pytest.raises(CheckpointError, match="has no place"):
        names_of({}, {**stored, "model.extra": stored["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"has shape \[64\], config\.json asks for \[32064, 64\]"):
        names_of({}, {**stored, "lm_head.weight": stored["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        names_of({}, {name: tensor for name, tensor in stored.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="has no place in a Phi3ForCausalLM of 1 layers"):
        names_of({"num_hidden_layers": 1}, stored)
