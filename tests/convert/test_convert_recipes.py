"""Which type each tensor gets: inventories and sizes worked out by hand from llama.cpp's rules, and the options."""

import re
from collections import Counter

import pytest

from phiquant.convert.filetypes import COPY, DEFAULT_TYPES, parse_file_type, parse_tensor_type
from phiquant.convert.overrides import apply_overrides, parse_override
from phiquant.convert.recipes import (
    Model,
    Options,
    PlannedTensor,
    Tensor,
    TypePattern,
    check_options,
    check_requantization,
    plan_conversion,
    plan_quantization,
)
from phiquant.errors import RequestError, TypeNameError, UnsupportedError, WeightsError
from phiquant.gguf.types import FileType, GGMLType, ValueType


def model(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, *, tied: bool = False, factors: int = 0
) -> list[Tensor]:
    f16, f32 = GGMLType.F16, GGMLType.F32
    tensors = [Tensor(f"rope_factors_{kind}.weight", (factors,), f32) for kind in ("long", "short") if factors]
    tensors += [Tensor("token_embd.weight", (vocab, hidden), f16), Tensor("output_norm.weight", (hidden,), f32)]
    if not tied:
        tensors.append(Tensor("output.weight", (vocab, hidden), f16))
    for i in range(layers):
        tensors += [
            Tensor(f"blk.{i}.attn_norm.weight", (hidden,), f32),
            Tensor(f"blk.{i}.attn_qkv.weight", (hidden + 2 * (hidden // heads) * kv, hidden), f16),
            Tensor(f"blk.{i}.attn_output.weight", (hidden, hidden), f16),
            Tensor(f"blk.{i}.ffn_norm.weight", (hidden,), f32),
            Tensor(f"blk.{i}.ffn_up.weight", (2 * ffn, hidden), f16),
            Tensor(f"blk.{i}.ffn_down.weight", (hidden, ffn), f16),
        ]
    return tensors


PHI3_MINI = model(3072, 8192, 32, 32, 32, 32064), Model(32, 32, 32)
PHI35_MINI = model(3072, 8192, 32, 32, 32, 32064, factors=48), Model(32, 32, 32)
PHI3_MEDIUM = model(5120, 17920, 40, 40, 10, 32064), Model(40, 40, 10)
PHI4 = model(5120, 17920, 40, 40, 10, 100352), Model(40, 40, 10)
PHI4_MINI = model(3072, 8192, 32, 24, 8, 200064, tied=True, factors=48), Model(32, 24, 8)


def plan(which: tuple[list[Tensor], Model], kind: str, **options: object) -> list[PlannedTensor]:
    return plan_quantization(which[0], parse_file_type(kind), which[1], Options(**options))  # type: ignore[arg-type]


def data_bytes(planned: list[PlannedTensor]) -> int:
    return sum(-(-tensor.nbytes // 32) * 32 for tensor in planned)


def inventory(planned: list[PlannedTensor]) -> dict[str, int]:
    return dict(Counter(tensor.type.name for tensor in planned))


@pytest.mark.parametrize(
    ("which", "q4", "q6", "f32", "size", "f16"),
    [
        (PHI3_MINI, 97, 33, 65, 2_396_032_512, 7_642_558_464),
        (PHI35_MINI, 97, 33, 67, 2_396_032_896, 7_642_558_848),
        (PHI3_MEDIUM, 121, 41, 81, 8_572_224_000, 27_921_305_600),
        (PHI4, 121, 41, 81, 9_055_703_040, 29_319_843_840),
        (PHI4_MINI, 96, 33, 67, 2_485_589_376, 7_672_443_264),
    ],
)
def test_q4_k_m_of_the_published_models(
    which: tuple[list[Tensor], Model], q4: int, q6: int, f32: int, size: int, f16: int
) -> None:
    planned = plan(which, "Q4_K_M")
    assert inventory(planned) == {"Q4_K": q4, "Q6_K": q6, "F32": f32}
    assert data_bytes(planned) == size
    assert data_bytes(plan_conversion(which[0], GGMLType.F16)) == f16


def layers_of(planned: list[PlannedTensor], part: str, kind: str) -> list[int]:
    found = [re.fullmatch(rf"blk\.(\d+)\.{part}\.weight", t.name) for t in planned if t.type.name == kind]
    return [int(match[1]) for match in found if match]


def test_more_bits_in_the_layers_that_matter() -> None:
    planned = plan(PHI3_MINI, "Q5_K_M")
    expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_of(planned, "attn_qkv", "Q6_K") == expected
    assert layers_of(planned, "ffn_down", "Q6_K") == expected
    assert layers_of(plan(PHI4, "Q4_K_M"), "ffn_down", "Q6_K") == [
        *range(5),
        7,
        10,
        13,
        16,
        19,
        22,
        25,
        28,
        31,
        *range(34, 40),
    ]


@pytest.mark.parametrize(
    ("kind", "qkv", "out", "down", "rest", "output", "embedding"),
    [
        ("Q2_K", {"Q3_K": 32}, "Q3_K", {"Q3_K": 32}, "Q2_K", "Q6_K", "Q2_K"),
        ("Q2_K_S", {"Q2_K": 32}, "Q2_K", {"Q4_K": 4, "Q2_K": 28}, "Q2_K", "Q6_K", "Q2_K"),
        ("Q3_K_S", {"Q3_K": 32}, "Q3_K", {"Q3_K": 32}, "Q3_K", "Q6_K", "Q3_K"),
        ("Q3_K_M", {"Q5_K": 2, "Q4_K": 30}, "Q4_K", {"Q5_K": 2, "Q4_K": 30}, "Q3_K", "Q6_K", "Q3_K"),
        ("Q3_K_L", {"Q5_K": 32}, "Q5_K", {"Q5_K": 32}, "Q3_K", "Q6_K", "Q3_K"),
        ("Q4_K_S", {"Q5_K": 4, "Q4_K": 28}, "Q4_K", {"Q5_K": 4, "Q4_K": 28}, "Q4_K", "Q6_K", "Q4_K"),
        ("Q4_K_M", {"Q6_K": 16, "Q4_K": 16}, "Q4_K", {"Q6_K": 16, "Q4_K": 16}, "Q4_K", "Q6_K", "Q4_K"),
        ("Q5_K_S", {"Q5_K": 32}, "Q5_K", {"Q5_K": 32}, "Q5_K", "Q6_K", "Q5_K"),
        ("Q5_K_M", {"Q6_K": 16, "Q5_K": 16}, "Q5_K", {"Q6_K": 16, "Q5_K": 16}, "Q5_K", "Q6_K", "Q5_K"),
        ("Q6_K", {"Q6_K": 32}, "Q6_K", {"Q6_K": 32}, "Q6_K", "Q6_K", "Q6_K"),
        ("Q4_0", {"Q4_0": 32}, "Q4_0", {"Q4_0": 32}, "Q4_0", "Q6_K", "Q4_0"),
        ("Q4_1", {"Q4_1": 32}, "Q4_1", {"Q4_1": 32}, "Q4_1", "Q6_K", "Q4_1"),
        ("Q5_0", {"Q5_0": 32}, "Q5_0", {"Q5_0": 32}, "Q5_0", "Q6_K", "Q5_0"),
        ("Q5_1", {"Q5_1": 32}, "Q5_1", {"Q5_1": 32}, "Q5_1", "Q6_K", "Q5_1"),
        ("Q8_0", {"Q8_0": 32}, "Q8_0", {"Q8_0": 32}, "Q8_0", "Q8_0", "Q8_0"),
        ("F16", {"F16": 32}, "F16", {"F16": 32}, "F16", "F16", "F16"),
        ("BF16", {"BF16": 32}, "BF16", {"BF16": 32}, "BF16", "BF16", "BF16"),
        ("F32", {"F32": 32}, "F32", {"F32": 32}, "F32", "F32", "F32"),
        ("IQ1_S", {"Q2_K": 32}, "IQ2_XXS", {"Q2_K": 4, "IQ1_S": 28}, "IQ1_S", "Q5_K", "Q2_K"),
        ("IQ1_M", {"Q2_K": 32}, "IQ2_XXS", {"Q2_K": 4, "IQ1_M": 28}, "IQ1_M", "Q5_K", "Q2_K"),
        ("IQ2_XXS", {"Q2_K": 32}, "IQ2_XXS", {"Q2_K": 4, "IQ2_XXS": 28}, "IQ2_XXS", "Q5_K", "Q2_K"),
        ("IQ2_XS", {"Q2_K": 32}, "IQ2_XS", {"Q2_K": 4, "IQ2_XS": 28}, "IQ2_XS", "Q5_K", "Q2_K"),
        ("IQ2_S", {"IQ3_S": 32}, "IQ3_S", {"IQ3_S": 4, "IQ2_XS": 28}, "IQ2_XS", "Q5_K", "IQ3_S"),
        ("IQ2_M", {"IQ3_S": 32}, "IQ3_S", {"IQ3_S": 4, "IQ2_S": 28}, "IQ2_S", "Q5_K", "IQ3_S"),
        ("IQ3_XXS", {"IQ3_S": 32}, "IQ3_S", {"Q4_K": 4, "Q3_K": 28}, "IQ3_XXS", "Q5_K", "IQ3_S"),
        ("IQ3_S", {"IQ3_S": 32}, "IQ3_S", {"IQ3_S": 32}, "IQ3_S", "Q6_K", "IQ3_S"),
        ("IQ3_M", {"Q4_K": 32}, "Q4_K", {"Q4_K": 4, "IQ3_S": 28}, "IQ3_S", "Q6_K", "IQ3_S"),
        ("IQ4_NL", {"IQ4_NL": 32}, "IQ4_NL", {"Q5_K": 4, "IQ4_NL": 28}, "IQ4_NL", "Q6_K", "IQ4_NL"),
        ("IQ4_XS", {"IQ4_XS": 32}, "IQ4_XS", {"Q5_K": 4, "IQ4_XS": 28}, "IQ4_XS", "Q6_K", "IQ4_XS"),
        ("Q1_0", {"Q1_0": 32}, "Q1_0", {"Q1_0": 32}, "Q1_0", "Q6_K", "Q1_0"),
        ("Q2_0", {"Q2_0": 32}, "Q2_0", {"Q2_0": 32}, "Q2_0", "Q6_K", "Q4_K"),
        ("TQ1_0", {"TQ1_0": 32}, "TQ1_0", {"TQ1_0": 32}, "TQ1_0", "Q6_K", "Q4_K"),
        ("TQ2_0", {"TQ2_0": 32}, "TQ2_0", {"TQ2_0": 32}, "TQ2_0", "Q6_K", "Q4_K"),
        ("MXFP4_MOE", {"Q8_0": 32}, "Q8_0", {"Q8_0": 32}, "Q8_0", "Q8_0", "Q8_0"),
        ("NVFP4", {"NVFP4": 32}, "NVFP4", {"NVFP4": 32}, "NVFP4", "Q6_K", "NVFP4"),
    ],
)
def test_every_mix(
    kind: str, qkv: dict[str, int], out: str, down: dict[str, int], rest: str, output: str, embedding: str
) -> None:
    planned = plan(PHI3_MINI, kind)
    by_name = {tensor.name: tensor.type.name for tensor in planned}

    def types(part: str) -> dict[str, int]:
        return dict(Counter(kind for name, kind in by_name.items() if name.endswith(f".{part}.weight")))

    assert types("attn_qkv") == qkv
    assert types("attn_output") == {out: 32}
    assert types("ffn_down") == down
    assert types("ffn_up") == {rest: 32}
    assert by_name["output.weight"] == output
    assert by_name["token_embd.weight"] == embedding
    assert types("attn_norm") == {"F32": 32}
    tied = {
        t.name: t.type.name for t in plan((model(3072, 8192, 32, 32, 32, 32064, tied=True), Model(32, 32, 32)), kind)
    }
    assert tied["token_embd.weight"] == output


def test_the_middle_layers_of_iq3_xs() -> None:
    planned = plan(PHI3_MINI, "IQ3_XS")
    assert layers_of(planned, "ffn_up", "IQ3_XXS") == list(range(4, 28))
    assert layers_of(planned, "ffn_up", "IQ3_S") == [*range(4), *range(28, 32)]
    assert layers_of(planned, "attn_qkv", "IQ3_S") == list(range(32))


@pytest.mark.parametrize(
    ("kind", "part", "without", "with_it"),
    [
        ("Q4_0", "ffn_down", {"Q4_0": 32}, {"Q4_1": 4, "Q4_0": 28}),
        ("Q5_0", "ffn_down", {"Q5_0": 32}, {"Q5_1": 4, "Q5_0": 28}),
        ("IQ3_XXS", "ffn_down", {"Q4_K": 4, "Q3_K": 28}, {"IQ3_XXS": 32}),
        ("IQ3_XXS", "attn_qkv", {"IQ3_S": 32}, {"IQ3_XXS": 32}),
        ("IQ4_XS", "ffn_down", {"Q5_K": 4, "IQ4_XS": 28}, {"IQ4_XS": 32}),
        ("IQ4_NL", "ffn_down", {"Q5_K": 4, "IQ4_NL": 28}, {"IQ4_NL": 32}),
        ("Q4_K_M", "ffn_down", {"Q6_K": 16, "Q4_K": 16}, {"Q6_K": 16, "Q4_K": 16}),
    ],
)
def test_importance_changes_some_mixtures(
    kind: str, part: str, without: dict[str, int], with_it: dict[str, int]
) -> None:
    for importance, expected in ((False, without), (True, with_it)):
        planned = plan_quantization(PHI3_MINI[0], parse_file_type(kind), PHI3_MINI[1], Options(), importance=importance)
        assert inventory([tensor for tensor in planned if part in tensor.name]) == expected


def test_options_that_contradict_one_another() -> None:
    pattern = (TypePattern.parse("attn_qkv=q8_0"),)
    for kind, options, what in (
        ("COPY", Options(pure=True), "--pure chooses types, and COPY"),
        ("COPY", Options(tensor_types=pattern), "--tensor-type chooses types, and COPY"),
        ("COPY", Options(output_tensor_type=GGMLType.F16), "--output-tensor-type chooses"),
        ("COPY", Options(token_embedding_type=GGMLType.F16), "--token-embedding-type chooses"),
        ("F16", Options(tensor_types=pattern), "quantized file types only, not with F16"),
        ("Q8_0", Options(leave_output_tensor=True, output_tensor_type=GGMLType.F16), "contradict one another"),
    ):
        with pytest.raises(RequestError, match=what):
            check_options(parse_file_type(kind), options)
    for kind, options in (
        ("COPY", Options()),
        ("COPY", Options(leave_output_tensor=True)),
        ("F16", Options(output_tensor_type=GGMLType.F32)),
        ("Q4_K", Options(pure=True, tensor_types=pattern)),
    ):
        check_options(parse_file_type(kind), options)


@pytest.mark.parametrize("pattern", ["atn_qkv", "norm", "rope_factors", r"blk\.32\."])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    """Vectors do not count: no type would reach them."""
    with pytest.raises(RequestError, match=r"--tensor-type .*no weight's name holds this pattern"):
        plan(PHI35_MINI, "Q4_K_M", tensor_types=(TypePattern.parse("qkv=q8_0"), TypePattern.parse(f"{pattern}=q8_0")))


def test_grouped_queries_give_values_more_bits_in_q2_k() -> None:
    for kind in ("Q2_K", "Q2_K_S"):
        assert layers_of(plan(PHI4, kind), "attn_qkv", "Q4_K") == list(range(40))
        assert layers_of(plan(PHI4_MINI, kind), "attn_qkv", "Q4_K") == []


def test_writing_order_is_llama_quantizes() -> None:
    names = [tensor.name for tensor in plan(PHI35_MINI, "Q4_K_M")]
    outside = [
        "output.weight",
        "output_norm.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        "token_embd.weight",
    ]
    assert names[:5] == outside
    assert names[5:11] == [
        f"blk.0.{part}.weight" for part in ("attn_norm", "attn_output", "attn_qkv", "ffn_down", "ffn_norm", "ffn_up")
    ]
    assert names[-1] == "blk.31.ffn_up.weight"
    assert names.index("blk.2.attn_norm.weight") < names.index("blk.10.attn_norm.weight")


def test_options() -> None:
    assert inventory(plan(PHI3_MINI, "Q4_K_M", pure=True)) == {"Q4_K": 130, "F32": 65}
    types = {
        t.name: t.type
        for t in plan(PHI3_MINI, "Q4_K_M", output_tensor_type=GGMLType.Q8_0, token_embedding_type=GGMLType.F16)
    }
    assert (types["output.weight"], types["token_embd.weight"]) == (GGMLType.Q8_0, GGMLType.F16)
    left = {t.name: t.type for t in plan(PHI3_MINI, "Q4_K_M", leave_output_tensor=True)}
    assert left["output.weight"] is GGMLType.F16
    tied = {t.name: t.type for t in plan(PHI4_MINI, "Q4_K_M", output_tensor_type=GGMLType.Q5_K)}
    assert tied["token_embd.weight"] is GGMLType.Q5_K
    tied = {
        t.name: t.type
        for t in plan(PHI4_MINI, "Q4_K_M", output_tensor_type=GGMLType.Q5_K, token_embedding_type=GGMLType.Q4_0)
    }
    assert tied["token_embd.weight"] is GGMLType.Q4_0


def test_patterns_first_match_wins_and_counters_stand_still() -> None:
    patterns = (
        TypePattern.parse(r"BLK\.0\.attn_qkv=q8_0"),
        TypePattern.parse("attn_qkv.*weight=Q5_K"),
        TypePattern.parse("qkv=q4_0"),
    )
    planned = plan(PHI3_MINI, "Q4_K_M", tensor_types=patterns)
    assert layers_of(planned, "attn_qkv", "Q8_0") == [0]
    assert layers_of(planned, "attn_qkv", "Q5_K") == list(range(1, 32))
    # one layer taken out by hand: the others move up in the count, as in llama-quantize
    moved = plan(PHI3_MINI, "Q4_K_M", tensor_types=(TypePattern.parse(r"blk\.1\.attn_qkv=q8_0"),))
    assert layers_of(moved, "attn_qkv", "Q6_K") == [0, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 29, 30, 31]


@pytest.mark.parametrize("text", ["attn_qkv", "=q8_0", "attn_qkv=", "[=q8_0", "("])
def test_malformed_patterns(text: str) -> None:
    with pytest.raises(RequestError, match="--tensor-type"):
        TypePattern.parse(text)


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K_S", 96, "Q4_0"),
        ("Q4_K_S", 96, "Q5_0"),
        ("Q5_K_S", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q4_K_S", 100, "F16"),
        ("Q4_0", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("Q8_0", 96, "Q8_0"),
        ("F16", 100, "F16"),
        ("IQ1_S", 96, "IQ4_NL"),
        ("IQ2_M", 96, "IQ4_NL"),
        ("IQ3_XXS", 96, "IQ4_NL"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("IQ4_XS", 100, "F16"),
        ("TQ1_0", 96, "Q4_0"),
        ("Q2_0", 96, "Q4_0"),
        ("Q2_0", 192, "Q2_0"),
        ("Q1_0", 128, "Q1_0"),
    ],
)
def test_fallback_for_rows_that_do_not_divide(kind: str, columns: int, expected: str) -> None:
    tensor = Tensor("blk.0.ffn_up.weight", (8, columns), GGMLType.F32)
    (planned,) = plan_quantization([tensor], parse_file_type(kind), Model(1, 1, 1), Options())
    assert planned.type.name == expected
    same = planned.type is DEFAULT_TYPES[FileType[kind]]
    assert (planned.fallback is None) == same
    assert same or f"rows of {columns}" in str(planned.fallback)


@pytest.mark.parametrize(("kind", "columns"), [("Q1_0", 64), ("NVFP4", 32)])
def test_types_that_nothing_stands_in_for(kind: str, columns: int) -> None:
    """llama-quantize ends with an error too."""
    tensor = Tensor("blk.0.ffn_up.weight", (8, columns), GGMLType.F32)
    with pytest.raises(WeightsError, match=rf"blk\.0\.ffn_up\.weight: rows of {columns} .*--tensor-type"):
        plan_quantization([tensor], parse_file_type(kind), Model(1, 1, 1), Options())


def test_output_falls_back_to_q8_0() -> None:
    tensor = Tensor("output.weight", (8, 96), GGMLType.F32)
    (planned,) = plan_quantization([tensor], parse_file_type("Q4_K_M"), Model(1, 1, 1), Options())
    assert planned.type is GGMLType.Q8_0


def test_conversion_keeps_vectors_and_norms_in_f32() -> None:
    tensors = [
        Tensor("token_embd.weight", (10, 100), GGMLType.BF16),
        Tensor("blk.0.attn_norm.weight", (4, 100), GGMLType.BF16),
        Tensor("output_norm.weight", (100,), GGMLType.BF16),
        Tensor("blk.0.attn_qkv.bias", (4, 96), GGMLType.BF16),
        Tensor("blk.0.attn_qkv.weight", (4, 96), GGMLType.BF16),
    ]
    assert [t.type.name for t in plan_conversion(tensors, GGMLType.Q8_0)] == ["F16", "F32", "F32", "F32", "Q8_0"]


def test_requantization_needs_leave() -> None:
    tensors = [Tensor("blk.0.ffn_up.weight", (8, 256), GGMLType.Q8_0)]
    planned = plan_quantization(tensors, parse_file_type("Q4_K_M"), Model(1, 1, 1), Options())
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight is Q8_0 already.*--allow-requantize"):
        check_requantization(planned)
    check_requantization(plan_quantization(tensors, parse_file_type("Q8_0"), Model(1, 1, 1), Options()))
    check_requantization(plan_quantization(tensors, COPY, Model(1, 1, 1), Options()))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("q4_k_m", "Q4_K_M"),
        ("15", "Q4_K_M"),
        ("Q4_K", "Q4_K_M"),
        ("q3_k", "Q3_K_M"),
        ("Q5_K", "Q5_K_M"),
        ("0", "F32"),
        ("32", "BF16"),
        ("1", "F16"),
        ("copy", "COPY"),
        (" Q8_0 ", "Q8_0"),
        ("21", "Q2_K_S"),
        ("iq2_m", "IQ2_M"),
        ("38", "MXFP4_MOE"),
        ("mxfp4", "MXFP4_MOE"),
        ("nvfp4", "NVFP4"),
        ("41", "Q2_0"),
    ],
)
def test_file_types_by_name_number_and_alias(text: str, name: str) -> None:
    assert parse_file_type(text).name == name


def test_every_file_type_by_its_number() -> None:
    assert set(DEFAULT_TYPES) == set(FileType) - {FileType.GUESSED}
    for kind in DEFAULT_TYPES:
        assert parse_file_type(str(int(kind))).file_type is kind


@pytest.mark.parametrize(
    ("text", "near"), [("Q4_KM", "Q4_K_M"), ("q4km", "Q4_K_M"), ("Q6K", "Q6_K"), ("fp16", "F16"), ("q8", "Q8_0")]
)
def test_the_nearest_name_is_offered(text: str, near: str) -> None:
    with pytest.raises(TypeNameError, match=f"did you mean {near}"):
        parse_file_type(text)


@pytest.mark.parametrize("text", ["", "4", "99999999999999999999", "-1", "٣", "GUESSED", "\0"])
def test_no_type_at_all(text: str) -> None:
    with pytest.raises(TypeNameError):
        parse_file_type(text)


def test_tensor_types() -> None:
    assert parse_tensor_type("q4_k") is GGMLType.Q4_K
    with pytest.raises(TypeNameError, match="did you mean Q4_K"):
        parse_tensor_type("Q4_K_M")
    assert parse_tensor_type("iq4_nl") is GGMLType.IQ4_NL
    with pytest.raises(UnsupportedError, match="not stored as Q8_K"):
        parse_tensor_type("q8_k")


def test_overrides() -> None:
    assert parse_override("phi3.context_length=int:8192")[:3] == ("phi3.context_length", ValueType.UINT32, 8192)
    assert parse_override("a=str:b=c:d")[:3] == ("a", ValueType.STRING, "b=c:d")
    assert parse_override("a=bool:true")[:3] == ("a", ValueType.BOOL, True)
    assert parse_override("a=float:1e-5")[:3] == ("a", ValueType.FLOAT32, 1e-5)
    for text in (
        "a",
        "a=int",
        "=int:1",
        "a=int:x",
        "a=int:-1",
        "a=int:4294967296",
        "a=float:nan",
        "a=float:1e99",
        "a=bool:yes",
        "a=uint:1",
        "a=str:\udcff",
        "a" * 200 + "=int:1",
    ):
        with pytest.raises(RequestError, match="--override-kv"):
            parse_override(text)
    entries = [parse_override("x=int:1"), parse_override("y=str:s")]
    changed = apply_overrides(entries, [parse_override("x=int:2"), parse_override("z=bool:false")])
    assert [(entry.key, entry.value) for entry in changed] == [("x", 2), ("y", "s"), ("z", False)]
    with pytest.raises(RequestError, match="holds str there, not int"):
        apply_overrides(entries, [parse_override("y=int:2")])
    with pytest.raises(RequestError, match="alignment"):
        apply_overrides(entries, [parse_override("general.alignment=int:64")])
