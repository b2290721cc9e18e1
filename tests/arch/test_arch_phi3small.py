"""Phi-3-small's hyperparameters: read from files of the `gguf` package, and every contradiction refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from phiquant import arch
from phiquant.arch import Phi3SmallConfig
from phiquant.errors import GGUFError, UnsupportedError

from .small_file import F32, STRING, U32, SmallFile

# 4 heads of 16 channels; 2 key/value heads.
VOCAB, EMBEDDING, HIDDEN, BLOCKS = 40, 64, 96, 3


class Model(SmallFile):
    """A small file in the making, whose keys and tensors a test changes before it is written."""

    def __init__(self) -> None:
        keys: dict[str, tuple[Any, Any]] = {
            "general.name": ("Tiny-Phi", STRING),
            "phi3small.context_length": (131072, U32),
            "phi3small.rope.scaling.original_context_length": (8192, U32),
            "phi3small.embedding_length": (EMBEDDING, U32),
            "phi3small.feed_forward_length": (HIDDEN, U32),
            "phi3small.block_count": (BLOCKS, U32),
            "phi3small.attention.head_count": (4, U32),
            "phi3small.attention.head_count_kv": (2, U32),
            "phi3small.attention.layer_norm_epsilon": (1e-5, F32),
            "phi3small.rope.dimension_count": (16, U32),
            "phi3small.rope.freq_base": (1e6, F32),
            "phiquant.rope.attention_factor_short": (1.25, F32),
            "phiquant.rope.attention_factor_long": (1.5, F32),
            "phi3small.embedding_scale": (10.0, F32),
            "phi3small.attention.scale": (0.0625, F32),
            "phi3small.logit_scale": (0.125, F32),
            "phi3small.feed_forward.gate_limit": (20.0, F32),
            "phi3small.attention.block_sparse.block_size": (64, U32),
            "phi3small.attention.block_sparse.local_blocks": (16, U32),
            "phi3small.attention.block_sparse.vertical_stride": (8, U32),
            "phi3small.attention.block_sparse.layers": ([True, False, True], None),
        }
        super().__init__("phi3small", keys)
        self.tensors = {
            "rope_factors_long.weight": np.linspace(1, 8, 8, dtype=np.float32),
            "rope_factors_short.weight": np.ones(8, np.float32),
            "token_embd.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for block in range(BLOCKS):
            shapes |= {
                f"blk.{block}.attn_norm": (EMBEDDING,),
                f"blk.{block}.attn_qkv": (128, EMBEDDING),
                f"blk.{block}.attn_output": (EMBEDDING, EMBEDDING),
                f"blk.{block}.ffn_norm": (EMBEDDING,),
                f"blk.{block}.ffn_up": (2 * HIDDEN, EMBEDDING),
                f"blk.{block}.ffn_down": (EMBEDDING, HIDDEN),
            }
        for name, shape in {**shapes, "output_norm": (EMBEDDING,)}.items():
            self.add(name, *shape)


@pytest.fixture
def model() -> Model:
    return Model()


def test_everything_is_read(model: Model, tmp_path: Path) -> None:
    found = model.load(tmp_path)
    assert found == Phi3SmallConfig(
        name="Tiny-Phi",
        vocab_size=VOCAB,
        context_length=131072,
        original_context_length=8192,
        embedding_length=EMBEDDING,
        feed_forward_length=HIDDEN,
        block_count=BLOCKS,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        rope_freq_base=1e6,
        norm_epsilon=float(np.float32(1e-5)),
        embedding_scale=10.0,
        attention_scale=0.0625,
        logit_scale=0.125,
        gate_limit=20.0,
        sparse_layers=(True, False, True),
        sparse_block_size=64,
        sparse_local_blocks=16,
        sparse_vertical_stride=8,
        rope_factors_short=(1.0,) * 8,
        rope_factors_long=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
        rope_attention_factor_short=1.25,
        rope_attention_factor_long=1.5,
    )
    assert (found.rotary.attention_factor_short, found.rotary.attention_factor_long) == (1.25, 1.5)
    assert dict(found.tensor_shapes()) == {name: value.shape for name, value in model.tensors.items()}


def test_what_may_be_absent_has_its_default(model: Model, tmp_path: Path) -> None:
    for key in ("general.name", "phi3small.rope.scaling.original_context_length", "phi3small.rope.dimension_count"):
        del model.keys[key]
    for regime in ("short", "long"):
        del model.keys[f"phiquant.rope.attention_factor_{regime}"], model.tensors[f"rope_factors_{regime}.weight"]
    found = model.load(tmp_path)
    assert (found.name, found.original_context_length) == ("model", 131072)
    assert found.rotary == arch.Rotary(16, 1e6, 131072)


def test_absent_attention_factors_are_derived_from_the_lengths(model: Model, tmp_path: Path) -> None:
    del model.keys["phiquant.rope.attention_factor_short"], model.keys["phiquant.rope.attention_factor_long"]
    found = model.load(tmp_path)
    expected = math.sqrt(1 + math.log(16) / math.log(8192))
    assert found.rope_attention_factor_short == found.rope_attention_factor_long == pytest.approx(expected)


OPTIONAL = ("general.name", "original_context_length", "dimension_count", "attention_factor")


@pytest.mark.parametrize("key", [key for key in Model().keys if not any(name in key for name in OPTIONAL)])
def test_a_missing_key_is_named(model: Model, tmp_path: Path, key: str) -> None:
    del model.keys[key]
    if key == "phi3small.attention.head_count_kv":  # as many as heads, for which the tensors are too small
        with pytest.raises(GGUFError, match="attn_qkv"):
            model.load(tmp_path)
        return
    with pytest.raises(GGUFError, match=f"lacks the key '{key}'"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("rope.dimension_count", 8, U32),
        ("embedding_scale", 0.0, F32),
        ("embedding_scale", math.nan, F32),
        ("attention.scale", -1.0, F32),
        ("logit_scale", math.inf, F32),
        ("feed_forward.gate_limit", 0.0, F32),
        ("attention.layer_norm_epsilon", 0.0, F32),
        ("attention.block_sparse.block_size", 0, U32),
        ("attention.block_sparse.local_blocks", 0, U32),
        ("attention.block_sparse.vertical_stride", 0, U32),
        ("attention.block_sparse.vertical_stride", 2**31, U32),
        ("attention.block_sparse.layers", [True, False], None),
        ("attention.block_sparse.layers", [1, 0, 1], None),
        ("attention.block_sparse.layers", True, gguf.GGUFValueType.BOOL),
    ],
)
def test_an_impossible_value_is_named(model: Model, tmp_path: Path, key: str, value: Any, kind: Any) -> None:
    model.keys[f"phi3small.{key}"] = (value, kind)
    with pytest.raises(GGUFError, match=f"'phi3small.{key}'"):
        model.load(tmp_path)


def test_an_impossible_factor_is_named(model: Model, tmp_path: Path) -> None:
    model.keys["phiquant.rope.attention_factor_long"] = (1e9, F32)
    with pytest.raises(GGUFError, match=r"'phiquant\.rope\.attention_factor_long'"):
        model.load(tmp_path)


def test_another_scaling_is_refused(model: Model, tmp_path: Path) -> None:
    model.keys["phi3small.rope.scaling.type"] = ("yarn", STRING)
    with pytest.raises(UnsupportedError, match="yarn"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.bias", "output_norm.bias", "blk.0.attn_qkv.weight"])
def test_a_missing_tensor_is_named(model: Model, tmp_path: Path, name: str) -> None:
    del model.tensors[name]
    with pytest.raises(GGUFError, match=f"'{name}' is missing"):
        model.load(tmp_path)


def test_a_bias_in_half_precision_and_an_output_matrix_are_refused(model: Model, tmp_path: Path) -> None:
    model.tensors["blk.1.ffn_up.bias"] = model.tensors["blk.1.ffn_up.bias"].astype(np.float16)
    with pytest.raises(GGUFError, match=r"'blk\.1\.ffn_up\.bias' is F16 and must be F32"):
        model.load(tmp_path)
    model = Model()
    model.tensors["output.weight"] = model.tensors["token_embd.weight"]
    with pytest.raises(GGUFError, match=r"'output\.weight', for which phi3small has no place"):
        model.load(tmp_path)
