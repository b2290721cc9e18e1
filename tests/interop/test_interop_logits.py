"""Logits of both engines on the same files, of every file type: those made here and those llama.cpp makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant import LLM
from phiquant.calibrate import collect
from phiquant.convert import Importance, Options, TypePattern, convert, quantize
from phiquant.convert.filetypes import DEFAULT_TYPES, parse_file_type
from phiquant.eval.kl import compare_logits
from phiquant.gguf import FileType

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"
TOKENS = 256

# Twice the mean divergence measured (docs/interop.md tells what it comes from); for all types that are not here
# REQUIRED, which is twice that of Q4_K_M.
BOUNDS = {"F32": 4.0e-9, "F16": 5.0e-7, "BF16": 2.5e-5, "TQ1_0": 1.7e-3, "TQ2_0": 1.7e-3}
REQUIRED = 7.4e-4
# Types that a mixture made without a matrix of experts does not contain, on all matrices of the blocks.
SINGLE = ("MXFP4", "NVFP4")
PEER_LACKS = ("NVFP4",)  # as a type that it quantizes to


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interop") / "Phi-3-tiny-F32.gguf"
    convert(MODEL, out, "f32", quiet=True)
    return out


@pytest.fixture(scope="module")
def ids(base: Path) -> list[int]:
    with LLM.load(base) as model:
        return model.tokenize((MODEL / "page.txt").read_text(encoding="utf-8"))[:TOKENS]


@pytest.fixture(scope="module")
def importance(base: Path) -> Importance:
    """Of the calibration text; and the same as arrays beside the model, for llama.cpp."""
    text = (MODEL / "calibration.txt").read_text(encoding="utf-8")
    matrix = collect(base, text, chunks=8, dataset="calibration.txt")
    np.savez(base.with_suffix(".npz"), **{name: e.importance.reshape(-1) for name, e in matrix.entries.items()})
    return Importance(matrix, "calibration.txt")


def ours(path: Path, ids: list[int]) -> NDArray[np.float32]:
    with LLM.load(path, context=512, backend="cpu") as model:
        return model.logits(ids)


def check(name: str, path: Path, ids: list[int], llama_cpp: Any) -> None:
    values, same = compare_logits(llama_cpp.logits(path, ids), ours(path, ids))
    path.unlink()
    print(f"| {name} | {values.mean():.1e} | {values.max():.1e} | {100 * same / len(ids):.1f} % |")
    assert values.mean() <= BOUNDS.get(name, REQUIRED)
    assert same >= len(ids) * 0.95


@pytest.mark.parametrize("name", [kind.name for kind in DEFAULT_TYPES])
def test_files_made_here(name: str, base: Path, ids: list[int], importance: Importance, llama_cpp: Any) -> None:
    out = base.with_name(f"ours-{name}.gguf")
    quantize(MODEL, out, name, importance=importance, quiet=True)
    check(name, out, ids, llama_cpp)


@pytest.mark.parametrize("name", SINGLE)
def test_single_types_made_here(name: str, base: Path, ids: list[int], llama_cpp: Any) -> None:
    out = base.with_name(f"ours-{name}.gguf")
    options = Options(tensor_types=(TypePattern.parse(rf"blk\..*={name}"),))
    report = quantize(MODEL, out, "Q8_0", options, quiet=True)
    assert {t.type.name for t in report.plan.tensors if t.name.endswith("ffn_down.weight")} == {name}
    check(name, out, ids, llama_cpp)


@pytest.mark.parametrize("name", [kind.name for kind in DEFAULT_TYPES if kind.name not in PEER_LACKS])
def test_files_made_by_llama_cpp(
    name: str,
    base: Path,
    ids: list[int],
    importance: Importance,
    their_quantize: Callable[[list[dict[str, Any]]], list[Any]],
    llama_cpp: Any,
) -> None:
    out = base.with_name(f"theirs-{name}.gguf")
    kind = parse_file_type(name).file_type
    job = {"source": str(base), "out": str(out), "ftype": int(FileType(kind)), "imatrix": str(base.with_suffix(".npz"))}
    assert importance.matrix.entries
    assert their_quantize([job]) == [0]
    check(name, out, ids, llama_cpp)


def test_single_type_made_by_llama_cpp(base: Path, ids: list[int], their_quantize: Any, llama_cpp: Any) -> None:
    out, mxfp4 = base.with_name("theirs-MXFP4.gguf"), parse_file_type("MXFP4").default
    job = {"source": str(base), "out": str(out), "ftype": int(FileType.Q8_0)}
    assert their_quantize([job | {"tensor_types": [[r"blk\..*\.weight", int(mxfp4)]]}]) == [0]
    check("MXFP4", out, ids, llama_cpp)
