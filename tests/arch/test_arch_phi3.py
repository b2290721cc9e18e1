"""Phi-3's hyperparameters: read from files of the `gguf` package, and every contradiction refused by name."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from phiquant import arch
from phiquant.arch import names
from phiquant.arch.phi3 import Phi3Config
from phiquant.arch.reading import attention_factor
from phiquant.errors import ArchitectureError, GGUFError, PhiquantError, UnsupportedError
from phiquant.gguf import GGUFFile

from .small_file import F32, STRING, U32, SmallFile

# 4 heads of 16 channels, of which 12 are rotated; 2 key/value heads.
VOCAB, EMBEDDING, HIDDEN, BLOCKS = 40, 64, 96, 2


class Model(SmallFile):
    """A small Phi-3 file in the making, whose keys and tensors a test changes before it is written."""

    def __init__(self) -> None:
        keys: dict[str, tuple[Any, Any]] = {
            "general.name": ("Tiny-Phi", STRING),
            "phi3.context_length": (131072, U32),
            "phi3.rope.scaling.original_context_length": (4096, U32),
            "phi3.embedding_length": (EMBEDDING, U32),
            "phi3.feed_forward_length": (HIDDEN, U32),
            "phi3.block_count": (BLOCKS, U32),
            "phi3.attention.head_count": (4, U32),
            "phi3.attention.head_count_kv": (2, U32),
            "phi3.attention.layer_norm_rms_epsilon": (1e-5, F32),
            "phi3.rope.dimension_count": (12, U32),
            "phi3.rope.freq_base": (250000.0, F32),
            "phi3.attention.sliding_window": (262144, U32),
            "phi3.rope.scaling.attn_factor": (1.25, F32),
        }
        super().__init__("phi3", keys)
        self.tokens = [f"t{index}" for index in range(VOCAB)]
        self.tensors = {
            "rope_factors_long.weight": np.linspace(1, 6, 6, dtype=np.float32),
            "rope_factors_short.weight": np.ones(6, np.float32),
            "token_embd.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
            "output.weight": np.zeros((VOCAB, EMBEDDING), np.float16),
            "output_norm.weight": np.ones(EMBEDDING, np.float32),
        }
        for block in range(BLOCKS):
            self.tensors |= {
                f"blk.{block}.attn_norm.weight": np.ones(EMBEDDING, np.float32),
                f"blk.{block}.attn_qkv.weight": np.zeros((128, EMBEDDING), np.float16),
                f"blk.{block}.attn_output.weight": np.zeros((EMBEDDING, EMBEDDING), np.float16),
                f"blk.{block}.ffn_norm.weight": np.ones(EMBEDDING, np.float32),
                f"blk.{block}.ffn_up.weight": np.zeros((2 * HIDDEN, EMBEDDING), np.float16),
                f"blk.{block}.ffn_down.weight": np.zeros((EMBEDDING, HIDDEN), np.float16),
            }


@pytest.fixture
def model() -> Model:
    return Model()


def test_everything_is_read(model: Model, tmp_path: Path) -> None:
    assert model.load(tmp_path) == Phi3Config(
        name="Tiny-Phi",
        vocab_size=VOCAB,
        context_length=131072,
        original_context_length=4096,
        embedding_length=EMBEDDING,
        feed_forward_length=HIDDEN,
        block_count=BLOCKS,
        head_count=4,
        head_count_kv=2,
        head_size=16,
        rope_dimension_count=12,
        rope_freq_base=250000.0,
        rms_epsilon=float(np.float32(1e-5)),
        sliding_window=262144,
        rope_attention_factor=1.25,
        tied=False,
        rope_factors_short=(1.0,) * 6,
        rope_factors_long=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    )


def test_what_may_be_absent_has_its_default(model: Model, tmp_path: Path) -> None:
    model.drop(
        "general.name",
        "phi3.attention.head_count_kv",
        "phi3.rope.scaling.original_context_length",
        "phi3.rope.dimension_count",
        "phi3.rope.freq_base",
        "phi3.attention.sliding_window",
        "phi3.rope.scaling.attn_factor",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        "output.weight",
    )
    model.tokens = []
    for block in range(BLOCKS):
        model.tensors[f"blk.{block}.attn_qkv.weight"] = np.zeros((192, EMBEDDING), np.float16)
    config = model.load(tmp_path)
    assert config.name == "model"
    assert config.head_count_kv == 4
    assert config.original_context_length == config.context_length == 131072
    assert config.rope_dimension_count == config.head_size == 16
    assert config.rope_freq_base == 10000.0
    assert config.sliding_window == 0
    assert config.rope_attention_factor == 1.0
    assert config.tied
    assert config.rope_factors_short is config.rope_factors_long is None


def test_the_attention_factor_is_derived_from_the_lengths(model: Model, tmp_path: Path) -> None:
    model.drop("phi3.rope.scaling.attn_factor")
    assert model.load(tmp_path).rope_attention_factor == pytest.approx(1.1902380714, abs=1e-10)
    model.keys["phi3.rope.scaling.original_context_length"] = (131072, U32)
    assert model.load(tmp_path).rope_attention_factor == 1.0


@pytest.mark.parametrize(
    ("context", "original", "factor"),
    [
        (131072, 4096, math.sqrt(17 / 12)),
        (4096, 4096, 1.0),
        (2048, 4096, 1.0),
        (131072, 2048, math.sqrt(17 / 11)),
        (9, 1, 1),
    ],
)
def test_attention_factor(context: int, original: int, factor: float) -> None:
    assert attention_factor(context, original) == pytest.approx(factor, abs=1e-12)


def test_tensor_shapes_are_those_of_the_file(model: Model, tmp_path: Path) -> None:
    for tied in (False, True):
        if tied:
            model.drop("output.weight")
        shapes = dict(model.load(tmp_path).tensor_shapes())
        assert shapes == {name: value.shape for name, value in model.tensors.items()}


def test_names_of_block_tensors() -> None:
    functions: list[Callable[[int], str]] = [
        names.attn_norm,
        names.attn_qkv,
        names.attn_q,
        names.attn_k,
        names.attn_v,
        names.attn_output,
        names.ffn_norm,
        names.ffn_gate,
        names.ffn_up,
        names.ffn_down,
    ]
    known = set(gguf.TENSOR_NAMES.values())
    for function in functions:
        assert function(7) == f"blk.7.{function.__name__}.weight"
        assert f"blk.{{bid}}.{function.__name__}" in known
    for name in (names.TOKEN_EMBD, names.OUTPUT, names.OUTPUT_NORM, names.ROPE_FACTORS_LONG, names.ROPE_FACTORS_SHORT):
        assert name.removesuffix(".weight") in known


REQUIRED = (
    "phi3.context_length",
    "phi3.embedding_length",
    "phi3.feed_forward_length",
    "phi3.block_count",
    "phi3.attention.head_count",
    "phi3.attention.layer_norm_rms_epsilon",
)
OPTIONAL = (
    "general.name",
    "phi3.attention.head_count_kv",
    "phi3.rope.dimension_count",
    "phi3.rope.freq_base",
    "phi3.attention.sliding_window",
    "phi3.rope.scaling.attn_factor",
    "phi3.rope.scaling.original_context_length",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(model: Model, tmp_path: Path, key: str) -> None:
    model.drop(key)
    with pytest.raises(GGUFError, match=f"lacks the key '{key}'"):
        model.load(tmp_path)


@pytest.mark.parametrize("key", REQUIRED + OPTIONAL)
def test_a_value_of_another_type_is_named(model: Model, tmp_path: Path, key: str) -> None:
    others = [(1, U32), (1.0, F32), ("1", STRING), ([1, 2], None)]
    for value, kind in others:
        if kind != model.keys[key][1]:
            broken = Model()
            broken.keys[key] = (value, kind)
            with pytest.raises(GGUFError, match=f"'{key}' as "):
                broken.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("phi3.context_length", 0, U32),
        ("phi3.context_length", 2**32 - 1, U32),
        ("phi3.embedding_length", 0, U32),
        ("phi3.embedding_length", 65540, U32),
        ("phi3.feed_forward_length", 0, U32),
        ("phi3.feed_forward_length", 2**31, U32),
        ("phi3.block_count", 0, U32),
        ("phi3.block_count", 513, U32),
        ("phi3.attention.head_count", 0, U32),
        ("phi3.attention.head_count", 3, U32),
        ("phi3.attention.head_count", 5000, U32),
        ("phi3.attention.head_count_kv", 0, U32),
        ("phi3.attention.head_count_kv", 3, U32),
        ("phi3.attention.head_count_kv", 8, U32),
        ("phi3.attention.key_length", 32, U32),
        ("phi3.attention.value_length", 8, U32),
        ("phi3.vocab_size", 41, U32),
        ("phi3.rope.dimension_count", 0, U32),
        ("phi3.rope.dimension_count", 11, U32),
        ("phi3.rope.dimension_count", 18, U32),
        ("phi3.rope.scaling.original_context_length", 0, U32),
        ("phi3.rope.freq_base", 0.0, F32),
        ("phi3.rope.freq_base", math.nan, F32),
        ("phi3.rope.freq_base", math.inf, F32),
        ("phi3.rope.scaling.attn_factor", -1.0, F32),
        ("phi3.rope.scaling.attn_factor", math.inf, F32),
        ("phi3.attention.layer_norm_rms_epsilon", 0.0, F32),
        ("phi3.attention.layer_norm_rms_epsilon", math.nan, F32),
    ],
)
def test_an_impossible_value_is_named(model: Model, tmp_path: Path, key: str, value: Any, kind: Any) -> None:
    model.keys[key] = (value, kind)
    with pytest.raises(GGUFError, match=f"'{key}'"):
        model.load(tmp_path)


def test_the_token_list_must_fit_the_embedding(model: Model, tmp_path: Path) -> None:
    model.tokens.append("more")
    with pytest.raises(GGUFError, match=r"'tokenizer\.ggml\.tokens' lists 41 tokens and the embedding has 40"):
        model.load(tmp_path)
    model.tokens = []
    model.keys["tokenizer.ggml.tokens"] = ([1, 2], None)
    with pytest.raises(GGUFError, match=r"'tokenizer\.ggml\.tokens' must be an array of strings"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", [name for name in Model().tensors if name != "output.weight"])
def test_a_missing_tensor_is_named(model: Model, tmp_path: Path, name: str) -> None:
    model.drop(name)
    with pytest.raises(GGUFError, match=f"'{name}' is missing"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", Model().tensors)
def test_a_tensor_of_another_shape_is_named(model: Model, tmp_path: Path, name: str) -> None:
    good = model.tensors[name]
    # A vocabulary of another length contradicts the list of tokens first.
    message = f"'{name}'|'tokenizer.ggml.tokens'" if name == "token_embd.weight" else f"'{name}' has the shape"
    first, last = good.shape[0], good.shape[-1]
    for shape in ((*good.shape[:-1], last + 2), (first + 1, *good.shape[1:]), (*good.shape, 1), (first, 1, last)):
        model.tensors[name] = np.ones(shape, good.dtype)
        with pytest.raises(GGUFError, match=message):
            model.load(tmp_path)


def test_transposed_matrices_are_refused(model: Model, tmp_path: Path) -> None:
    model.tensors["blk.1.ffn_down.weight"] = model.tensors["blk.1.ffn_down.weight"].T.copy()
    with pytest.raises(
        GGUFError, match=r"'blk\.1\.ffn_down\.weight' has the shape \(96, 64\) and must have \(64, 96\)"
    ):
        model.load(tmp_path)


@pytest.mark.parametrize("name", [name for name, value in Model().tensors.items() if value.ndim == 1])
def test_vectors_are_float32(model: Model, tmp_path: Path, name: str) -> None:
    model.tensors[name] = model.tensors[name].astype(np.float16)
    with pytest.raises(GGUFError, match=f"'{name}' is F16 and must be F32"):
        model.load(tmp_path)


def test_integers_are_no_weights(model: Model, tmp_path: Path) -> None:
    model.tensors["output.weight"] = np.zeros((VOCAB, EMBEDDING), np.int8)
    with pytest.raises(GGUFError, match=r"'output\.weight' is I8, which is no type of weights"):
        model.load(tmp_path)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
def test_rope_factors_are_finite_and_positive(model: Model, tmp_path: Path, name: str, bad: float) -> None:
    model.tensors[name][3] = bad
    with pytest.raises(GGUFError, match=f"'{name}' holds factors"):
        model.load(tmp_path)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.bias", "blk.2.attn_norm.weight", "output.bias"])
def test_a_tensor_without_a_place_is_named(model: Model, tmp_path: Path, name: str) -> None:
    model.tensors[name] = np.zeros(4, np.float32)
    with pytest.raises(GGUFError, match=f"'{name}', for which phi3 has no place"):
        model.load(tmp_path)


def test_separate_projections_are_said_to_be_unsupported(model: Model, tmp_path: Path) -> None:
    model.drop("blk.0.attn_qkv.weight")
    model.tensors["blk.0.attn_q.weight"] = np.zeros((EMBEDDING, EMBEDDING), np.float16)
    with pytest.raises(UnsupportedError, match="stores queries, keys and values apart"):
        model.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "factor", "good"),
    [
        ("none", None, True),
        ("longrope", 32.0, True),
        (None, 1.0, True),
        (None, 0.0, True),
        ("linear", 4.0, False),
        ("yarn", None, False),
        (None, 2.0, False),
        ("none", math.nan, False),
    ],
)
def test_other_rotary_scalings_are_refused(
    model: Model, tmp_path: Path, kind: str | None, factor: float | None, good: bool
) -> None:
    if kind is not None:
        model.keys["phi3.rope.scaling.type"] = (kind, STRING)
    if factor is not None:
        model.keys["phi3.rope.scaling.factor"] = (factor, F32)
    if good:
        assert model.load(tmp_path).head_size == 16
    else:
        with pytest.raises(UnsupportedError, match=r"phi3\.rope\.scaling\.type"):
            model.load(tmp_path)


def test_an_unknown_architecture_is_named_with_the_known(model: Model, tmp_path: Path) -> None:
    model.architecture = "gpt2"
    with pytest.raises(ArchitectureError, match=r"architecture 'gpt2', which is not supported; known: .*phi3"):
        model.load(tmp_path)


def test_a_part_of_a_split_model_is_refused(model: Model, tmp_path: Path) -> None:
    model.keys["split.count"] = (3, gguf.GGUFValueType.UINT16)
    with pytest.raises(UnsupportedError, match="one of the 3 parts"):
        model.load(tmp_path)


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GGUFFile.open(tmp_path / "v.gguf") as file, pytest.raises(GGUFError, match="no weights"):
        arch.load(file)


def test_the_configuration_is_frozen(model: Model, tmp_path: Path) -> None:
    config = model.load(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_count = 5  # type: ignore[misc]
    assert hash(config) == hash(model.load(tmp_path))


def test_every_error_is_one_sentence(model: Model, tmp_path: Path) -> None:
    model.keys["phi3.block_count"] = (0, U32)
    with pytest.raises(PhiquantError) as caught:
        model.load(tmp_path)
    assert str(caught.value).endswith(".")
    assert str(tmp_path) in str(caught.value)
