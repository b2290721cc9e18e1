"""Every mix and option of `quantize` against llama_model_quantize: order, types, bytes and metadata of its files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert import Options, TypePattern, convert, quantize
from phiquant.convert.filetypes import DEFAULT_TYPES
from phiquant.convert.overrides import parse_override
from phiquant.gguf import FileType, GGMLType, GGUFWriter, ValueType

pytestmark = [pytest.mark.interop, pytest.mark.cpu]

Compare = Callable[[Path, Path], float]
TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
# the file types that llama.cpp makes without an importance matrix too; test_interop_mixtures has all, with one
KINDS = [kind for kind in DEFAULT_TYPES if kind.name not in ("Q2_K_S", "IQ3_XS", "IQ3_XXS", "NVFP4", "Q1_0")]
KINDS = [kind for kind in KINDS if not kind.name.startswith(("IQ1", "IQ2"))]


def skeleton(
    path: Path,
    layers: int,
    heads: int,
    kv: int,
    *,
    tied: bool = False,
    columns: int = 256,
    kind: GGMLType = GGMLType.F16,
) -> Path:
    """A file with the keys that choose types, and every tensor of a Phi-3 with eight random rows."""
    rng = np.random.default_rng(layers)
    numbers = {
        "context_length": 128,
        "rope.scaling.original_context_length": 128,
        "embedding_length": 8 * columns,
        "feed_forward_length": 8 * columns,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "rope.dimension_count": 8,
        "attention.sliding_window": 0,
    }
    matrices = ["token_embd.weight", *([] if tied else ["output.weight"])]
    vectors = ["output_norm.weight", "rope_factors_long.weight", "rope_factors_short.weight"]
    for i in range(layers):
        matrices += [f"blk.{i}.{part}.weight" for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")]
        vectors += [f"blk.{i}.{part}.weight" for part in ("attn_norm", "ffn_norm")]
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phi3", ValueType.STRING)
        for key, value in numbers.items():
            writer.add(f"phi3.{key}", value, ValueType.UINT32)
        writer.add("phi3.attention.layer_norm_rms_epsilon", 1e-5, ValueType.FLOAT32)
        for name in matrices:
            writer.add_tensor(name, (8, columns), kind)
        for name in vectors:
            writer.add_tensor(name, (columns,), GGMLType.F32)
        writer.begin()
        for name in matrices:
            writer.write(name, rng.normal(0, 0.05, (8, columns)).astype("<f4" if kind is GGMLType.F32 else "<f2"))
        for name in vectors:
            writer.write(name, rng.normal(1, 0.05, columns).astype("<f4"))
        writer.commit()
    return path


def test_every_file_type_of_the_bundled_model(their_quantize: Any, compare: Compare, tmp_path: Path) -> None:
    source = convert(TINY, tmp_path / "bf16.gguf", "bf16").plan.path
    jobs = [{"source": str(source), "out": str(tmp_path / f"{kind.name}.gguf"), "ftype": int(kind)} for kind in KINDS]
    assert their_quantize(jobs) == [0] * len(jobs)
    for kind in KINDS:
        for origin in (source, TINY):  # in two steps and in one
            ours = quantize(origin, tmp_path / "ours.gguf", kind.name).plan.path
            assert compare(ours, tmp_path / f"{kind.name}.gguf") >= 0.99, kind.name


SHAPES = {
    "24 layers": (24, 8, 8, {}),
    "32 layers": (32, 32, 32, {}),
    "40 layers, groups of 4": (40, 40, 10, {}),
    "32 layers, groups of 3, tied": (32, 24, 8, {"tied": True}),
    "7 layers, groups of 8": (7, 8, 1, {}),
    "rows of 96": (9, 8, 2, {"columns": 96}),
    "rows of 100": (9, 8, 2, {"columns": 100, "kind": GGMLType.F32}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mix_of_every_shape(their_quantize: Any, compare: Compare, tmp_path: Path, shape: str) -> None:
    layers, heads, kv, changes = SHAPES[shape]
    source = skeleton(tmp_path / "source.gguf", layers, heads, kv, **changes)
    jobs = [{"source": str(source), "out": str(tmp_path / f"{kind.name}.gguf"), "ftype": int(kind)} for kind in KINDS]
    assert their_quantize(jobs) == [0] * len(jobs)
    for kind in KINDS:
        ours = quantize(source, tmp_path / "ours.gguf", kind.name).plan.path
        assert compare(ours, tmp_path / f"{kind.name}.gguf") >= 0.98, kind.name


OPTIONS: dict[str, tuple[dict[str, Any], Options]] = {
    "pure": ({"pure": True}, Options(pure=True)),
    "output": ({"output_tensor_type": GGMLType.Q8_0}, Options(output_tensor_type=GGMLType.Q8_0)),
    "embedding": ({"token_embedding_type": GGMLType.Q4_0}, Options(token_embedding_type=GGMLType.Q4_0)),
    "both": (
        {"output_tensor_type": GGMLType.F16, "token_embedding_type": GGMLType.Q5_K},
        Options(output_tensor_type=GGMLType.F16, token_embedding_type=GGMLType.Q5_K),
    ),
    "leave": ({"leave_output_tensor": True}, Options(leave_output_tensor=True)),
    "patterns": (
        {"tensor_types": [[r"blk\.[13]\.attn_qkv", GGMLType.Q8_0], ["down", GGMLType.Q5_0], ["qkv", GGMLType.Q4_1]]},
        Options(tensor_types=tuple(map(TypePattern.parse, (r"blk\.[13]\.attn_qkv=q8_0", "DOWN=q5_0", "qkv=Q4_1")))),
    ),
    "patterns, pure": (
        {"tensor_types": [["token_embd|output", GGMLType.Q3_K]], "pure": True},
        Options(tensor_types=(TypePattern.parse("token_embd|output=q3_k"),), pure=True),
    ),
    "a pattern for some layers": (
        {"tensor_types": [[r"blk\.2\.", GGMLType.Q6_K]]},
        Options(tensor_types=(TypePattern.parse(r"blk\.2\.=q6_k"),)),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_options(their_quantize: Any, compare: Compare, tmp_path: Path, option: str, tied: bool) -> None:
    theirs, ours = OPTIONS[option]
    source = skeleton(tmp_path / "source.gguf", 24, 8, 2, tied=tied)
    kinds = [FileType.Q4_K_M, FileType.Q3_K_M, FileType.Q8_0, *([] if ours.tensor_types else [FileType.F16])]
    jobs = [{"source": str(source), "out": str(tmp_path / f"{k.name}.gguf"), "ftype": int(k), **theirs} for k in kinds]
    assert their_quantize(jobs) == [0] * len(jobs)
    for kind in kinds:
        path = quantize(source, tmp_path / "ours.gguf", kind.name, replace(ours)).plan.path
        assert compare(path, tmp_path / f"{kind.name}.gguf") >= 0.98, kind.name


def test_copy_requantization_and_overrides(their_quantize: Any, compare: Compare, tmp_path: Path) -> None:
    source = quantize(TINY, tmp_path / "q8.gguf", "Q8_0").plan.path
    base = {"source": str(source)}
    jobs = [
        {**base, "out": str(tmp_path / "copy.gguf"), "ftype": 0, "only_copy": True},
        {**base, "out": str(tmp_path / "q4.gguf"), "ftype": int(FileType.Q4_K_M), "allow_requantize": True},
        {**base, "out": str(tmp_path / "refused.gguf"), "ftype": int(FileType.Q4_K_M)},
        {
            **base,
            "out": str(tmp_path / "set.gguf"),
            "ftype": int(FileType.Q8_0),
            "int_overrides": [["phi3.context_length", 77], ["my.key", 5]],
        },
    ]
    copied, requantized, refused, overridden = their_quantize(jobs)
    assert (copied, requantized, overridden) == (0, 0, 0)
    assert refused != 0
    assert compare(quantize(source, tmp_path / "a.gguf", "COPY").plan.path, tmp_path / "copy.gguf") == 1
    ours = quantize(source, tmp_path / "b.gguf", "Q4_K_M", allow_requantize=True).plan.path
    assert compare(ours, tmp_path / "q4.gguf") >= 0.99
    overrides = [parse_override("phi3.context_length=int:77"), parse_override("my.key=int:5")]
    ours = quantize(source, tmp_path / "c.gguf", "Q8_0", overrides=overrides).plan.path
    assert compare(ours, tmp_path / "set.gguf") == 1
