"""PhiMoE between the two: llama.cpp reads our files, and we what its converter makes of the same checkpoint.

llama.cpp computes PhiMoE otherwise: RMSNorm for LayerNorm, a normalised softmax for sparsemixer, LongRoPE's own factor
for short_mscale and long_mscale. How far that is from the truth is measured here; equality is for `tests/parity`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert
from phiquant.eval.kl import compare_logits
from phiquant.gguf import GGUFFile

from ..parity.models_phimoe import MODELS, write_checkpoint

pytestmark = pytest.mark.interop

TOKENS = 200
RELEASED_MSCALE = 1.243163121016122
# Of the released lengths and mscale, which a file of llama.cpp's does not hold.
RELEASED = replace(
    MODELS["many_near_64"],
    name="released_64",
    seed=31,
    jitter=0.01,
    original=4096,
    context=131072,
    mscales=(RELEASED_MSCALE, RELEASED_MSCALE),
    window=131072,
)


def ours(path: Path, ids: list[int]) -> tuple[np.ndarray, list[str]]:
    """Logits, and what was assumed."""
    with LLM.load(path, backend="reference", cache_type="f32", context=512) as llm:
        return llm.logits(ids), llm.notes


def test_each_reads_the_files_of_the_other(their_convert: Any, llama_cpp: Any, tmp_path: Path) -> None:
    checkpoint, ids = write_checkpoint(RELEASED, tmp_path / "Phi-3.5-MoE"), RELEASED.ids(TOKENS)
    here = convert(checkpoint, tmp_path / "ours.gguf", "f32", quiet=True).plan.path
    theirs = their_convert(checkpoint, tmp_path / "theirs.gguf", "--outtype", "f32")
    truth, assumed = ours(here, ids)
    assert assumed == []

    # It passes over the keys that only our file has.
    computed = llama_cpp.logits(here, ids)
    assert np.array_equal(computed, llama_cpp.logits(theirs, ids))
    divergence = compare_logits(truth, computed)[0].mean()
    print(f"KL of llama.cpp to the truth {divergence:.3f}")
    assert divergence > 0.05

    found, assumed = ours(theirs, ids)
    assert ["sparsemixer" in assumed[0], "1.243163, as in Phi-3.5-MoE" in assumed[1], len(assumed)] == [True, True, 2]
    assert np.abs(found - truth).max() < 1e-6


def test_a_file_with_fused_projections(their_convert: Any, tmp_path: Path) -> None:
    checkpoint, ids = write_checkpoint(RELEASED, tmp_path / "Phi-3.5-MoE"), RELEASED.ids(60)
    truth, _ = ours(convert(checkpoint, tmp_path / "ours.gguf", "f32", quiet=True).plan.path, ids)
    fused = their_convert(checkpoint, tmp_path / "fused.gguf", "--outtype", "f32", "--fuse-qkv")
    with GGUFFile.open(fused) as file:
        assert {"blk.0.attn_qkv.weight", "blk.0.attn_qkv.bias"} <= set(file.tensors)
    found, _ = ours(fused, ids)
    assert np.abs(found - truth).max() < 1e-6


@pytest.mark.parametrize("name", ["grouped_128", "longrope_at_64"])
def test_how_far_llama_cpp_is_from_the_truth(llama_cpp: Any, tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    checkpoint, ids = write_checkpoint(model, tmp_path / "Phi-3.5-MoE"), model.ids(100)
    path = convert(checkpoint, tmp_path / "ours.gguf", "f32", quiet=True).plan.path
    truth, _ = ours(path, ids)
    # A context no longer than the original, with which it takes the short factors.
    computed = llama_cpp.logits(path, ids, context=200 if model.original else 512)
    divergence = compare_logits(truth, computed)[0].mean()
    print(f"KL of llama.cpp to the truth {name} {divergence:.3f}")
    assert divergence > 0.05
