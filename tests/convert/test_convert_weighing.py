"""Importance in a quantization: which weights get it, bytes by it, what is refused, what the file says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import quants
from phiquant.convert import Importance, Options, TypePattern, convert, parse_file_type, quantize
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.convert.plan import Plan, plan_quantize
from phiquant.convert.source import open_source
from phiquant.errors import ImportanceError, RequestError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
COLUMNS, EXPERTS, BLOCKS = 256, 4, 2
MATRICES = {"attn_qkv": 1, "ffn_down_exps": EXPERTS}


def write_model(path: Path) -> Path:
    """An architecture that cannot be run here, with a stack of experts."""
    rng = np.random.default_rng(3)
    shapes = {"output.weight": (8, COLUMNS), "token_embd.weight": (8, COLUMNS)}
    for i in range(BLOCKS):
        shapes |= {f"blk.{i}.attn_qkv.weight": (8, COLUMNS), f"blk.{i}.ffn_down_exps.weight": (EXPERTS, 3, COLUMNS)}
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phimoe", ValueType.STRING)
        for key, value in (("block_count", BLOCKS), ("attention.head_count", 8), ("expert_count", EXPERTS)):
            writer.add(f"phimoe.{key}", value, ValueType.UINT32)
        for name, shape in shapes.items():
            writer.add_tensor(name, shape, GGMLType.F32)
        writer.begin()
        for name, shape in shapes.items():
            writer.write(name, rng.normal(0, 1, shape).astype("<f4"))
        writer.commit()
    return path


def matrix(**changes: Any) -> ImportanceMatrix:
    rng = np.random.default_rng(4)
    entries = {}
    for i in range(BLOCKS):
        for part, matrices in MATRICES.items():
            sums = rng.random((matrices, COLUMNS), np.float32) ** 8 * 1000
            entries[f"blk.{i}.{part}.weight"] = Statistic(sums, np.full(matrices, 64))
    return ImportanceMatrix(
        **{"entries": entries, "chunk_count": 2, "chunk_size": 32, "datasets": ("a", "b")} | changes
    )


def with_entries(changes: Mapping[str, Statistic | None]) -> Importance:
    entries = {**matrix().entries, **changes}
    return Importance(matrix(entries={name: entry for name, entry in entries.items() if entry is not None}), "i.gguf")


def plan(model: Path, kind: str, importance: Importance | None = None, **more: Any) -> Plan:
    with open_source(model) as source:
        options = more.pop("options", Options())
        return plan_quantize(source, parse_file_type(kind), None, options, importance=importance, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("weighing") / "model.gguf")


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 3])
def test_every_expert_is_quantized_by_its_own_importance(model: Path, tmp_path: Path, threads: int) -> None:
    given = with_entries({})
    report = quantize(model, tmp_path / "x.gguf", "Q4_K_S", importance=given, threads=threads)
    with GGUFFile.open(model) as old, GGUFFile.open(tmp_path / "x.gguf") as new:
        for tensor in report.plan.tensors:
            values = old.data(tensor.name).view("<f4").reshape(tensor.shape)
            importance = given.matrix.importance(tensor.name)
            if importance is None:
                expected = quants.quantize(values, tensor.type)
            else:
                stack = values.reshape(len(importance), -1, COLUMNS)
                pairs = zip(stack, importance, strict=True)
                expected = np.stack([quants.quantize(part, tensor.type, weights) for part, weights in pairs])
            assert np.array_equal(new.data(tensor.name), expected.reshape(-1)), tensor.name
        assert not np.array_equal(new.data("blk.0.ffn_down_exps.weight"), quants.quantize(
            old.data("blk.0.ffn_down_exps.weight").view("<f4").reshape(-1, COLUMNS),
            new.tensors["blk.0.ffn_down_exps.weight"].type,
        ).reshape(-1))  # fmt: skip


def test_what_the_file_says_of_it(model: Path) -> None:
    long = "ä" * 100  # llama-quantize keeps 127 bytes of a name
    given = Importance(matrix(datasets=(long, "b")), "some/where/i.gguf")
    entries = {entry.key: (entry.type, entry.value) for entry in plan(model, "Q4_K_M", given).entries}
    assert entries["quantize.imatrix.file"] == (ValueType.STRING, "some/where/i.gguf")
    assert entries["quantize.imatrix.dataset"] == (ValueType.STRING, "ä" * 63)
    assert entries["quantize.imatrix.entries_count"] == (ValueType.UINT32, 4)
    assert entries["quantize.imatrix.chunks_count"] == (ValueType.UINT32, 2)
    given = Importance(matrix(datasets=(), chunk_count=0), "i.dat")
    keys = {entry.key for entry in plan(model, "Q4_K_M", given).entries if entry.key.startswith("quantize.")}
    assert keys == {"quantize.imatrix.file", "quantize.imatrix.entries_count"}


def test_low_bits_without_importance_are_refused_with_the_command_that_makes_it(model: Path) -> None:
    for kind, tensor, type in (
        ("IQ2_XS", "blk.0.ffn_down_exps.weight", "IQ2_XS"),
        ("IQ1_M", "blk.0.ffn_down_exps.weight", "IQ1_M"),
        ("Q2_K_S", "blk.0.attn_qkv.weight", "Q2_K"),
    ):
        with pytest.raises(RequestError) as caught:
            plan(model, kind)
        command = f"phiquant imatrix -m {model} -f TEXT -o imatrix.gguf"
        for part in (f"{tensor} would become {type}", command, "--imatrix imatrix.gguf", "--calibrate TEXT"):
            assert part in str(caught.value)
    with pytest.raises(RequestError, match="IQ2_XXS, which is useless without"):
        plan(model, "Q4_K_M", options=Options(tensor_types=(TypePattern.parse("attn_qkv=iq2_xxs"),)))
    plan(model, "Q2_K")  # needs none, and neither do embedding and output
    plan(
        model,
        "Q4_K_M",
        options=Options(output_tensor_type=GGMLType.Q2_K, token_embedding_type=GGMLType.Q2_K),
    )


def test_a_dry_run_only_says_so(model: Path) -> None:
    (remark,) = plan(model, "Q2_K_S", dry_run=True).notes
    assert "blk.0.attn_qkv.weight would become Q2_K" in remark


def test_a_weight_of_low_bits_whose_entry_is_missing(model: Path) -> None:
    given = with_entries({"blk.1.ffn_down_exps.weight": None})
    with pytest.raises(RequestError, match=r"blk\.1\.ffn_down_exps\.weight would become Q2_K.*i\.gguf has no entry"):
        plan(model, "Q2_K_S", given)
    assert any("1 weights have no entry in i.gguf" in note for note in plan(model, "Q4_K_M", given).notes)


ONES = np.ones((1, COLUMNS), np.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"blk.0.attn_qkv.weight": Statistic(np.ones((1, 96), np.float32), np.array([64]))},
            r"another model: it has 96 values for blk\.0\.attn_qkv\.weight, and this model's tensor takes 256",
        ),
        (
            {"blk.1.ffn_down_exps.weight": Statistic(ONES, np.array([64]))},
            r"256 values for blk\.1\.ffn_down_exps\.weight, and this model's tensor takes 1024",
        ),
        (
            {"blk.7.attn_qkv.weight": Statistic(ONES, np.array([64]))},
            r"another model: it has an entry for blk\.7\.attn_qkv\.weight, and this model has no such tensor",
        ),
        (
            {"blk.1.attn_qkv.weight": Statistic(ONES * 0, np.array([0]))},
            r"blk\.1\.attn_qkv\.weight to which no token came \(all counts are 0\)",
        ),
    ],
)
def test_matrices_that_do_not_fit(model: Path, changes: dict[str, Statistic], sentence: str) -> None:
    with pytest.raises(ImportanceError, match=sentence):
        plan(model, "Q4_K_M", with_entries(changes))


def test_a_matrix_for_none_of_the_weights(model: Path) -> None:
    given = with_entries(dict.fromkeys(matrix().entries) | {"output.weight": Statistic(ONES, np.array([64]))})
    assert "output.weight" in given.matrix.entries
    weighed = plan(model, "Q4_K_M", given)  # llama-imatrix --process-output writes such an entry
    assert [tensor.name for tensor in weighed.tensors if tensor.importance is not None] == ["output.weight"]
    given = with_entries(dict.fromkeys(matrix().entries) | {"other.weight": Statistic(ONES, np.array([64]))})
    with pytest.raises(ImportanceError, match=r"no entry for blk\.0\.attn_qkv\.weight, nor for any other"):
        plan(model, "Q4_K_M", given)


def test_an_embedding_may_have_an_entry_of_another_size(model: Path) -> None:
    """llama-quantize passes over it."""
    given = with_entries({"token_embd.weight": Statistic(np.ones((1, 8), np.float32), np.array([64]))})
    weighed = {tensor.name: tensor.importance for tensor in plan(model, "Q4_K_M", given).tensors}
    assert weighed["token_embd.weight"] is None


def test_what_is_told(model: Path) -> None:
    some = Statistic(np.ones((EXPERTS, COLUMNS), np.float32), np.array([64, 0, 64, 0]))
    notes = plan(model, "Q4_K_M", with_entries({"blk.1.ffn_down_exps.weight": some})).notes
    assert notes == ["1 weights have experts to which no token came, the first is blk.1.ffn_down_exps.weight"]
    assert plan(model, "Q4_K_M", with_entries({})).notes == []
    assert plan(model, "Q8_0", with_entries({})).notes == [
        "i.gguf is not used: the types of this file do not depend on importance"
    ]
    assert plan(model, "COPY", with_entries({})).notes == plan(model, "F16", with_entries({})).notes != []


def test_a_run_that_did_not_end(model: Path) -> None:
    short = Statistic(ONES, np.array([32]))
    (note,) = plan(model, "Q4_K_M", with_entries({"blk.1.attn_qkv.weight": short})).notes
    assert note.endswith("did not end: 32 tokens reached some weights, 64 others")
    (note,) = plan(model, "Q4_K_M", Importance(matrix(chunk_count=5), "i.gguf")).notes
    assert note.endswith("did not end: it announces 5 chunks of 32 tokens, and 64 reached the weights")


def test_opening_with_a_choice(tmp_path: Path) -> None:
    matrix().write_gguf(tmp_path / "i.gguf")
    path = tmp_path / "i.gguf"
    assert len(Importance.open(path).matrix.entries) == 4
    assert set(Importance.open(path, include=["attn_qkv"]).matrix.entries) == {
        "blk.0.attn_qkv.weight",
        "blk.1.attn_qkv.weight",
    }
    assert len(Importance.open(path, exclude=["blk.1", "attn_qkv"]).matrix.entries) == 1
    for choice, what in (
        ({"include": ["qkv"], "exclude": ["down"]}, "cannot be used together"),
        ({"include": ["qkv", "atn_v"]}, "--include-weights atn_v: no entry"),
        ({"exclude": ["blk.9"]}, "--exclude-weights blk.9: no entry"),
        ({"exclude": ["blk"]}, "leaves no entry"),
    ):
        with pytest.raises(RequestError, match=what):
            Importance.open(path, **choice)


@pytest.mark.cpu
def test_one_step_from_a_checkpoint_is_two_steps(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "bf16.gguf", "bf16")
    with open_source(TINY) as source:
        shapes = {t.name: t.shape for t in source.tensors if len(t.shape) > 1 and t.name.startswith("blk.")}
    rng = np.random.default_rng(5)
    entries = {name: Statistic(rng.random((1, s[-1]), np.float32), np.array([1])) for name, s in shapes.items()}
    given = Importance(ImportanceMatrix(entries, 1, 1), "i.gguf")
    quantize(tmp_path / "bf16.gguf", tmp_path / "two.gguf", "Q2_K_S", importance=given)
    quantize(TINY, tmp_path / "one.gguf", "Q2_K_S", importance=given)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
