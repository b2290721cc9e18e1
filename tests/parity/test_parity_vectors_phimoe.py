"""PhiMoE against what transformers, and beyond LongRoPE's border NumPy in float64, said of it (tests/vectors)."""

from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert, quantize

from .conftest import VECTORS, estimated, log_softmax
from .models_phimoe import KEPT, LENGTH, MODELS, VECTORS_OF, write_checkpoint
from .routing import chosen_experts

pytestmark = pytest.mark.cpu

BACKENDS = ("reference", "cpu")


@pytest.fixture(scope="module", params=VECTORS_OF)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's name and its F32 GGUF, from the layout of transformers 5."""
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(MODELS[request.param], directory, released=False)
    convert(directory, directory / "model.gguf", "f32", quiet=True)
    return request.param, directory / "model.gguf"


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities(made: tuple[str, Path], backend: str) -> None:
    name, path = made
    expected, ids = np.load(VECTORS / f"phimoe_{name}.npz"), MODELS[name].ids()
    assert expected["ids"].tolist() == ids
    with LLM.load(path, backend=backend, cache_type="f32") as llm:
        assert llm.backend == backend
        found = log_softmax(llm.logits(ids))
    assert estimated(found[:, KEPT] - expected["kept"]) < 1e-9
    assert (found.argmax(axis=1) == expected["top"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts(made: tuple[str, Path], backend: str) -> None:
    name, path = made
    count = LENGTH if backend != "reference" else 30
    expected = np.load(VECTORS / f"phimoe_{name}.npz")["chosen"][:, :count]
    assert np.array_equal(chosen_experts(path, MODELS[name].ids(), count, backend), np.sort(expected, axis=2))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K_M"])
def test_chunks_and_threads_change_no_bit(kind: str, tmp_path: Path) -> None:
    """Nor do the tokens that an expert gets beside a token's own."""
    model = MODELS["longrope_just_above_64"]
    path = quantize(write_checkpoint(model, tmp_path / "hf"), tmp_path / "model.gguf", kind, quiet=True).plan.path
    with LLM.load(path, backend="cpu", threads=1) as llm:
        expected = llm.logits(model.ids())
    for threads, batch in ((2, 512), (3, 7), (2, 1)):
        with LLM.load(path, backend="cpu", threads=threads, batch=batch) as llm:
            assert np.array_equal(llm.logits(model.ids()), expected), (threads, batch)


def test_the_vectors_tell_the_regimes_apart() -> None:
    """Same weights, a sequence at the border and one beyond it: an error there would be a million times the bound."""
    at, above = (np.load(VECTORS / f"phimoe_longrope_{side}_64.npz")["kept"] for side in ("at", "just_above"))
    assert estimated(at - above) > 1e-2
