"""Every file type of every kind of model, with an importance matrix and without: plans and bytes are llama.cpp's.

Small files in the shape of Phi-2, Phi-3, PhiMoE, and of models with split or with eight-expert weights, deep enough for
all rules by layer. llama.cpp's quantizer needs only their hyperparameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert import Importance, quantize
from phiquant.convert.filetypes import DEFAULT_TYPES, Target
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.convert.recipes import Options, plan_quantization
from phiquant.convert.source import model_of, open_source
from phiquant.errors import RequestError, UnsupportedError, WeightsError
from phiquant.gguf import FileType, GGMLType, GGUFFile, GGUFWriter, ValueType

pytestmark = [pytest.mark.interop, pytest.mark.cpu]

KINDS = [kind for kind in DEFAULT_TYPES if kind is not FileType.NVFP4]  # which llama-quantize does not offer
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
PARALLEL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
SPLIT = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@dataclass(frozen=True)
class Shape:
    architecture: str
    layers: int
    heads: int
    kv: int
    parts: tuple[str, ...] = FUSED
    experts: int = 0
    tied: bool = False
    columns: int = 256


SHAPES = {
    "phi2, 32 layers": Shape("phi2", 32, 32, 32),
    "phi2, 24 layers": Shape("phi2", 24, 32, 32),
    "phi2, 32 layers, split": Shape("phi2", 32, 32, 32, PARALLEL),
    "phi2, 24 layers, split": Shape("phi2", 24, 32, 32, PARALLEL),
    "phi3, 32 layers": Shape("phi3", 32, 32, 32),
    "phi3, 40 layers, groups of 4": Shape("phi3", 40, 40, 10),
    "phi3, 32 layers, groups of 3, tied": Shape("phi3", 32, 24, 8, tied=True),
    "phi3, rows of 96": Shape("phi3", 17, 8, 2, columns=96),
    "phi3, rows of 128": Shape("phi3", 8, 8, 2, columns=128),
    "phi3, rows of 100": Shape("phi3", 8, 8, 2, columns=100),
    "phimoe, 32 layers, 16 experts": Shape("phimoe", 32, 32, 8, EXPERTS, 16),
    "phi2, 8 layers": Shape("phi2", 8, 32, 32),
    "phi3, 8 layers, groups of 3, tied": Shape("phi3", 8, 24, 8, tied=True),
    "phimoe, 8 layers, 4 experts": Shape("phimoe", 8, 32, 8, EXPERTS, 4),
    "llama, 32 layers, as Phi-3-mini": Shape("llama", 32, 32, 32, SPLIT),
    "llama, 40 layers, as Phi-4": Shape("llama", 40, 40, 10, SPLIT),
    "llama, 32 layers, as Phi-4-mini": Shape("llama", 32, 24, 8, SPLIT, tied=True),
    "phimoe, 8 layers, 16 experts": Shape("phimoe", 8, 16, 4, EXPERTS, 16),
    "llama, 22 layers": Shape("llama", 22, 32, 32, SPLIT),
    "llama, 16 layers, groups of 4, tied": Shape("llama", 16, 32, 8, SPLIT, tied=True),
    "llama, 80 layers, groups of 8": Shape("llama", 80, 64, 8, SPLIT),
    "llama, 80 layers, groups of 2": Shape("llama", 80, 64, 32, SPLIT),
    "llama, 80 layers": Shape("llama", 80, 64, 64, SPLIT),
    "llama, 32 layers, 8 experts": Shape("llama", 32, 32, 32, EXPERTS, 8),
    "llama, 24 layers, 4 experts": Shape("llama", 24, 32, 32, EXPERTS, 4),
    "llama, 24 layers, 3 experts": Shape("llama", 24, 32, 16, EXPERTS, 3),
}
WITH_BYTES = ("phi2, 8 layers", "phi3, 8 layers, groups of 3, tied", "phimoe, 8 layers, 16 experts")


def write(path: Path, shape: Shape) -> Path:
    """Random weights of eight rows, two for an expert."""
    rng = np.random.default_rng(shape.layers)
    numbers = {
        "context_length": 128,
        "embedding_length": 8 * shape.heads,
        "feed_forward_length": 8 * shape.columns,
        "block_count": shape.layers,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv,
        "rope.dimension_count": 8,
        **({"expert_count": shape.experts, "expert_used_count": 2} if shape.experts else {}),
    }
    matrices = ["token_embd.weight", *([] if shape.tied else ["output.weight"])]
    vectors = ["output_norm.weight", "output_norm.bias"]
    for i in range(shape.layers):
        matrices += [f"blk.{i}.{part}.weight" for part in shape.parts]
        matrices += [f"blk.{i}.ffn_gate_inp.weight"] if shape.experts else []
        vectors += [f"blk.{i}.{part}" for part in ("attn_norm.weight", "attn_qkv.bias", "ffn_norm.weight")]
    extents = {n: (shape.experts, 2) if "_exps" in n else (8,) for n in matrices}
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", shape.architecture, ValueType.STRING)
        writer.add("general.file_type", FileType.F16, ValueType.UINT32)
        for key, value in numbers.items():
            writer.add(f"{shape.architecture}.{key}", value, ValueType.UINT32)
        for key in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
            writer.add(f"{shape.architecture}.attention.{key}", 1e-5, ValueType.FLOAT32)
        for name in matrices:
            writer.add_tensor(name, (*extents[name], shape.columns), GGMLType.F16)
        for name in vectors:
            writer.add_tensor(name, (shape.columns,), GGMLType.F32)
        writer.begin()
        for name in matrices:
            writer.write(name, rng.normal(0, 0.05, (*extents[name], shape.columns)).astype("<f2"))
        for name in vectors:
            writer.write(name, rng.normal(1, 0.05, shape.columns).astype("<f4"))
        writer.commit()
    return path


def importance_of(source: Path, npz: Path, *, seed: int = 1) -> Importance:
    """Random importance of the weights in the blocks: ours, and as an array for each name in `npz`.

    In a model of experts, one has seen no token.
    """
    rng = np.random.default_rng(seed)
    entries = {}
    with GGUFFile.open(source) as file:
        for name, info in file.tensors.items():
            if len(info.shape) > 1 and name.startswith("blk.") and "gate_inp" not in name:
                matrices = info.shape[0] if len(info.shape) > 2 else 1
                sums = (rng.random((matrices, info.shape[-1])) ** 4 * 5000).astype(np.float32)
                counts = np.full(matrices, 1024)
                counts[1:2] = 0
                entries[name] = Statistic(sums, counts)
    matrix = ImportanceMatrix(entries, 2, 512, ("random",))
    np.savez(npz, **{name: entry.importance.reshape(-1) for name, entry in entries.items()})
    return Importance(matrix, "imatrix.gguf")


@pytest.mark.parametrize("name", SHAPES)
def test_every_plan(their_quantize: Any, tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "source.gguf", SHAPES[name])
    importance_of(source, tmp_path / "imatrix.npz")
    jobs: list[dict[str, Any]] = [
        {"source": str(source), "out": "", "ftype": int(kind), "dry_run": True, **more}
        for kind in KINDS
        for more in ({}, {"imatrix": str(tmp_path / "imatrix.npz")})
    ]
    answers = their_quantize(jobs)
    with open_source(source) as opened:
        model = model_of(opened.entries(None), "")
        for job, theirs in zip(jobs, answers, strict=True):
            target = Target(FileType(job["ftype"]))
            what = target.name, "imatrix" in job
            try:
                planned = plan_quantization(opened.tensors, target, model, Options(), importance="imatrix" in job)
            except WeightsError:
                assert theirs != 0, what
                assert not isinstance(theirs, list), what
                continue
            assert [[tensor.name, tensor.type.name] for tensor in planned] == theirs, what


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Importance]]:
    """Model, importance as arrays, and ours, of a shape."""
    directory = tmp_path_factory.mktemp("mixtures")
    made: dict[str, tuple[Path, Path, Importance]] = {}

    def make(name: str) -> tuple[Path, Path, Importance]:
        if name not in made:
            source = write(directory / f"{len(made)}.gguf", SHAPES[name])
            made[name] = source, source.with_suffix(".npz"), importance_of(source, source.with_suffix(".npz"))
        return made[name]

    return make


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", WITH_BYTES)
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
def test_every_byte(
    their_quantize: Any, compare: Any, sources: Any, tmp_path: Path, name: str, weighed: bool, kind: FileType
) -> None:
    source, npz, importance = sources(name)
    job = {"source": str(source), "out": str(tmp_path / "theirs.gguf"), "ftype": int(kind)}
    ours: Path | None = tmp_path / "ours.gguf"
    try:
        quantize(source, ours, kind.name, importance=importance if weighed else None)
    except UnsupportedError as error:
        pytest.skip(str(error))
    except RequestError:  # as llama-quantize refuses what it says is garbage without a matrix
        ours = None
    (status,) = their_quantize([job | ({"imatrix": str(npz)} if weighed else {})])
    assert (status == 0) == (ours is not None)
    if ours is not None:
        assert compare(ours, tmp_path / "theirs.gguf") >= 0.99
    else:
        assert not weighed


@pytest.mark.parametrize("name", ["phi3, 32 layers, groups of 3, tied", "phimoe, 32 layers, 16 experts"])
@pytest.mark.parametrize("layers", [(0,), (3, 4, 31), (1, 7, 8, 9, 20)])
def test_pruned_layers(
    their_quantize: Any, compare: Any, sources: Any, tmp_path: Path, name: str, layers: tuple[int, ...]
) -> None:
    """Mixtures go by the number of layers there were, and importance by the old names."""
    source, npz, importance = sources(name)
    job = {"source": str(source), "ftype": int(FileType.Q4_K_M), "prune": layers}
    jobs = [
        {**job, "out": str(tmp_path / "plain.gguf")},
        {**job, "out": str(tmp_path / "imatrix.gguf"), "imatrix": str(npz)},
        {**job, "out": str(tmp_path / "copy.gguf"), "only_copy": True},
    ]
    assert their_quantize(jobs) == [0, 0, 0]
    ours = quantize(source, tmp_path / "ours.gguf", "Q4_K_M", prune=layers).plan.path
    assert compare(ours, tmp_path / "plain.gguf") >= 0.99
    ours = quantize(source, tmp_path / "ours.gguf", "Q4_K_M", prune=layers, importance=importance).plan.path
    assert compare(ours, tmp_path / "imatrix.gguf") >= 0.99
    ours = quantize(source, tmp_path / "ours.gguf", "COPY", prune=layers).plan.path
    assert compare(ours, tmp_path / "copy.gguf") == 1


def test_what_llama_quantize_does_not_offer(their_quantize: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source.gguf", SHAPES["phi3, rows of 128"])
    job = {"source": str(source), "out": str(tmp_path / "x.gguf"), "ftype": int(FileType.NVFP4)}
    assert their_quantize([job]) != [0]
