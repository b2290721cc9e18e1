"""Hyperparameters of rewritten Phis: read from files of the `gguf` package, contradictions refused by name."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.arch import LlamaConfig, Rotary
from phiquant.errors import GGUFError, UnsupportedError

from .small_file import F32, STRING, U32, SmallFile

VOCAB, EMBEDDING, HIDDEN, BLOCKS = 40, 64, 96, 2
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


class Model(SmallFile):
    """A small Llama file in the making, whose keys and tensors a test changes before it is written."""

    def __init__(self, *, fused: bool = False, biased: bool = False) -> None:
        keys: dict[str, tuple[Any, Any]] = {
            "general.name": ("Phi-3-mini-llamafied", STRING),
            "llama.context_length": (4096, U32),
            "llama.embedding_length": (EMBEDDING, U32),
            "llama.feed_forward_length": (HIDDEN, U32),
            "llama.block_count": (BLOCKS, U32),
            "llama.attention.head_count": (4, U32),
            "llama.attention.head_count_kv": (2, U32),
            "llama.attention.layer_norm_rms_epsilon": (1e-5, F32),
            "llama.attention.sliding_window": (2047, U32),
            "llama.rope.dimension_count": (16, U32),
            "llama.rope.freq_base": (250000.0, F32),
            "llama.vocab_size": (VOCAB, U32),
        }
        super().__init__("llama", keys)
        self.tensors = {
            "token_embd.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
            "output.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
            "output_norm.weight": np.ones(EMBEDDING, np.float32),
        }
        for block in range(BLOCKS):
            prefix = f"blk.{block}."
            split = {"attn_q": (64, EMBEDDING), "attn_k": (32, EMBEDDING), "attn_v": (32, EMBEDDING)}
            matrices = {
                **({"attn_qkv": (128, EMBEDDING)} if fused else split),
                "attn_output": (EMBEDDING, 64),
                "ffn_gate": (HIDDEN, EMBEDDING),
                "ffn_up": (HIDDEN, EMBEDDING),
                "ffn_down": (EMBEDDING, HIDDEN),
            }
            for name, shape in matrices.items():
                self.tensors[f"{prefix}{name}.weight"] = np.zeros(shape, np.float16)
                if biased:
                    self.tensors[f"{prefix}{name}.bias"] = np.zeros(shape[0], np.float32)
            for name in ("attn_norm", "ffn_norm"):
                self.tensors[f"{prefix}{name}.weight"] = np.ones(EMBEDDING, np.float32)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_everything_is_read(tmp_path: Path, fused: bool, biased: bool) -> None:
    model = Model(fused=fused, biased=biased)
    config = model.load(tmp_path)
    assert config == LlamaConfig(
        name="Phi-3-mini-llamafied",
        vocab_size=VOCAB,
        context_length=4096,
        original_context_length=4096,
        embedding_length=EMBEDDING,
        feed_forward_length=HIDDEN,
        block_count=BLOCKS,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        rope_freq_base=250000.0,
        rms_epsilon=float(np.float32(1e-5)),
        sliding_window=2047,
        rope_attention_factor=1.0,
        tied=False,
        fused=fused,
        qkv_bias=biased,
        output_bias=biased,
        ffn_bias=biased,
        rope_factors_short=None,
        rope_factors_long=None,
    )
    assert config.rotary == Rotary(16, 250000.0, 4096)
    assert dict(config.tensor_shapes()) == {name: value.shape for name, value in model.tensors.items()}


def test_what_may_be_absent_has_its_default(model: Model, tmp_path: Path) -> None:
    for key in ("attention.sliding_window", "rope.dimension_count", "rope.freq_base", "vocab_size"):
        del model.keys[f"llama.{key}"]
    del model.tensors["output.weight"]
    config = model.load(tmp_path)
    assert (config.sliding_window, config.head_size, config.rope_freq_base, config.tied) == (0, 16, 10000.0, True)


def test_heads_of_a_size_of_their_own(model: Model, tmp_path: Path) -> None:
    """Three heads of 32 channels in an embedding of 64."""
    for key, value in (("head_count", 3), ("head_count_kv", 1), ("key_length", 32), ("value_length", 32)):
        model.keys[f"llama.attention.{key}"] = (value, U32)
    model.keys["llama.rope.dimension_count"] = (32, U32)
    for block in range(BLOCKS):
        for part, shape in (("q", (96, 64)), ("k", (32, 64)), ("v", (32, 64)), ("output", (64, 96))):
            model.tensors[f"blk.{block}.attn_{part}.weight"] = np.zeros(shape, np.float16)
    config = model.load(tmp_path)
    assert (config.head_size, config.head_count) == (32, 3)


@pytest.mark.parametrize(
    ("keys", "freqs", "factors"),
    [
        ({}, None, None),
        ({"scaling.factor": (4.0, F32)}, None, (4.0,) * 8),
        ({"scaling.type": ("linear", STRING), "scaling.factor": (4.0, F32)}, None, (4.0,) * 8),
        ({"scaling.type": ("linear", STRING), "scaling.factor": (0.0, F32)}, None, None),
        ({"scaling.type": ("none", STRING), "scaling.factor": (4.0, F32)}, None, None),
        ({"scale_linear": (2.0, F32)}, None, (2.0,) * 8),
        ({}, [1, 2, 3, 4, 5, 6, 7, 8], (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)),
        ({"scaling.factor": (2.0, F32)}, [1, 2, 3, 4, 5, 6, 7, 8], (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0)),
    ],
)
def test_scalings(model: Model, tmp_path: Path, keys: dict[str, Any], freqs: Any, factors: Any) -> None:
    model.keys |= {f"llama.rope.{key}": value for key, value in keys.items()}
    if freqs is not None:
        model.tensors[FREQS] = np.array(freqs, np.float32)
    config = model.load(tmp_path)
    assert config.rotary == Rotary(16, 250000.0, 4096, factors)
    assert FREQS not in dict(config.tensor_shapes())


def long_rope(model: Model) -> None:
    model.keys["llama.rope.scaling.type"] = ("longrope", STRING)
    model.keys["llama.rope.scaling.original_context_length"] = (64, U32)
    model.tensors[LONG], model.tensors[SHORT] = np.linspace(1, 8, 8, dtype=np.float32), np.ones(8, np.float32)


def test_longrope(model: Model, tmp_path: Path) -> None:
    long_rope(model)
    factor = math.sqrt(2.0)  # 1 + ln 64 / ln 64
    expected = Rotary(16, 250000.0, 64, (1.0,) * 8, tuple(float(i) for i in range(1, 9)), factor, factor)
    assert model.load(tmp_path).rotary == pytest.approx(expected)
    model.keys["llama.rope.scaling.attn_factor"] = (1.25, F32)
    assert model.load(tmp_path).rotary == replace(expected, attention_factor_short=1.25, attention_factor_long=1.25)


def test_longrope_without_its_factors_is_refused(model: Model, tmp_path: Path) -> None:
    """llama.cpp's converter writes such files."""
    long_rope(model)
    del model.tensors[SHORT]
    with pytest.raises(GGUFError, match=f"'{SHORT}' is missing"):
        model.load(tmp_path)
    del model.tensors[LONG]
    with pytest.raises(GGUFError, match="convert the checkpoint with `phiquant convert`"):
        model.load(tmp_path)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "x" * 200])
def test_other_scalings_are_refused(model: Model, tmp_path: Path, kind: str) -> None:
    model.keys["llama.rope.scaling.type"] = (kind, STRING)
    with pytest.raises(UnsupportedError, match=f"scaling '{kind[:10]}.*none, linear and longrope are") as caught:
        model.load(tmp_path)
    assert len(str(caught.value)) < 400


def test_experts_are_refused(model: Model, tmp_path: Path) -> None:
    model.keys["llama.expert_count"] = (8, U32)
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", Model(biased=True).tensors)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    """But for the output, which a tied model lacks; without the first bias of a kind all others have no place."""
    model = Model(biased=True)
    del model.tensors[name]
    if name == "output.weight":
        assert model.load(tmp_path).tied
        return
    first = name in ("blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias")
    with pytest.raises(GGUFError, match="no place" if first else f"'{name}' is missing"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", Model(biased=True).tensors)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    model = Model(biased=True)
    value = model.tensors[name]
    model.tensors[name] = np.ones((*value.shape[:-1], value.shape[-1] + 2), value.dtype)
    with pytest.raises(GGUFError, match=f"'{name}' has the shape"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("llama.context_length", 0, U32),
        ("llama.embedding_length", 65540, U32),
        ("llama.attention.head_count", 3, U32),
        ("llama.attention.head_count_kv", 3, U32),
        ("llama.attention.key_length", 2048, U32),
        ("llama.attention.value_length", 8, U32),
        ("llama.attention.layer_norm_rms_epsilon", math.nan, F32),
        ("llama.rope.dimension_count", 8, U32),
        ("llama.rope.dimension_count", 18, U32),
        ("llama.rope.scaling.factor", -1.0, F32),
        ("llama.rope.scaling.factor", math.nan, F32),
        ("llama.rope.scaling.attn_factor", 0.0, F32),
        ("llama.rope.scale_linear", math.inf, F32),
        ("llama.vocab_size", 41, U32),
    ],
)
def test_an_impossible_value_is_named(model: Model, tmp_path: Path, key: str, value: Any, kind: Any) -> None:
    model.keys[key] = (value, kind)
    with pytest.raises(GGUFError, match=f"'{key}'"):
        model.load(tmp_path)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", [FREQS, LONG])
def test_factors_are_finite_and_positive(model: Model, tmp_path: Path, name: str, bad: float) -> None:
    if name == LONG:
        long_rope(model)
    model.tensors[name] = np.array([1, 1, 1, bad, 1, 1, 1, 1], np.float32)
    with pytest.raises(GGUFError, match=f"'{name}' holds factors"):
        model.load(tmp_path)


def test_factors_of_another_kind_have_no_place(model: Model, tmp_path: Path) -> None:
    long_rope(model)
    model.tensors[FREQS] = np.ones(8, np.float32)
    with pytest.raises(GGUFError, match=f"'{FREQS}', for which llama has no place"):
        model.load(tmp_path)
    del model.tensors[FREQS]
    model.keys["llama.rope.scaling.type"] = ("linear", STRING)
    with pytest.raises(GGUFError, match=f"'{LONG}', for which llama has no place"):
        model.load(tmp_path)
