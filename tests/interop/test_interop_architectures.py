"""Phi-2 and rewritten Phis: llama.cpp computes our files as we do, and what its converter makes is ours, and runs here.

The models are the random ones of tests/parity, with the vocabulary of Phi-3.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phiquant import LLM
from phiquant.convert import convert, quantize
from phiquant.eval.kl import compare_logits
from phiquant.gguf import FileType, GGMLType, GGUFFile

from ..parity import models_llama, models_phi2

pytestmark = [pytest.mark.interop, pytest.mark.cpu]

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
TOKENS = 131  # beyond window and LongRoPE's border
CONTEXT = 512  # beyond LongRoPE's border too, by which llama.cpp chooses its factors

# Mean divergence, twice what was measured: both engines keep F16 keys and values. llama.cpp takes GELU from a table of
# F16, which is what is seen of Phi-2.
BOUNDS = {"phi2": 5e-8, "llama": 2.2e-9}
ROUNDED = 4.2e-4  # of quantized models, whose activations the engines round at other moments
# Of keys that differ between the converters, why.
EXPLAINED = {
    "general.name": "keeps its hyphens, so that llama.cpp takes the special tokens for Phi-3's",
    "llama.attention.sliding_window": "llama.cpp's converter drops it, and llama.cpp computes without",
    "llama.rope.scaling.original_context_length": "of LongRoPE llama.cpp's converter keeps the name alone",
    "llama.rope.scaling.attn_factor": "of LongRoPE llama.cpp's converter keeps the name alone",
    "phi2.feed_forward_length": "llama.cpp's converter always writes four times the hidden size",
    "phi2.attention.head_count_kv": "llama.cpp's converter always writes the number of heads",
    "phi2.rope.freq_base": "llama.cpp's converter takes 10,000 for granted",
}
F32 = ("--outtype", "f32")
# Phi-2 has byte-level BPE, and its class in llama.cpp's converter knows no other vocabulary.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.phi import Phi2Model
Phi2Model.set_vocab = Phi2Model._set_vocab_sentencepiece
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


MODELS = {
    f"{family}_{name}": model
    for family, module in (("phi2", models_phi2), ("llama", models_llama))
    for name, model in module.MODELS.items()
}


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A model of `MODELS` and its checkpoint; what is made of it goes after the test."""
    model, directory = MODELS[request.param], tmp_path / "tiny-phi3-layout"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(model.config()))
    save_file(model.weights(), directory / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(TINY / name, directory / name)
    yield model, directory
    shutil.rmtree(tmp_path)


def ours(path: Path, ids: list[int]) -> np.ndarray:
    with LLM.load(path, context=CONTEXT) as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_llama_cpp_computes_our_file_as_we_do(checkpoint: tuple[Any, Path], tmp_path: Path, llama_cpp: Any) -> None:
    """But for the sliding window, of which it knows nothing: within the window it does, beyond it does not."""
    model, directory = checkpoint
    path = convert(directory, tmp_path / "model.gguf", "f32", quiet=True).plan.path
    ids = model.ids(TOKENS)
    values, same = compare_logits(llama_cpp.logits(path, ids, context=CONTEXT), ours(path, ids))
    window = getattr(model, "window", None)
    print(f"| {model.architecture} {model.name} | {values.mean():.1e} | {values.max():.1e} | {same} of {TOKENS} |")
    assert values[: window or TOKENS].mean() <= BOUNDS[model.architecture]
    if window is None:
        assert same >= TOKENS - 1  # two tokens may be as good as equally likely
    else:
        assert values[window:].mean() > 1e-3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS"])
@pytest.mark.parametrize("checkpoint", ["phi2_phi_1", "llama_as_phi4_128"], indirect=True)
def test_quantized_it_is_the_same_file_and_model(
    checkpoint: tuple[Any, Path], tmp_path: Path, llama_cpp: Any, their_quantize: Any, compare: Any, kind: str
) -> None:
    """Types by the same rules, biases and norms left alone, and the same logits but for the rounding of activations."""
    model, directory = checkpoint
    base = convert(directory, tmp_path / "base.gguf", "f32", quiet=True).plan.path
    path, theirs = quantize(base, tmp_path / "ours.gguf", kind, quiet=True).plan.path, tmp_path / "theirs.gguf"
    job = {"source": str(base), "out": str(theirs), "ftype": int(FileType[kind])}
    assert their_quantize([job]) == [0]
    assert compare(path, theirs) >= 0.99
    with GGUFFile.open(path) as file:
        assert {t.type for t in file.tensors.values() if len(t.shape) == 1} == {GGMLType.F32}
        assert all(t.type is not GGMLType.F32 for t in file.tensors.values() if len(t.shape) == 2)
    values, same = compare_logits(
        llama_cpp.logits(path, model.ids(TOKENS), context=CONTEXT), ours(path, model.ids(TOKENS))
    )
    print(f"| {model.architecture} {model.name} {kind} | {values.mean():.1e} | {same} of {TOKENS} |")
    assert values.mean() <= ROUNDED
    assert same >= 0.95 * TOKENS


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_what_its_converter_makes_is_ours_and_runs_here(
    checkpoint: tuple[Any, Path], tmp_path: Path, their_convert: Any
) -> None:
    model, directory = checkpoint
    path = convert(directory, tmp_path / "ours.gguf", "f32", quiet=True).plan.path
    theirs = their_convert(directory, tmp_path / "theirs.gguf", *F32, program=CONVERT)
    with GGUFFile.open(path) as a, GGUFFile.open(theirs) as b:
        different = {
            key
            for key in set(a.fields) | set(b.fields)
            if not key.startswith("phiquant.")
            and (key not in a.fields or key not in b.fields or not _equal(a.fields[key], b.fields[key]))
        }
        assert different <= set(EXPLAINED)
        longrope = [name for name in a.tensors if name.startswith("rope_factors")]
        assert [name for name in a.tensors if name not in longrope] == list(b.tensors)
        for name, info in b.tensors.items():
            assert (info.shape, info.type) == (a.tensors[name].shape, a.tensors[name].type), name
            if name == "rope_freqs.weight":  # computed, by torch and by NumPy
                x, y = (file.data(name).view("<f4") for file in (a, b))
                assert np.abs(x / y - 1).max() < 1e-6
            else:
                assert np.array_equal(a.data(name), b.data(name)), name
    if different <= {"general.name"}:
        values, same = compare_logits(ours(theirs, model.ids(TOKENS)), ours(path, model.ids(TOKENS)))
        assert values.max() < 1e-9
        assert same == TOKENS


@pytest.mark.parametrize("checkpoint", ["phi2_phi_2", "llama_biased_tied_grouped_64"], indirect=True)
def test_projections_that_its_converter_fuses_run_here(
    checkpoint: tuple[Any, Path], tmp_path: Path, their_convert: Any
) -> None:
    model, directory = checkpoint
    path = convert(directory, tmp_path / "ours.gguf", "f32", quiet=True).plan.path
    theirs = their_convert(directory, tmp_path / "theirs.gguf", *F32, "--fuse-qkv", program=CONVERT)
    with GGUFFile.open(theirs) as file:
        assert "blk.0.attn_qkv.weight" in file.tensors
        assert "blk.0.attn_qkv.bias" in file.tensors
    assert np.array_equal(ours(theirs, model.ids(TOKENS)), ours(path, model.ids(TOKENS)))


def _equal(a: Any, b: Any) -> bool:
    return (a.type, a.item_type) == (b.type, b.item_type) and np.array_equal(a.value, b.value)
