"""PhiMoE's hyperparameters, from files of the `gguf` package: llama.cpp's and ours; what makes no model is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from phiquant.arch import names
from phiquant.arch.phimoe import PhiMoEConfig
from phiquant.errors import GGUFError, UnsupportedError

from .small_file import F32, STRING, U32, SmallFile

# 4 query heads and 2 key/value heads of 8 channels, together narrower than the embedding; 5 experts.
VOCAB, EMBEDDING, HIDDEN, BLOCKS, EXPERTS, HEAD = 40, 64, 24, 2, 5, 8
OURS = {
    "phiquant.norm": ("layer", STRING),
    "phiquant.router": ("sparsemixer", STRING),
    "phiquant.router.jitter": (0.02, F32),
    "phiquant.rope.attention_factor_short": (1.25, F32),
    "phiquant.rope.attention_factor_long": (1.5, F32),
}


class Model(SmallFile):
    """A small PhiMoE file in the making, whose keys and tensors a test changes before it is written."""

    def __init__(self, *, head: int = HEAD, fused: bool = False) -> None:
        keys: dict[str, tuple[Any, Any]] = {
            "general.name": ("Tiny-MoE", STRING),
            "phimoe.context_length": (131072, U32),
            "phimoe.rope.scaling.original_context_length": (4096, U32),
            "phimoe.embedding_length": (EMBEDDING, U32),
            "phimoe.feed_forward_length": (HIDDEN, U32),
            "phimoe.block_count": (BLOCKS, U32),
            "phimoe.attention.head_count": (4, U32),
            "phimoe.attention.head_count_kv": (2, U32),
            "phimoe.attention.layer_norm_rms_epsilon": (1e-5, F32),
            "phimoe.rope.dimension_count": (head, U32),
            "phimoe.rope.freq_base": (250000.0, F32),
            "phimoe.attention.sliding_window": (2047, U32),
            "phimoe.rope.scaling.attn_factor": (1.125, F32),
            "phimoe.expert_used_count": (2, U32),
            "phimoe.expert_count": (EXPERTS, U32),
        }
        if 4 * head != EMBEDDING:
            keys |= {"phimoe.attention.key_length": (head, U32), "phimoe.attention.value_length": (head, U32)}
        super().__init__("phimoe", keys | OURS)
        self.tensors = {
            "rope_factors_long.weight": np.linspace(1, 4, head // 2, dtype=np.float32),
            "rope_factors_short.weight": np.ones(head // 2, np.float32),
            "token_embd.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
        }
        self.add("output", VOCAB, EMBEDDING)
        self.add("output_norm", EMBEDDING)
        for block in range(BLOCKS):
            prefix = f"blk.{block}."
            for norm in ("attn_norm", "ffn_norm"):
                self.add(prefix + norm, EMBEDDING)
            if fused:
                self.add(f"{prefix}attn_qkv", 8 * head, EMBEDDING)
            else:
                self.add(f"{prefix}attn_q", 4 * head, EMBEDDING)
                self.add(f"{prefix}attn_k", 2 * head, EMBEDDING)
                self.add(f"{prefix}attn_v", 2 * head, EMBEDDING)
            self.add(f"{prefix}attn_output", EMBEDDING, 4 * head)
            self.tensors |= {
                f"{prefix}ffn_gate_inp.weight": np.zeros((EXPERTS, EMBEDDING), np.float32),
                f"{prefix}ffn_gate_exps.weight": np.zeros((EXPERTS, HIDDEN, EMBEDDING), np.float16),
                f"{prefix}ffn_up_exps.weight": np.zeros((EXPERTS, HIDDEN, EMBEDDING), np.float16),
                f"{prefix}ffn_down_exps.weight": np.zeros((EXPERTS, EMBEDDING, HIDDEN), np.float16),
            }


@pytest.fixture
def model() -> Model:
    return Model()


def test_everything_is_read(model: Model, tmp_path: Path) -> None:
    assert model.load(tmp_path) == PhiMoEConfig(
        name="Tiny-MoE",
        vocab_size=VOCAB,
        context_length=131072,
        original_context_length=4096,
        embedding_length=EMBEDDING,
        feed_forward_length=HIDDEN,
        block_count=BLOCKS,
        head_count=4,
        head_count_kv=2,
        head_size=HEAD,
        expert_count=EXPERTS,
        rope_dimension_count=HEAD,
        rope_freq_base=250000.0,
        norm_epsilon=float(np.float32(1e-5)),
        sliding_window=2047,
        router_jitter=float(np.float32(0.02)),
        rope_attention_factor_short=1.25,
        rope_attention_factor_long=1.5,
        fused_qkv=False,
        attention_bias=True,
        output_bias=True,
        rope_factors_short=(1.0,) * 4,
        rope_factors_long=(1.0, 2.0, 3.0, 4.0),
        assumptions=(),
    )


def test_either_regime_has_its_own_factor(model: Model, tmp_path: Path) -> None:
    rotary = model.load(tmp_path).rotary
    assert (rotary.attention_factor_short, rotary.attention_factor_long) == (1.25, 1.5)
    assert (rotary.factors_short, rotary.factors_long) == ((1.0,) * 4, (1.0, 2.0, 3.0, 4.0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head", [HEAD, 16])
@pytest.mark.parametrize("dropped", [(), ("attn_",), ("output",), ("attn_", "output")])
def test_tensor_shapes_are_those_of_the_file(fused: bool, head: int, dropped: tuple[str, ...], tmp_path: Path) -> None:
    model = Model(head=head, fused=fused)
    for name in list(model.tensors):
        last = name.split(".")[-2]
        if name.endswith("bias") and last.startswith(dropped) and not last.endswith("norm"):
            model.drop(name)
    config = model.load(tmp_path)
    assert dict(config.tensor_shapes()) == {name: value.shape for name, value in model.tensors.items()}
    assert (config.head_size, config.fused_qkv) == (head, fused)
    assert (config.attention_bias, config.output_bias) == ("attn_" not in dropped, "output" not in dropped)


def test_what_files_of_llama_cpp_do_not_say_is_assumed_and_said(model: Model, tmp_path: Path) -> None:
    model.drop(*OURS)
    config = model.load(tmp_path)
    assert config.rope_attention_factor_short == config.rope_attention_factor_long == 1.243163121016122
    assert config.router_jitter == 0.01
    routing, factor = config.assumptions
    assert "sparsemixer with a jitter of 0.01" in routing
    assert "norms that subtract the mean" in routing
    assert "multiplied by 1.243163, as in Phi-3.5-MoE" in factor


def test_other_lengths_than_the_released_have_the_files_factor(model: Model, tmp_path: Path) -> None:
    model.drop(*OURS)
    model.keys["phimoe.context_length"] = (65536, U32)
    config = model.load(tmp_path)
    assert config.rope_attention_factor_short == config.rope_attention_factor_long == 1.125
    assert "multiplied by 1.125, as LongRoPE gives it; no released model" in config.assumptions[1]
    model.drop("phimoe.rope.scaling.attn_factor")
    assert model.load(tmp_path).rope_attention_factor_long == pytest.approx(
        math.sqrt(1 + math.log(16) / math.log(4096))
    )


def test_without_longrope_nothing_is_multiplied(model: Model, tmp_path: Path) -> None:
    model.drop(*OURS, "rope_factors_long.weight", "rope_factors_short.weight")
    config = model.load(tmp_path)
    assert (config.rope_attention_factor_short, config.rope_attention_factor_long) == (1.0, 1.0)
    assert len(config.assumptions) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("phiquant.norm", "rms"), ("phiquant.router", "softmax"), ("phimoe.rope.scaling.type", "yarn")]
)
def test_what_no_phimoe_is_computed_with_is_refused(model: Model, tmp_path: Path, key: str, value: str) -> None:
    model.keys[key] = (value, STRING)
    with pytest.raises(UnsupportedError, match=f"{key}.*'{value}'"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("phimoe.expert_used_count", 3, U32),
        ("phimoe.expert_used_count", 0, U32),
        ("phimoe.expert_count", 1, U32),
        ("phimoe.expert_count", 2000, U32),
        ("phimoe.attention.key_length", 0, U32),
        ("phimoe.attention.key_length", 2048, U32),
        ("phimoe.attention.value_length", 16, U32),
        ("phimoe.attention.head_count", 0, U32),
        ("phimoe.attention.head_count_kv", 3, U32),
        ("phimoe.rope.dimension_count", 10, U32),
        ("phimoe.attention.layer_norm_rms_epsilon", math.nan, F32),
        ("phiquant.router.jitter", 0.0, F32),
        ("phiquant.router.jitter", math.nan, F32),
        ("phiquant.rope.attention_factor_long", -1.0, F32),
        ("phiquant.rope.attention_factor_short", math.inf, F32),
    ],
)
def test_an_impossible_value_is_named(model: Model, tmp_path: Path, key: str, value: Any, kind: Any) -> None:
    model.keys[key] = (value, kind)
    with pytest.raises(GGUFError, match=f"'{key}'"):
        model.load(tmp_path)


def test_one_factor_alone_is_refused(model: Model, tmp_path: Path) -> None:
    model.drop("phiquant.rope.attention_factor_long")
    with pytest.raises(GGUFError, match="belong together"):
        model.load(tmp_path)


REQUIRED = [name for name in Model().tensors if name not in ("output.bias", "blk.0.attn_output.bias")]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_tensor_is_named(model: Model, tmp_path: Path, name: str) -> None:
    model.drop(name)
    with pytest.raises(GGUFError, match=f"'{name}' is missing"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", [name for name in Model().tensors if "_exps" in name or "gate_inp" in name])
def test_experts_of_another_shape_are_refused(model: Model, tmp_path: Path, name: str) -> None:
    model.tensors[name] = model.tensors[name][1:]
    with pytest.raises(GGUFError, match=f"'{name}' has the shape"):
        model.load(tmp_path)


def test_names_of_experts_are_known() -> None:
    known = set(gguf.TENSOR_NAMES.values())
    for function in (names.ffn_gate_inp, names.ffn_gate_exps, names.ffn_up_exps, names.ffn_down_exps):
        assert function(7) == f"blk.7.{function.__name__}.weight"
        assert f"blk.{{bid}}.{function.__name__}" in known
    assert names.bias(names.attn_q(3)) == "blk.3.attn_q.bias"
