"""Logits of both engines on the same files, those made here and those made by llama-quantize."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant import LLM
from phiquant.convert.run import convert, quantize
from phiquant.eval.kl import compare_logits
from phiquant.gguf import FileType

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"
TOKENS = 256

# Twice the mean divergence measured (docs/interop.md tells what it comes from).
BOUNDS = {
    "F32": 4.0e-9,
    "F16": 5.0e-7,
    "BF16": 2.5e-5,
    "Q8_0": 3.4e-4,
    "Q4_0": 6.2e-4,
    "Q4_1": 6.9e-4,
    "Q5_0": 6.3e-4,
    "Q5_1": 6.3e-4,
    "Q2_K": 8.7e-4,
    "Q3_K_M": 8.4e-4,
    "Q4_K_M": 7.4e-4,
    "Q5_K_M": 6.8e-4,
    "Q6_K": 8.3e-4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interop") / "Phi-3-tiny-F32.gguf"
    convert(MODEL, out, "f32", quiet=True)
    return out


@pytest.fixture(scope="module")
def ids(base: Path) -> list[int]:
    with LLM.load(base) as model:
        return model.tokenize((MODEL / "page.txt").read_text(encoding="utf-8"))[:TOKENS]


def ours(path: Path, ids: list[int], backend: str = "cpu") -> NDArray[np.float32]:
    with LLM.load(path, context=512, backend=backend) as model:
        return model.logits(ids)


@pytest.fixture(scope="module", params=list(BOUNDS))
def made_here(request: pytest.FixtureRequest, base: Path) -> Iterator[tuple[str, Path]]:
    out = base.with_name(f"ours-{request.param}.gguf")
    quantize(MODEL, out, request.param, quiet=True)
    yield request.param, out
    out.unlink()


def test_files_made_here(made_here, ids, llama_cpp, record_property) -> None:
    name, path = made_here
    values, same = compare_logits(llama_cpp.logits(path, ids), ours(path, ids))
    record_property("mean_kl", float(values.mean()))
    print(f"{name}: mean KL {values.mean():.2e}, max {values.max():.2e}, top-1 {same / len(ids):.3f}")
    assert values.mean() <= BOUNDS[name]
    assert same >= len(ids) * 0.95


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def test_files_made_by_llama_quantize(name, base, ids, llama_cpp) -> None:
    path = llama_cpp.quantize(base, FileType[name])
    values, same = compare_logits(llama_cpp.logits(path, ids), ours(path, ids))
    print(f"{name}: mean KL {values.mean():.2e}, max {values.max():.2e}, top-1 {same / len(ids):.3f}")
    assert values.mean() <= BOUNDS[name]
    assert same >= len(ids) * 0.95
    path.unlink()
