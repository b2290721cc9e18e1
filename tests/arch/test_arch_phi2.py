"""Phi-2's hyperparameters: read from files of the `gguf` package, and every contradiction refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import arch
from phiquant.arch import Phi2Config
from phiquant.errors import GGUFError, UnsupportedError

from .small_file import F32, STRING, U32, SmallFile

VOCAB, EMBEDDING, HIDDEN, BLOCKS = 40, 64, 256, 2


class Model(SmallFile):
    """A small Phi-2 file in the making, whose keys and tensors a test changes before it is written."""

    def __init__(self, *, fused: bool = False) -> None:
        keys: dict[str, tuple[Any, Any]] = {
            "general.name": ("Phi-2", STRING),
            "phi2.context_length": (2048, U32),
            "phi2.embedding_length": (EMBEDDING, U32),
            "phi2.feed_forward_length": (HIDDEN, U32),
            "phi2.block_count": (BLOCKS, U32),
            "phi2.attention.head_count": (4, U32),
            "phi2.attention.head_count_kv": (4, U32),
            "phi2.attention.layer_norm_epsilon": (1e-5, F32),
            "phi2.rope.dimension_count": (6, U32),
        }
        super().__init__("phi2", keys)
        shapes: dict[str, tuple[int, ...]] = {"output": (VOCAB, EMBEDDING), "output_norm": (EMBEDDING,)}
        for block in range(BLOCKS):
            prefix = f"blk.{block}."
            shapes |= {
                prefix + "attn_norm": (EMBEDDING,),
                prefix + "attn_output": (EMBEDDING, EMBEDDING),
                prefix + "ffn_up": (HIDDEN, EMBEDDING),
                prefix + "ffn_down": (EMBEDDING, HIDDEN),
            }
            if fused:
                shapes[prefix + "attn_qkv"] = (3 * EMBEDDING, EMBEDDING)
            else:
                shapes |= {prefix + part: (EMBEDDING, EMBEDDING) for part in ("attn_q", "attn_k", "attn_v")}
        self.tensors = {"token_embd.weight": np.zeros((VOCAB, EMBEDDING), np.float16)}
        for name, shape in shapes.items():
            self.add(name, *shape)


@pytest.fixture(params=[False, True], ids=["split", "fused"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(fused=request.param)


def test_everything_is_read(model: Model, tmp_path: Path) -> None:
    config = model.load(tmp_path)
    assert config == Phi2Config(
        name="Phi-2",
        vocab_size=VOCAB,
        context_length=2048,
        embedding_length=EMBEDDING,
        feed_forward_length=HIDDEN,
        block_count=BLOCKS,
        head_count=4,
        head_count_kv=4,
        head_size=16,
        rope_dimension_count=6,
        rope_freq_base=10000.0,
        norm_epsilon=float(np.float32(1e-5)),
        fused="blk.0.attn_qkv.weight" in model.tensors,
    )
    assert config.rotary == arch.Rotary(6, 10000.0, 2048)
    assert config.assumptions == ()
    assert dict(config.tensor_shapes()) == {name: value.shape for name, value in model.tensors.items()}


@pytest.mark.parametrize("name", [*Model().tensors, *(n for n in Model(fused=True).tensors if "qkv" in n)])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    model = Model(fused="qkv" in name)
    del model.tensors[name]
    # Without the first fused matrix a file is taken for one with split ones.
    named = "blk.0.attn_k.bias" if name == "blk.0.attn_qkv.weight" else name
    with pytest.raises(GGUFError, match=rf"the tensor '{named}' is missing"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", Model().tensors)
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    model = Model()
    value = model.tensors[name]
    model.tensors[name] = np.ones((*value.shape[:-1], value.shape[-1] + 2), value.dtype)
    with pytest.raises(GGUFError, match=f"'{name}' has the shape"):
        model.load(tmp_path)


def test_queries_and_keys_have_no_norm(model: Model, tmp_path: Path) -> None:
    model.tensors["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    with pytest.raises(GGUFError, match=r"'blk\.0\.attn_q_norm\.weight', for which phi2 has no place"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("phi2.context_length", 0, U32),
        ("phi2.embedding_length", 65540, U32),
        ("phi2.feed_forward_length", 2**31, U32),
        ("phi2.block_count", 513, U32),
        ("phi2.attention.head_count", 3, U32),
        ("phi2.attention.head_count_kv", 3, U32),
        ("phi2.attention.key_length", 32, U32),
        ("phi2.attention.value_length", 8, U32),
        ("phi2.rope.dimension_count", 7, U32),
        ("phi2.rope.dimension_count", 18, U32),
        ("phi2.rope.freq_base", math.nan, F32),
        ("phi2.attention.layer_norm_epsilon", 0.0, F32),
        ("phi2.vocab_size", 41, U32),
    ],
)
def test_an_impossible_value_is_named(model: Model, tmp_path: Path, key: str, value: Any, kind: Any) -> None:
    model.keys[key] = (value, kind)
    with pytest.raises(GGUFError, match=f"'{key}'"):
        model.load(tmp_path)


@pytest.mark.parametrize("kind", ["linear", "yarn", "longrope"])
def test_rotary_scalings_are_refused(model: Model, tmp_path: Path, kind: str) -> None:
    model.keys["phi2.rope.scaling.type"] = (kind, STRING)
    with pytest.raises(UnsupportedError, match=f"'{kind}' by 1; phi2 models have none"):
        model.load(tmp_path)
